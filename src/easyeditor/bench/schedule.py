"""Schedules: which facts are edited together, and whether edits stay."""

from __future__ import annotations

import re
from dataclasses import dataclass

from easyeditor.errors import UsageError

KINDS = ("single", "batch", "sequential")


@dataclass(frozen=True)
class Schedule:
    """How the facts of a run are worked through.

    Args:
        kind: ``single``: each fact on the unedited model, then taken back; ``batch``: so many facts at once, then taken
            back; ``sequential``: all edits stay.
        size: Facts per step.
    """

    kind: str
    size: int = 1

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """The schedule that a text names: ``single``, ``batch:100``, ``sequential:1``.

        Raises:
            UsageError: It names none.
        """
        match = re.fullmatch(r"(single)|(batch|sequential):(\d+)", text.strip().lower())
        if match is None or (match[3] is not None and int(match[3]) < 1):
            raise UsageError(
                f"There is no schedule '{text}'. Pass single, batch:N or sequential:N, N being the facts per edit, "
                "such as batch:100 or sequential:1."
            )
        return cls("single") if match[1] else cls(match[2], int(match[3]))

    def __str__(self) -> str:
        return self.kind if self.kind == "single" else f"{self.kind}:{self.size}"

    @property
    def stays(self) -> bool:
        """Whether edits stay on the model."""
        return self.kind == "sequential"

    def steps(self, n: int) -> list[range]:
        """The facts of each step, by position."""
        return [range(i, min(i + self.size, n)) for i in range(0, n, self.size)]

    def checkpoints(self, n: int, count: int) -> list[int]:
        """After how many facts all earlier ones are scored again: evenly spread, the last at the end.

        Args:
            n: The facts of the run.
            count: How many checkpoints, at most one per step.
        """
        if not self.stays:
            return []
        ends = [step.stop for step in self.steps(n)]
        wanted = min(count, len(ends))
        return [ends[-(-i * len(ends) // wanted) - 1] for i in range(1, wanted + 1)]

    def protocol(self, n: int) -> str:
        """The schedule in words, with what numbers depend on."""
        if self.kind == "single":
            return "each fact edited alone on the unedited model"
        size = min(self.size, n)
        facts = "1 fact" if size == 1 else f"{size} facts"
        if self.kind == "batch":
            return f"{facts} edited at once on the unedited model"
        return f"{n} facts, {facts} per edit, all edits stay"
