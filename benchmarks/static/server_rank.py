"""One rank of a static service: reads requests as lines of JSON and writes what they produced.

In:  {"add": {"id": ..., "prompt": [...], ...}}, {"dead": 2}
Out: {"ready": [ranks]}, {"progress": [[id, start, tokens, finish], ...]}

Recovery `restart` does nothing: when a rank dies the others hang in a collective until they are
killed. Recovery `rejit` is JAX's own: the process joins as recoverable; after the message of a
death it breaks its connections to peers, so that the collective fails, asks `live_devices` which
ranks are left, and compiles for them. The failed step took the donated cache along, so its requests
are prefilled again with what they had produced.
"""

import dataclasses
import json
import logging
import os
import pathlib
import queue
import socket
import sys
import threading
import time

from benchmarks.meeting import join_mesh
from benchmarks.processes import config_of, with_ranks, worker

IDLE_S = 0.002  # between steps while there is no request
HEARTBEAT_TIMEOUT_S = 1  # the shortest that jax.distributed takes
# From JAX's guide to fault-tolerant distributed programs: NCCL calls that can be given up.
NCCL_FLAGS = (
    "--xla_gpu_nccl_terminate_on_error=false",
    "--xla_gpu_nccl_async_execution=true",
    "--xla_gpu_nccl_blocking_communicators=false",
)
NCCL_VARIABLES = {
    "XLA_PYTHON_CLIENT_ABORT_COLLECTIVES_ON_FAILURE": "1",
    "XLA_PYTHON_CLIENT_USE_TFRT_GPU_CLIENT": "1",
}

_log = logging.getLogger("static.rank")


def serve(directory: pathlib.Path, rank: int, job: dict) -> None:
    """Serves until this process is killed or a step fails for good."""
    # Gloo prints to stdout, which belongs to the front.
    to_front = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    config, recovers = with_ranks(config_of(job), job["ranks"]), job["recovery"] == "rejit"
    more = {}
    if recovers and config.platform == "gpu":
        os.environ["XLA_FLAGS"] = " ".join([os.environ["XLA_FLAGS"], *NCCL_FLAGS])
        os.environ.update(NCCL_VARIABLES)
    if recovers:
        import jax

        jax.config.update("jax_enable_recoverability", True)
        more["heartbeat_timeout_seconds"] = HEARTBEAT_TIMEOUT_S
    join_mesh(job["coordinator"], job["ranks"], rank, **more)
    port = int(job["coordinator"].rpartition(":")[2])
    server = Server(config, job["exchange"], recovers, to_front, port)
    threading.Thread(target=server.read_forever, args=(sys.stdin,), daemon=True).start()
    server.run()


class Server:
    """Steps without end; one thread computes, one reads."""

    def __init__(self, config, exchange: str, recovers: bool, to_front, coordinator_port: int):
        from benchmarks.static.worker import load_weights

        self._config, self._exchange, self._recovers = config, exchange, recovers
        self._to_front, self._inbox = to_front, queue.SimpleQueue()
        self._weights = load_weights(config)
        self._requests: dict[str, object] = {}
        self._produced: dict[str, list[int]] = {}
        self._coordinator_port = coordinator_port

    def read_forever(self, lines) -> None:
        """Requests go to the other thread; a death breaks what that one is waiting for."""
        for line in lines:
            message = json.loads(line)
            if "dead" in message:
                _log.warning("rank %d is dead", message["dead"])
                _break_connections(self._coordinator_port)
            else:
                self._inbox.put(message["add"])
        os._exit(0)  # the front is gone

    def run(self) -> None:
        import jax

        devices = jax.devices()
        while True:
            engine = self._begin(devices)
            try:
                while True:
                    self._step(engine)
            except (jax.errors.JaxRuntimeError, ValueError) as error:  # Gloo's are ValueErrors
                if not self._recovers:
                    raise
                _log.warning("a step failed: %s", str(error).splitlines()[0][:200])
            devices = _live_devices()

    def _begin(self, devices):
        """An engine of these devices, compiled, with all requests that are not at their end."""
        from benchmarks.static.engine import StaticEngine

        started = time.monotonic()
        engine = StaticEngine(self._config, devices, self._exchange, self._weights, agree=True)
        for rows in self._config.engine.step_sizes:
            engine.advance(rows)
        for name, request in self._requests.items():
            produced = tuple(self._produced[name])
            engine.scheduler.add(dataclasses.replace(request, produced=produced))
        ranks = [device.process_index for device in devices]
        _log.warning("ready for ranks %s after %.2f s", ranks, time.monotonic() - started)
        self._say({"ready": ranks})
        return engine

    def _step(self, engine) -> None:
        from eep_jax.engine.request import Request

        while not self._inbox.empty():
            values = self._inbox.get()
            request = Request(**{**values, "prompt": tuple(values["prompt"])})
            self._requests[request.id], self._produced[request.id] = request, []
            engine.scheduler.add(request)
        parts = engine.advance()
        for part in parts:
            kept = self._produced[part.id]
            kept[part.start :] = part.tokens
            if part.finish:
                del self._requests[part.id], self._produced[part.id]
        if parts:
            self._say({"progress": [[p.id, p.start, list(p.tokens), p.finish] for p in parts]})
        elif not self._requests:
            time.sleep(IDLE_S)

    def _say(self, message: dict) -> None:
        self._to_front.write(json.dumps(message) + "\n")
        self._to_front.flush()


def _live_devices() -> list:
    import jax
    from jax.experimental.multihost_utils import live_devices

    with live_devices(jax.devices()) as devices:
        return sorted(devices, key=lambda device: device.process_index)


def _break_connections(coordinator_port: int) -> None:
    """Ends the TCP connections to peers that Gloo holds, as NCCL's abort does for its own.

    Gloo has no such call. Only the coordinator's connections are left.
    """
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as copy:
                if copy.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                ports = {copy.getsockname()[1], copy.getpeername()[1]}
                if coordinator_port not in ports:
                    copy.shutdown(socket.SHUT_RDWR)
        except OSError:
            continue  # it listens, or was closed by its owner meanwhile


if __name__ == "__main__":
    worker(serve)
