"""Files of a run directory as its supervisor opens them: ownership, then the journal."""

import dataclasses
import pathlib

from eep_jax.config import RunConfig
from eep_jax.errors import RunDirError
from eep_jax.runtime.control.endpoint import JOURNAL
from eep_jax.runtime.control.run_owner import RunOwner, claim
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
        path, facts = run_dir / JOURNAL, run_facts(config)
        found = read_journal(path)
        if changed := differences(found.config, facts):
            raise RunDirError(
                f"{run_dir} holds a run of another configuration: {'; '.join(changed)}. Start it "
                f"with that one, take another --run_dir, or move {path} away to begin a new run, "
                "which forgets the requests in it"
            )
        before = read_back(found.records, config)
        return RunFiles(owner, Journal(path, facts), before)
    except BaseException:
        owner.release()
        raise
