"""One row with one seed, from its first fact to its last; what is on the disk already is not done again."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easyeditor.bench.before import PART, Scores
from easyeditor.bench.cost import Cost, bytes_of, latency, measured
from easyeditor.bench.editing import Editing, Outcome, sentence
from easyeditor.bench.folder import lines_of, place_of
from easyeditor.bench.log import Line, Log
from easyeditor.bench.plan import Plan, Row, key_of
from easyeditor.bench.schedule import Schedule
from easyeditor.bench.scoring import Scoring
from easyeditor.edits.edit import Edit
from easyeditor.edits.ledger import Ledger
from easyeditor.edits.store import load_edits, save_edits
from easyeditor.errors import DamagedFile
from easyeditor.lm.clock import now
from easyeditor.requests import EditRequest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """A piece of work that needs no other: some steps of a row with a seed; all of them if edits stay.

    Args:
        row: The row.
        seed: The seed.
        steps: Which steps.
    """

    row: Row
    seed: int
    steps: range

    def how(self, plan: Plan) -> Schedule:
        """The schedule: the unedited model and the fact in the prompt have each case by itself.

        Zeros are put on one by one all the same, but many are scored together: there is nothing to be seen in between.
        """
        if self.row.control == "no-op":
            return Schedule("sequential" if plan.how.stays else "batch", max(PART, plan.how.size))
        return Schedule("single") if self.row.control in ("unedited", "prompt") else plan.how


class Job:
    """Does a part.

    Args:
        part: The part.
        plan: The run.
        facts: The facts of the row and the seed, in their order.
        folder: Of the run.
        writer: Ends the name of the log that is written.
    """

    def __init__(self, part: Part, plan: Plan, facts: Sequence[EditRequest], folder: Path, writer: str = "") -> None:
        self.part, self.plan, self.facts = part, plan, facts
        self.how = part.how(plan)
        self.place = place_of(folder, part.row.name, part.seed)
        self.log = Log(self.place / f"log{writer}.jsonl")
        self.ends = self.how.checkpoints(plan.n, 1 if part.row.control else plan.checkpoints)
        steps = self.how.steps(plan.n)
        self.cases = {i for step in part.steps for i in steps[step]}
        self.again = {(end, i) for end in self.ends for i in range(end)}
        self.able = bool(plan.tasks) and 0 in part.steps  # whether capability is still to be measured
        self.made: dict[int, list[str]] = {}  # step -> the ids of its edits
        for line in lines_of(folder, part.row.name, part.seed):
            if line["kind"] == "case":
                self.cases.discard(line["case"])
                self.made[line["step"]] = line["edits"]
            elif line["kind"] == "checkpoint":
                self.again.discard((line["edited"], line["case"]))
            elif line["kind"] == "capability":
                self.able = False

    @property
    def missing(self) -> int:
        """How many lines are still to be made: cases, cases at checkpoints, capability."""
        return len(self.cases) + len(self.again) + self.able

    def work(self, scoring: Scoring) -> Iterator[Line]:
        """Do what is missing; the model is left without edits.

        Args:
            scoring: How facts are scored, and on which model.

        Yields:
            Each line after it has been written.

        Raises:
            EditFailed: The run folder cannot be written; what is in it is safe.
            DamagedFile: A file of it is not what was written.
        """
        if not self.missing:
            self._clear()  # a kill may have come between the last line and this
            return
        try:
            yield from self._unedited(scoring) if self.part.row.control == "unedited" else self._edited(scoring)
        finally:
            Ledger.of(scoring.lm).reset()

    def _unedited(self, scoring: Scoring) -> Iterator[Line]:
        """The answers before are those of the unedited model."""
        if self.able:  # first: tasks that cannot be had end the run before any work
            yield self._capability(scoring)
        wanted = sorted(self.cases)
        for start in range(0, len(wanted), PART):
            some = wanted[start : start + PART]
            (before,) = scoring.before.of([self.facts[i] for i in some])
            lines = [self._case(i, i, scoring.against(old, old)) for i, old in zip(some, before, strict=True)]
            self.log.append(lines)
            yield from lines

    def _edited(self, scoring: Scoring) -> Iterator[Line]:
        lm, stays = scoring.lm, self.how.stays
        mine = sorted({i for step in self.part.steps for i in self.how.steps(self.plan.n)[step]})
        found = (scores for some in scoring.before.of([self.facts[i] for i in mine]) for scores in some)
        before = dict(zip(mine, found, strict=True))
        try:
            editing = Editing(lm, self.part.row, self.plan, self.part.seed)
        except OSError:  # a full disk is no property of the method
            raise
        except Exception as error:
            log.warning("%s is left out: %s", self.part.row.name, sentence(error))
            self.log.append([{"kind": "row", "error": sentence(error)}])
            return
        about: dict[str, Any] = {"kind": "row", "preparation": editing.preparation, "settings": editing.settings}
        for step, places in enumerate(self.how.steps(self.plan.n)):
            if step not in self.part.steps:
                continue
            if not self.cases.isdisjoint(places):
                yield from self._step(scoring, editing, step, places, before)
            elif stays:
                self._put_back(scoring, step)
            elif self.able:  # a kill came between the step's cases and this
                editing([self.facts[i] for i in places])
            if places.stop in self.ends:
                yield from self._checkpoint(scoring, before, places.stop)
            last = step == self.part.steps[-1]
            if Ledger.of(lm).active and (last or not stays):
                if "latency" not in about:
                    about["latency"] = latency(lm, self.facts[places.start].prompt)
                    about["perplexity"] = scoring.damage()
                if self.able:
                    yield self._capability(scoring)
            if not stays:
                Ledger.of(lm).reset()
        if self.able:
            yield self._told({"unscored": "There is no edit whose capability could be measured."})
        self.log.append([about])
        self._clear()

    def _step(
        self, scoring: Scoring, editing: Editing, step: int, places: range, before: Mapping[int, Scores]
    ) -> Iterator[Line]:
        """Edit the facts of a step and score them; the edits stay on."""
        facts = [self.facts[i] for i in places]
        with measured(scoring.lm) as cost:
            outcome = editing(facts)
        cost.nbytes = bytes_of(outcome.edits)
        if self.how.stays and outcome.edits:
            save_edits(outcome.edits, self._kept(step), force=True)
        start = now()
        posts = scoring.compared(facts, [before[i] for i in places])
        cost.seconds["scoring"] = now() - start
        lines = [
            self._case(i, step, post, cost, outcome, places)
            for i, post in zip(places, posts, strict=True)
            if i in self.cases
        ]
        self.log.append(lines)
        yield from lines

    def _checkpoint(self, scoring: Scoring, before: Mapping[int, Scores], end: int) -> Iterator[Line]:
        """Score all facts that have been edited so far once more."""
        wanted = [i for i in range(end) if (end, i) in self.again]
        for start in range(0, len(wanted), PART):
            some = wanted[start : start + PART]
            scores = scoring.compared([self.facts[i] for i in some], [before[i] for i in some])
            about = {"kind": "checkpoint", "edited": end}
            lines = [{**about, "case": i, "post": each} for i, each in zip(some, scores, strict=True)]
            self.log.append(lines)
            yield from lines

    def _capability(self, scoring: Scoring) -> Line:
        """Score tasks on the model with the edits that are on it."""
        return self._told(scoring.capability())

    def _told(self, scores: Scores) -> Line:
        line = {"kind": "capability", "scores": scores}
        self.log.append([line])
        self.able = False
        return line

    def _put_back(self, scoring: Scoring, step: int) -> None:
        """Put the edits of a finished step on, as they were."""
        wanted = self.made[step]
        edits: list[Edit] = load_edits(self._kept(step)) if wanted else []
        if [edit.id for edit in edits] != wanted:
            raise DamagedFile(
                f"'{self._kept(step)}' does not hold the edits of step {step} of {self.part.row.name}. Restore it from "
                f"a copy, or delete '{self.place}' to run this row again."
            )
        for edit in edits:
            Ledger.of(scoring.lm).apply(edit)

    def _clear(self) -> None:
        """Delete the edits of a finished row, which nobody needs any more."""
        shutil.rmtree(self.place / "edits", ignore_errors=True)

    def _kept(self, step: int) -> Path:
        return self.place / "edits" / f"{step:06d}"

    def _case(
        self,
        place: int,
        step: int,
        post: Scores,
        cost: Cost | None = None,
        outcome: Outcome | None = None,
        places: range = range(1),
    ) -> Line:
        fact, found = self.facts[place], outcome or Outcome()
        line = {
            "kind": "case",
            "case": place,
            "case_id": place if fact.case_id is None else fact.case_id,
            "step": step,
            "fact": key_of(fact),
            "requested_rewrite": fact.to_dict(),
            "post": post,
            "edits": [edit.id for edit in found.edits],
        }
        if (error := found.errors.get(place - places.start)) is not None:
            line["error"] = error
        return line | ({"cost": cost.share(len(places))} if cost is not None else {})
