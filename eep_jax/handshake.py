"""Mutual proof that both ends of a TCP connection know the run's token, without sending it.

    server: magic, nonce S                    client: nonce C, HMAC(token, "client" S C)
    server: HMAC(token, "server" S C)

Nonces are drawn for each connection, so a recorded answer opens no other one. What follows on the
connection is neither encrypted nor signed: content is compared with digests.
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
    """The other end does not know the token, or does not speak this handshake."""


def admit(connection: socket.socket, token: str, deadline_s: float, service: bytes = MAGIC) -> None:
    """The server's part.

    Args:
        connection: The accepted connection; its timeout is changed.
        token: The run's token.
        deadline_s: Time for the whole handshake, in seconds.
        service: Name of the service; a proof for one service is invalid for all others.

    Raises:
        NotAMember: The client does not know the token.
        OSError: The client closed, or missed the deadline.
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
    """The client's part, with the arguments of `admit`.

    Raises:
        NotAMember: The server does not know the token, or is another service.
        OSError: The server closed, or missed the deadline.
    """
    ends_s = time.monotonic() + deadline_s
    connection.settimeout(deadline_s)
    greeting = _receive(connection, len(service) + NONCE_BYTES, ends_s)
    if not greeting.startswith(service):
        found = greeting[: len(service)]
        raise NotAMember(f"the server greets with {found!r}, expected {service!r}")
    nonce, own = greeting[len(service) :], secrets.token_bytes(NONCE_BYTES)
    connection.sendall(own + _proof(token, service + b"client", nonce, own))
    proof = _receive(connection, PROOF_BYTES, ends_s)
    if not hmac.compare_digest(proof, _proof(token, service + b"server", nonce, own)):
        raise NotAMember("the server does not know the token")


def _proof(token: str, side: bytes, server_nonce: bytes, client_nonce: bytes) -> bytes:
    return hmac.digest(token.encode(), side + server_nonce + client_nonce, hashlib.sha256)


def _receive(connection: socket.socket, nbytes: int, ends_s: float) -> bytes:
    """Exactly `nbytes` bytes; one deadline for all of them, however slowly they arrive."""
    found = b""
    while len(found) < nbytes:
        remaining_s = ends_s - time.monotonic()
        if remaining_s <= 0:
            raise TimeoutError("the other end did not prove in time that it knows the token")
        connection.settimeout(remaining_s)
        part = connection.recv(nbytes - len(found))
        if not part:
            raise NotAMember("the other end closed instead of proving that it knows the token")
        found += part
    return found
