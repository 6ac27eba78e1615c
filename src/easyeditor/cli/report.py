"""Before and after: the questions that an edit is about, and what was answered to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.table import Table

from easyeditor.cli.common import table

if TYPE_CHECKING:
    from easyeditor.requests import EditRequest

EDITED, PARAPHRASE, FOLLOWS, NEIGHBOUR = "edited", "paraphrase", "follows", "neighbour"


@dataclass(frozen=True)
class Question:
    """Something that is asked before and after.

    Args:
        fact: The position of its fact among those edited.
        kind: What it is to the edit.
        prompt: The text in front of the answer.
        wanted: The answers that are right after the edit; empty: whatever was said before.
    """

    fact: int
    kind: str
    prompt: str
    wanted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answered:
    """A question with what was said before and after, and whether that is as it should be."""

    question: Question
    before: str
    after: str

    @property
    def good(self) -> bool:
        """Whether the new answer was given, or, for a neighbour, the old one kept."""
        wanted = self.question.wanted or (self.before,)
        return any(_same(self.after, answer) for answer in wanted)


def questions(requests: Sequence[EditRequest]) -> list[Question]:
    """What to ask about some facts: the edited prompt, its paraphrases, and the probes beside it."""
    found: list[Question] = []
    for i, request in enumerate(requests):
        found.append(Question(i, EDITED, request.prompt, (request.target_new,)))
        found += [Question(i, PARAPHRASE, prompt, (request.target_new,)) for prompt in request.rephrase_prompts]
        for probes in request.portability.values():
            found += [Question(i, FOLLOWS, probe.prompt, probe.answers) for probe in probes]
        for probes in request.locality.values():
            found += [Question(i, NEIGHBOUR, probe.prompt) for probe in probes]
    return found


def comparison(answered: Sequence[Answered]) -> Table:
    """A table of questions with the answers before and after."""
    rows = [
        (a.question.kind, a.question.prompt, a.before or "(nothing)", a.after or "(nothing)", "yes" if a.good else "no")
        for a in answered
    ]
    return table("", ("question", "prompt", "before", "after", "as wanted"), rows)


def as_document(answered: Sequence[Answered]) -> list[dict[str, object]]:
    """The same for machines."""
    return [
        {
            "fact": a.question.fact,
            "kind": a.question.kind,
            "prompt": a.question.prompt,
            "before": a.before,
            "after": a.after,
            "as_wanted": a.good,
        }
        for a in answered
    ]


def _same(said: str, answer: str) -> bool:
    return said.strip(" .\n").casefold() == answer.strip(" .\n").casefold()
