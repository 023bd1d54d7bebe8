"""How fast each source brings experts into slots, beside a plain copy of the same bytes.

    python -m benchmarks.bench_sources --config=tiny_cpu      # or a configuration of platform gpu

Two ranks in one process, on one device. Each source brings as many experts as one rank's death
orphans; in turn with it the same bytes are copied plainly:

    peer         a copy within the own slab; on a GPU by its copy engine
    backup       own host memory: a copy between two arrays; on a GPU, from pinned memory
    p2p          another rank's backup over Orbax: the same bytes over a socket
    checkpoint   Orbax on storage: reading a plain file of the same bytes

`moved` is without finding out whether a slot holds what it should, `checked` with it. What was
moved is compared with the checkpoint, bit by bit, before anything is timed.
"""

import dataclasses
import os
import pathlib
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable

import numpy as np
from absl import app
from absl import flags as absl_flags
from absl import logging as absl_logging
from rich.console import Console
from rich.table import Table

from benchmarks.harness import Record, append, compared, cpu_device, percentile
from eep_jax.config import RunConfig
from launch import flags
from launch.environments.local import cpu_rank_environment, gpu_rank_environment, gpu_share

EXPERT_MIB_MIN, EXPERT_MIB = 4, 24  # smaller experts are all latency: then experts of this size
ORPHANS_MAX = 8
COPIES = 5  # of the experts on disk: two backups, a checkpoint, plain files, and one in writing
SOURCES = ("peer", "backup", "p2p", "checkpoint")
TOKEN = "a token of the benchmark alone"


@dataclasses.dataclass(frozen=True)
class Timed:
    """Bytes per second of a source and of a plain copy, one after the other."""

    name: str  # source and what was done
    own: list[float]
    plain: list[float]


def define_flags() -> None:
    absl_flags.DEFINE_list("only", None, "These sources, as peer,backup; else all.")
    absl_flags.DEFINE_integer("samples", 9, "How often each is timed; the median counts.", 1)
    absl_flags.DEFINE_string("out", None, "File of records to append to; none: only the table.")


def main() -> int:
    only = absl_flags.FLAGS.only
    if only is not None and (unknown := set(only) - set(SOURCES)):
        raise flags.UsageError(f"--only={','.join(only)}: {unknown} are not among {SOURCES}")
    config = _sized(flags.run_config())
    with tempfile.TemporaryDirectory(dir=_roomy(config), prefix="eep-bench-") as scratch:
        os.environ.update(_environment(config, pathlib.Path(scratch)))
        return _run(config, pathlib.Path(scratch))


def _roomy(config: RunConfig) -> str:
    """Where backups are kept, if it has room for all copies; else where temporary files are."""
    model, directory = config.model, config.cluster.backup_dir
    needed = COPIES * (model.experts * model.expert_elements + model.parameters) * 2
    if shutil.disk_usage(directory).free > needed:
        return directory
    print(f"{directory} has no room for {needed} bytes; {tempfile.gettempdir()} is used instead")
    return tempfile.gettempdir()


def _sized(config: RunConfig) -> RunConfig:
    """As many experts as one death orphans, large enough for a rate, with drawn weights."""
    model = config.model
    if model.expert_elements * 2 < EXPERT_MIB_MIN << 20:
        width = (EXPERT_MIB << 20) // (2 * model.layers * 3 * model.hidden)
        model = dataclasses.replace(model, expert_hidden=width)
    orphans = min(ORPHANS_MAX, max(2, model.experts // config.cluster.ranks))
    few = min(model.experts_per_token, orphans)
    model = dataclasses.replace(model, experts=orphans, experts_per_token=few)
    return dataclasses.replace(config, model=model, checkpoint="", random_weights=0)


def _environment(config: RunConfig, scratch: pathlib.Path) -> dict[str, str]:
    if config.platform == "cpu":
        return cpu_rank_environment()
    return gpu_rank_environment(gpu_share(0, 1, flags.gpus(), 0.1), scratch / "cache")


def _run(config: RunConfig, scratch: pathlib.Path) -> int:
    absl_logging.set_verbosity(absl_logging.WARNING)  # Orbax tells every step of every read
    from benchmarks.source_bench import Bench  # loads JAX, under the variables set before

    bench = Bench(config, scratch, TOKEN)
    try:
        comparisons = bench.comparisons(absl_flags.FLAGS.only)
        timed = [_time(name, bench.bytes, own, plain) for name, own, plain in comparisons]
        device = bench.device or cpu_device()
    finally:
        bench.close()
    records = _records(config, device, timed)
    _print(records)
    if out := absl_flags.FLAGS.out:
        append(pathlib.Path(out), records)
    return 0


def _time(name: str, nbytes: int, own: Callable[[], None], plain: Callable[[], None]) -> Timed:
    """In turn, so that both meet the same machine; the first of each is not counted."""
    own(), plain()
    rates: tuple[list[float], list[float]] = ([], [])
    for _ in range(absl_flags.FLAGS.samples):
        for call, found in zip((own, plain), rates, strict=True):
            started = time.monotonic()
            call()
            found.append(nbytes / (time.monotonic() - started))
    return Timed(name, *rates)


def _records(config: RunConfig, device: str, timed: list[Timed]) -> list[Record]:
    model, expert_bytes = config.model, config.model.expert_elements * 2
    shape = {
        "config": config.name,
        "hidden": model.hidden,
        "layers": model.layers,
        "expert_mib": round(expert_bytes / (1 << 20), 3),
        "experts": model.experts,
        "samples": absl_flags.FLAGS.samples,
    }
    gb = lambda rates: percentile(rates, 50) / 1e9
    return [
        Record(
            bench="sources",
            metric=t.name,
            value=gb(t.own),
            unit="GB/s",
            device=device,
            ranks=2,
            shape=shape,
            **compared(gb(t.plain), gb(t.own)),
        )
        for t in timed
    ]


def _print(records: list[Record]) -> None:
    first = records[0]
    table = Table(title=f"{first.device}; {dict(first.shape)}", title_justify="left")
    for name in ("source", "GB/s", "plain copy GB/s", "share"):
        table.add_column(name, justify="left" if name == "source" else "right")
    for r in records:
        table.add_row(r.metric, f"{r.value:.2f}", f"{r.baseline:.2f}", f"{r.ratio:.0%}")
    Console(highlight=False, width=110).print(table, markup=False)


class PlainSocket:
    """Sends the same bytes to whoever connects: what a socket alone can do."""

    def __init__(self, data: np.ndarray):
        self._data = data.reshape(-1).view(np.uint8)
        self._socket = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._serve, daemon=True).start()

    def receive(self) -> np.ndarray:
        found, done = np.empty(self._data.nbytes, np.uint8), 0
        with socket.create_connection(self._socket.getsockname(), 30) as connection:
            while done < found.nbytes:
                received = connection.recv_into(memoryview(found)[done:])
                if not received:
                    raise ConnectionError("the plain socket closed too early")
                done += received
        return found

    def close(self) -> None:
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                connection.sendall(self._data)


if __name__ == "__main__":
    define_flags()
    sys.exit(app.run(flags.main_with_usage(main)))
