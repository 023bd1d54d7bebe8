"""Both ends of a connection prove that they know the run's token, without saying it.

    server: magic, nonce S                    client: nonce C, HMAC(token, "client" S C)
    server: HMAC(token, "server" S C)

Nonces are drawn for each connection, so an answer that was overheard opens no other one. What
follows on the connection is neither encrypted nor signed: content is compared with digests.
"""

import hashlib
import hmac
import secrets
import socket
import time

MAGIC = b"eep-shard/1\n"
NONCE_BYTES = 32
PROOF_BYTES = 32


class NotAMember(ConnectionError):
    """The other end does not know the token, or is no end of such a connection."""


def admit(connection: socket.socket, token: str, deadline_s: float, service: bytes = MAGIC) -> None:
    """The server's part. Raises NotAMember, or OSError where the other end is gone or too slow.

    `service` names what is served, so that no proof for one is of use for another.
    """
    ends_s = time.monotonic() + deadline_s
    nonce = secrets.token_bytes(NONCE_BYTES)
    connection.settimeout(deadline_s)
    connection.sendall(service + nonce)
    answer = _receive(connection, NONCE_BYTES + PROOF_BYTES, ends_s)
    theirs, proof = answer[:NONCE_BYTES], answer[NONCE_BYTES:]
    if not hmac.compare_digest(proof, _proof(token, service + b"client", nonce, theirs)):
        raise NotAMember("wrong token")
    connection.sendall(_proof(token, service + b"server", nonce, theirs))


def enter(connection: socket.socket, token: str, deadline_s: float, service: bytes = MAGIC) -> None:
    """The client's part. Raises NotAMember where the server does not know the token, or OSError."""
    ends_s = time.monotonic() + deadline_s
    connection.settimeout(deadline_s)
    greeting = _receive(connection, len(service) + NONCE_BYTES, ends_s)
    if not greeting.startswith(service):
        raise NotAMember(f"a server of something else: {greeting[: len(service)]!r}")
    nonce, own = greeting[len(service) :], secrets.token_bytes(NONCE_BYTES)
    connection.sendall(own + _proof(token, service + b"client", nonce, own))
    proof = _receive(connection, PROOF_BYTES, ends_s)
    if not hmac.compare_digest(proof, _proof(token, service + b"server", nonce, own)):
        raise NotAMember("the server does not know the token")


def _proof(token: str, side: bytes, server_nonce: bytes, client_nonce: bytes) -> bytes:
    return hmac.digest(token.encode(), side + server_nonce + client_nonce, hashlib.sha256)


def _receive(connection: socket.socket, nbytes: int, ends_s: float) -> bytes:
    """Exactly so many bytes; one deadline for all of them, however they trickle in."""
    found = b""
    while len(found) < nbytes:
        remaining_s = ends_s - time.monotonic()
        if remaining_s <= 0:
            raise TimeoutError("the other end did not prove itself in time")
        connection.settimeout(remaining_s)
        part = connection.recv(nbytes - len(found))
        if not part:
            raise NotAMember("the other end closed instead of proving that it knows the token")
        found += part
    return found
