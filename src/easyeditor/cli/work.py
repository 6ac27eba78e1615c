"""An edit with its questions asked before and after: what `easyedit edit` and `easyedit demo` do."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from easyeditor.cli.common import waiting
from easyeditor.cli.report import Answered, questions

if TYPE_CHECKING:
    from easyeditor.edits.edit import Edit
    from easyeditor.hparams import HyperParams
    from easyeditor.lm.model import LM
    from easyeditor.requests import EditRequest


@dataclass(frozen=True)
class Outcome:
    """What came of an edit.

    Args:
        lm: The model, with the edits on it.
        method: The method's name.
        model: The model's name.
        facts: How many facts were changed.
        edits: The edits, in the order in which they were made.
        answered: The questions with their answers.
        seconds: How long the edits took, without loading and asking.
    """

    lm: LM
    method: str
    model: str
    facts: int
    edits: list[Edit]
    answered: list[Answered]
    seconds: float


def carry_out(hparams: HyperParams, requests: Sequence[EditRequest]) -> Outcome:
    """Load the model, ask, edit, and ask again; the edits stay on the model.

    Args:
        hparams: The method's settings.
        requests: The facts.

    Raises:
        EasyEditError: The facts, the settings or the model do not fit each other, or the edit failed.
    """
    from easyeditor.registry import get_method

    spec = get_method(hparams.alg_name)
    for request in requests:
        request.require(spec.needs, spec.name)

    from easyeditor.editors.base import BaseEditor

    from easyeditor.lm.generate import answer

    with waiting("Loading the model"):
        editor = BaseEditor.from_hparams(hparams)
    asked = questions(requests)
    prompts = [question.prompt for question in asked]
    with waiting("Asking before the edit"):
        before = answer(editor.lm, prompts, hparams.max_new_tokens)
    start = time.perf_counter()
    with waiting(f"Editing {len(requests)} fact(s)"):
        edits = editor.apply(requests)
    seconds = time.perf_counter() - start
    with waiting("Asking after the edit"):
        after = answer(editor.lm, prompts, hparams.max_new_tokens)
    answered = [Answered(*triple) for triple in zip(asked, before, after, strict=True)]
    return Outcome(editor.lm, spec.name, editor.lm.name, len(requests), edits, answered, seconds)
