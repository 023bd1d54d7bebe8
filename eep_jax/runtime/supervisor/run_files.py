"""Files of a run directory as its supervisor opens them: ownership, then the journal."""

import dataclasses
import pathlib

from eep_jax.config import RunConfig
from eep_jax.errors import RunDirError
from eep_jax.runtime.control.endpoint import JOURNAL
from eep_jax.runtime.control.run_owner import RunOwner, check_free, claim
from eep_jax.runtime.history.journal import Journal
from eep_jax.runtime.history.journal_format import read_journal
from eep_jax.runtime.history.recovery import Restored, read_back
from eep_jax.runtime.history.run_facts import differences, run_facts


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """An opened run directory; `before` is the state that its journal holds."""

    owner: RunOwner
    journal: Journal
    before: Restored

    def close(self) -> None:
        self.journal.close()
        self.owner.release()


def open_run(run_dir: pathlib.Path, config: RunConfig) -> RunFiles:
    """Claims a run directory and reads its journal.

    Raises:
        RunDirError: Another supervisor owns the directory, its run has another configuration, or
            its journal cannot be read.
        OSError: The directory cannot be written.
    """
    owner = claim(run_dir)
    try:
        before = read_back(_records_for(run_dir, config), config)
        return RunFiles(owner, Journal(run_dir / JOURNAL, run_facts(config)), before)
    except BaseException:
        owner.release()
        raise


def check_can_open(run_dir: pathlib.Path, config: RunConfig) -> None:
    """Raises RunDirError where `open_run` would for the owner, the configuration or the format."""
    check_free(run_dir)
    _records_for(run_dir, config)


def _records_for(run_dir: pathlib.Path, config: RunConfig) -> list[dict]:
    found = read_journal(run_dir / JOURNAL)
    if changed := differences(found.config, run_facts(config)):
        raise RunDirError(
            f"{run_dir} holds a run of another configuration: {'; '.join(changed)}. Start it with "
            f"that one, take another directory, or move {run_dir / JOURNAL} away to begin a new "
            "run, which forgets the requests in it"
        )
    return found.records
