"""The parts of a run, done on one model.

A killed run goes on where it was. Steps that are independent are skipped when their cases are in the log. Of a
sequential row the edits of all finished steps are in the run folder; they are put back in their order, so that what
follows is what it would have been.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from easyeditor.bench.controls import faults
from easyeditor.bench.folder import lines_of
from easyeditor.bench.job import Job, Part
from easyeditor.bench.log import Line
from easyeditor.bench.plan import Plan, facts_of
from easyeditor.bench.scoring import Scoring
from easyeditor.edits.ledger import Ledger
from easyeditor.errors import UsageError
from easyeditor.hparams import complete
from easyeditor.lm.model import LM
from easyeditor.requests import EditRequest

log = logging.getLogger(__name__)


class Runner:
    """Does the parts of a run on one model.

    Args:
        plan: The run.
        pool: The facts that it chooses from.
        lm: The model; it carries no edits, and is left without any.
        folder: Of the run.
        writer: Ends the names of the files that this runner writes; each process has its own.

    Raises:
        UsageError: There are edits on the model.
    """

    def __init__(self, plan: Plan, pool: Sequence[EditRequest], lm: LM, folder: Path, writer: str = "") -> None:
        if Ledger.of(lm).active:
            raise UsageError("There are edits on the model, and a run begins without. Take them back first: reset().")
        self.plan, self.pool, self.lm, self.folder, self.writer = plan, pool, lm, folder, writer
        lm.text.chat = plan.chat
        self.scoring = Scoring(plan, lm, folder, writer)

    def header(self) -> dict[str, Any]:
        """What makes this run the run that it is; see `easyeditor.bench.folder.opened`.

        Raises:
            UsageError: The settings of a method do not fit the model.
        """
        facts = {key: value for key, value in self.lm.facts().items() if value is not None}
        about = {"name": self.lm.name, "fingerprint": self.scoring.fingerprint, "dtype": str(self.lm.dtype), **facts}
        full = {name: complete(self.plan.hparams(name, 0), self.lm).to_dict() for name in self.plan.methods}
        rows = [vars(row) for row in self.plan.rows()]
        return {
            "plan": self.plan.to_dict(),
            "model": about,
            "protocol": self.plan.protocol(),
            "rows": rows,
            "settings": full,
        }

    def job(self, part: Part) -> Job:
        """A part with what is missing of it."""
        facts = facts_of(part.row, self.pool, self.plan.n, part.seed)
        return Job(part, self.plan, facts, self.folder, self.writer)

    def work(self, part: Part) -> Iterator[Line]:
        """Do a part, as far as it has not been done; see `Job.work`."""
        yield from self.job(part).work(self.scoring)
        if part.row.control == "no-op":
            self._warn_of_faults(part)

    def _warn_of_faults(self, part: Part) -> None:
        lines = [line for line in lines_of(self.folder, part.row.name, part.seed) if line["kind"] == "case"]
        known = self.scoring.before.known
        for fault in faults((known[line["fact"]], line["post"]) for line in lines if line["fact"] in known):
            log.warning("%s", fault)


def parts_of(plan: Plan, pieces: int = 1) -> list[Part]:
    """The work of a run, controls first.

    Args:
        plan: The run.
        pieces: Into how many pieces independent steps are divided.
    """
    found = []
    for row in plan.rows():
        for seed in range(plan.seeds):
            how = Part(row, seed, range(0)).how(plan)
            steps = len(how.steps(plan.n))
            size = steps if how.stays else -(-steps // max(pieces, 1))
            found += [Part(row, seed, range(i, min(i + size, steps))) for i in range(0, steps, size)]
    return found
