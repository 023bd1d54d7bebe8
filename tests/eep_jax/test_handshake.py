"""Promises of the handshake: who does not know the token gets nothing, however it tries."""

import socket
import threading

import pytest

from eep_jax.handshake import MAGIC, NONCE_BYTES, PROOF_BYTES, NotAMember, admit, enter

TOKEN = "a token of enough letters"


@pytest.fixture
def ends():
    left, right = socket.socketpair()
    yield left, right
    left.close()
    right.close()


def serving(connection, token=TOKEN, deadline_s=2.0):
    """Runs the server's part; the result is what it raised, or None."""
    outcome = []

    def body():
        try:
            admit(connection, token, deadline_s)
            outcome.append(None)
        except OSError as error:
            outcome.append(error)
            connection.close()

    thread = threading.Thread(target=body)
    thread.start()

    def result():
        thread.join(10)
        return outcome[0]

    return result


def test_two_that_know_the_token_go_on_with_whatever_they_say(ends):
    server, client = ends
    admitted = serving(server)
    enter(client, TOKEN, 2.0)
    assert admitted() is None
    client.sendall(b"hello")
    assert server.recv(9) == b"hello"


def test_a_wrong_token_is_refused_by_the_server(ends):
    server, client = ends
    admitted = serving(server)
    with pytest.raises(NotAMember):
        enter(client, "another token, as long", 2.0)
    assert isinstance(admitted(), NotAMember) and "wrong token" in str(admitted())


def test_a_server_without_the_token_is_refused_by_the_client(ends):
    server, client = ends
    entered = []

    def pretend():
        server.sendall(MAGIC + bytes(NONCE_BYTES))
        server.recv(NONCE_BYTES + PROOF_BYTES)
        server.sendall(bytes(PROOF_BYTES))

    thread = threading.Thread(target=pretend)
    thread.start()
    with pytest.raises(NotAMember, match="does not know the token"):
        entered.append(enter(client, TOKEN, 2.0))
    thread.join(10)


def test_what_a_member_said_once_opens_no_second_connection(ends):
    server, client = ends
    admitted = serving(server)
    greeting = client.recv(len(MAGIC) + NONCE_BYTES, socket.MSG_PEEK)
    said = Recorder(client)
    enter(said, TOKEN, 2.0)
    assert admitted() is None and greeting.startswith(MAGIC)
    again, replaying = socket.socketpair()
    with again, replaying:
        refused = serving(again)
        replaying.recv(len(MAGIC) + NONCE_BYTES)
        replaying.sendall(said.sent)
        assert replaying.recv(PROOF_BYTES) == b""
        assert "wrong token" in str(refused())


def test_the_servers_own_proof_sent_back_to_it_is_no_proof(ends):
    """A reflection: the two sides sign different words."""
    server, client = ends
    admitted = serving(server)
    nonce = client.recv(len(MAGIC) + NONCE_BYTES)[len(MAGIC) :]
    other, helper = socket.socketpair()
    with other, helper:
        # A second server, asked to sign the first one's nonce as if it were a client's.
        serving(other)
        helper.recv(len(MAGIC) + NONCE_BYTES)
        helper.sendall(nonce + bytes(PROOF_BYTES))
        client.sendall(nonce + (helper.recv(PROOF_BYTES) or bytes(PROOF_BYTES)))
    assert isinstance(admitted(), NotAMember)


@pytest.mark.parametrize("words", [b"", b"\0", b"GET / HTTP/1.1\r\n\r\n"])
def test_who_says_too_little_is_cut_off_at_the_deadline(ends, words):
    server, client = ends
    admitted = serving(server, deadline_s=0.2)
    client.sendall(words)
    assert isinstance(admitted(), TimeoutError)


def test_who_leaves_in_the_middle_is_no_member(ends):
    server, client = ends
    admitted = serving(server)
    client.sendall(bytes(5))
    client.shutdown(socket.SHUT_WR)
    assert isinstance(admitted(), NotAMember)


def test_a_server_of_something_else_is_named(ends):
    server, client = ends
    server.sendall(b"HTTP/1.1 400 Bad Request\r\n" + bytes(64))
    with pytest.raises(NotAMember, match=r"HTTP/1\.1"):
        enter(client, TOKEN, 2.0)


class Recorder:
    """A socket that remembers what was sent."""

    __class__ = property(lambda self: socket.socket)  # what annotations ask for

    def __init__(self, connection):
        self._connection, self.sent = connection, b""

    def sendall(self, data):
        self.sent += data
        self._connection.sendall(data)

    def __getattr__(self, name):
        return getattr(self._connection, name)
