"""Before and after: the questions that an edit is about, and what was answered to them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.table import Table

from easyeditor.cli.common import table

if TYPE_CHECKING:
    from easyeditor.requests import EditRequest

EDITED, PARAPHRASE, FOLLOWS, NEIGHBOUR = "edited", "paraphrase", "follows", "neighbour"


class Answered(NamedTuple):
    """A question with what was said before and after.

    Args:
        fact: The position of its fact among those edited.
        kind: What it is to the edit.
        prompt: The text in front of the answer.
        before: The answer of the untouched model.
        after: The answer with the edits on it.
        as_wanted: Whether that is the new answer, or the old one for a neighbour; None if nobody can say.
    """

    fact: int
    kind: str
    prompt: str
    before: str
    after: str
    as_wanted: bool | None


def answered(requests: Sequence[EditRequest], records: Sequence[Mapping[str, Any]]) -> list[Answered]:
    """What was asked and answered about each fact.

    Args:
        requests: The facts.
        records: What the editor recorded of them, in the same order.
    """
    found: list[Answered] = []
    for i, (request, record) in enumerate(zip(requests, records, strict=True)):
        before, after = record["pre"], record.get("final", record["post"])
        groups = [(EDITED, "rewrite", [request.prompt], before, after)]
        groups.append((PARAPHRASE, "rephrase", list(request.rephrase_prompts), before, after))
        for kind, name, named in (
            (FOLLOWS, "portability", request.portability),
            (NEIGHBOUR, "locality", request.locality),
        ):
            groups += [
                (kind, key, [p.prompt for p in probes], before[name], after[name]) for key, probes in named.items()
            ]
        for kind, key, prompts, old, new in groups:
            if prompts:
                found += [Answered(i, kind, *each) for each in _texts(key, prompts, old, new)]
    return found


def comparison(rows: Sequence[Answered]) -> Table:
    """A table of questions with the answers before and after."""
    marks = {True: "yes", False: "no", None: None}
    cells = [(a.kind, a.prompt, a.before or "(nothing)", a.after or "(nothing)", marks[a.as_wanted]) for a in rows]
    return table("", ("question", "prompt", "before", "after", "as wanted"), cells)


def _texts(
    key: str, prompts: list[str], old: Mapping[str, Any], new: Mapping[str, Any]
) -> Iterator[tuple[str, str, str, bool | None]]:
    said = zip(prompts, old[f"{key}_gen_content"], new[f"{key}_gen_content"], new[f"{key}_gen"], strict=True)
    for prompt, before, after, good in said:
        yield prompt, before, after, None if good is None else bool(good)
