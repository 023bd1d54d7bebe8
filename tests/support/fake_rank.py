"""A rank without JAX: speaks the control channel over aiohttp and follows the real participant.

Its tokens are a function of the request alone, as those of a real rank: `token_of(request, n)`.
"""

import asyncio
import collections
import contextlib
import json
import pathlib
import subprocess
import sys

import aiohttp

from eep_jax.coordination import participant as p
from eep_jax.coordination import protocol
from eep_jax.engine.request import Progress, Request
from eep_jax.placement.placement import EMPTY
from eep_jax.runtime.control import messages
from eep_jax.runtime.control.codec import decode, encode
from eep_jax.runtime.control.endpoint import ENDPOINT
from eep_jax.runtime.control.identity import host_id, start_ticks

HEARTBEAT_S = 0.1
RETRY_S = 0.05
BYTES_MAX = 4 << 20


def token_of(request: Request, index: int) -> int:
    """The token at `index` of a completion: letters that depend on prompt, seed and position."""
    return 97 + (sum(request.prompt) + request.seed + 7 * index) % 26


def completion_of(request: Request) -> tuple[int, ...]:
    return tuple(token_of(request, index) for index in range(request.max_tokens))


def start_body() -> subprocess.Popen:
    """A process that does nothing: what the supervisor watches, and may kill, as the rank's."""
    command = [sys.executable, "-S", "-c", "import time; time.sleep(120)"]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL)


class FakeRank:
    """One rank process as the supervisor sees it. `start` it in a running loop, `close` it after.

    `pace` is awaited before every token; a test holds generation by clearing it. With `reads`
    false nothing that arrives is read once the rank has its incarnation.
    """

    def __init__(
        self,
        rank: int,
        slots: int,
        run_dir: pathlib.Path,
        token: str,
        run: str = "tiny",
        **hello,
    ):
        """`hello` changes what it says of itself when it introduces itself."""
        self.rank, self.run_dir, self.token, self.run = rank, run_dir, token, run
        self._hello = hello
        self.answers = collections.deque(maxlen=100)  # to its introductions
        self.incarnation, self.sequence = 0, 0
        self.connections = 0  # made so far
        self.state = p.ParticipantState(rank=rank, contents=(EMPTY,) * slots)
        self.requests: dict[str, tuple[Request, list[int]]] = {}
        self.finished: dict[str, Progress] = {}
        self.heard = collections.deque(maxlen=1_000)  # everything the supervisor said
        self.given: list[Request] = []
        self.pace = asyncio.Event()
        self.pace.set()
        self.reads = True
        self.body = start_body()
        self._socket: aiohttp.ClientWebSocketResponse | None = None
        self._tasks: list[asyncio.Task] = []

    def start(self) -> "FakeRank":
        self.state, _ = p.advance(self.state, p.WarmedUp())
        self._tasks = [
            asyncio.create_task(self._keep_connected()),
            asyncio.create_task(self._work()),
        ]
        return self

    async def close(self) -> None:
        """The process is gone, by SIGKILL: its channel breaks and its body ends."""
        self.body.kill()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.body.wait(10)

    async def say(self, message) -> None:
        """Sends a message, or loses it where there is no channel."""
        if self._socket is not None:
            with contextlib.suppress(ConnectionError):
                await self._socket.send_bytes(encode(message))

    async def report(self) -> None:
        self.sequence += 1
        await self.say(
            self.state.status(
                incarnation=self.incarnation,
                sequence=self.sequence,
                handle=f"slab-{self.rank}",
            )
        )

    async def break_channel(self) -> None:
        """The connection breaks; the rank lives, and calls again."""
        if self._socket is not None:
            await self._socket.close()

    async def _keep_connected(self) -> None:
        while True:
            try:
                await self._connect_once()
            except (aiohttp.ClientError, OSError, ValueError):
                pass  # no supervisor, or a new one that did not write its endpoint yet
            finally:
                self._socket = None
            await asyncio.sleep(RETRY_S)

    async def _connect_once(self) -> None:
        async with connection_to(self.run_dir, self.token) as socket:
            hello = hello_of(self.rank, self.body.pid, self.run, self.incarnation, **self._hello)
            while True:
                await socket.send_bytes(encode(hello))
                if self.incarnation:
                    break
                answer = await receive(socket)
                self.answers.append(answer)
                if isinstance(answer, protocol.Welcome):
                    self.incarnation = answer.incarnation
                    break
                await asyncio.sleep(RETRY_S)
            self._socket = socket
            self.connections += 1
            heartbeat = asyncio.create_task(self._heartbeat())
            try:
                await self.report()
                await self.say(messages.Held(progress=self._held()))
                while self.reads:
                    await self._handle(await receive(socket))
                await asyncio.Event().wait()
            finally:
                heartbeat.cancel()

    async def _heartbeat(self) -> None:
        while True:
            await self.report()
            await asyncio.sleep(HEARTBEAT_S)

    def _held(self) -> tuple[Progress, ...]:
        running = [
            Progress(id=request.id, start=0, tokens=tuple(tokens))
            for request, tokens in self.requests.values()
        ]
        return (*self.finished.values(), *running)

    async def _handle(self, message) -> None:
        self.heard.append(message)
        match message:
            case messages.Generate(request=request):
                self.given.append(request)
                if request.id in self.finished:
                    await self.say(messages.Produced(progress=(self.finished[request.id],)))
                else:
                    self.requests.setdefault(request.id, (request, list(request.produced)))
            case messages.Forget(id=request_id):
                self.requests.pop(request_id, None)
                self.finished.pop(request_id, None)
            case messages.Shutdown():
                pass  # the test decides when a process ends
            case _:
                await self._feed(message)

    async def _feed(self, event) -> None:
        self.state, actions = p.advance(self.state, event)
        for action in actions:
            match action:
                case p.Report():
                    await self.report()
                case p.FillBank(load=load):
                    await self._feed(p.Loaded(self._filled(load.slots, load.moves)))
                case p.FillSlots(fetch=fetch):
                    bank = self._filled(self.state.contents, fetch.moves)
                    await self._feed(p.Fetched(fetch.number, bank))
                case p.CarryOut(prepare=prepare):
                    slots = prepare.placement.slots[self.rank]
                    await self._feed(p.Prepared(prepare.epoch, self._filled(slots, prepare.moves)))

    def _filled(self, slots, moves) -> tuple[int, ...]:
        bank = list(self.state.contents or (EMPTY,) * len(slots))
        for move in moves:
            bank[move.slot] = move.expert
        return tuple(bank)

    async def _work(self) -> None:
        """One token of every request in turn, for as long as the rank serves."""
        while True:
            await self.pace.wait()
            await asyncio.sleep(0.002)
            if self.state.mode is not protocol.Mode.SERVING or not self.pace.is_set():
                continue
            progress = [self._advance(*self.requests[i]) for i in list(self.requests)]
            if progress:
                await self.say(messages.Produced(progress=tuple(progress)))

    def _advance(self, request: Request, tokens: list[int]) -> Progress:
        start = len(tokens)
        tokens.append(token_of(request, start))
        if len(tokens) < request.max_tokens:
            return Progress(id=request.id, start=start, tokens=(tokens[-1],))
        done = Progress(id=request.id, start=0, tokens=tuple(tokens), finish="length")
        self.finished[request.id] = done
        del self.requests[request.id]
        return done


def hello_of(rank: int, pid: int, run: str, incarnation: int = 0, **changes) -> messages.Hello:
    values = {"host": host_id(), "ticks": start_ticks(pid), "run": run, "pid": pid, **changes}
    return messages.Hello(rank=rank, incarnation=incarnation, **values)


@contextlib.asynccontextmanager
async def connection_to(run_dir: pathlib.Path, token: str | None):
    """A WebSocket to the supervisor of this run directory."""
    endpoint = json.loads((run_dir / ENDPOINT).read_text())
    url = f"http://{endpoint['host']}:{endpoint['port']}/control"
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=2.0)
    async with (
        aiohttp.ClientSession(timeout=timeout, headers=headers) as session,
        session.ws_connect(url, max_msg_size=BYTES_MAX) as socket,
    ):
        yield socket


async def receive(socket: aiohttp.ClientWebSocketResponse):
    """The next message. Raises ConnectionError where the channel was closed."""
    frame = await socket.receive()
    if frame.type is not aiohttp.WSMsgType.BINARY:
        raise ConnectionError(f"the supervisor closed the channel: {frame.type.name} {frame.extra}")
    return decode(frame.data, messages.TO_RANK, BYTES_MAX)
