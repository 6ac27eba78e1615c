"""An edit with its questions asked before and after: what `easyedit edit` and `easyedit demo` do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from easyeditor.cli.common import waiting
from easyeditor.cli.report import Answered, answered

if TYPE_CHECKING:
    from easyeditor.edits.edit import Edit
    from easyeditor.hparams import HyperParams
    from easyeditor.lm.model import LM
    from easyeditor.registry import MethodSpec
    from easyeditor.requests import EditRequest


@dataclass(frozen=True)
class Outcome:
    """What came of an edit.

    Args:
        lm: The model, with the edits on it.
        spec: The method.
        facts: How many facts were changed.
        edits: The edits with their scores, in the order in which they were made.
        answers: What was answered before and after.
        seconds: How long the edits took, without loading and asking.
    """

    lm: LM
    spec: MethodSpec
    facts: int
    edits: list[Edit]
    answers: list[Answered]
    seconds: float


def carry_out(hparams: HyperParams, requests: Sequence[EditRequest]) -> Outcome:
    """Load the model, ask, edit, and ask again; all edits stay on the model.

    Args:
        hparams: The method's settings.
        requests: The facts.

    Raises:
        EasyEditError: The facts, the settings or the model do not fit each other, or an edit failed.
    """
    from easyeditor.editors.base import BaseEditor
    from easyeditor.editors.perform import checked
    from easyeditor.editors.progress import tracked
    from easyeditor.editors.summary import summarise

    editor = BaseEditor.from_hparams(hparams)
    checked(requests, editor.spec)
    with waiting("Loading the model"):
        lm = editor.lm
    edits: list[Edit] = []
    stream = editor.stream(requests, sequential_edit=len(requests) > 1, edits=edits)
    records = list(tracked(stream, len(requests), f"{editor.spec.name} on {lm.name}"))
    scored = [
        replace(edit, scores={name: score["mean"] for name, score in summarise([record])["post"].items()})
        for edit, record in zip(edits, records, strict=True)
    ]
    seconds = sum(record["time"] for record in records)
    return Outcome(lm, editor.spec, len(requests), scored, answered(requests, records), seconds)
