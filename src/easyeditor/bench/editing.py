"""What edits in a row of a run: a method with its settings and state, or a control."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from easyeditor.bench.controls import in_prompt, no_op
from easyeditor.bench.plan import Plan, Row
from easyeditor.editors.perform import make_edit, prepared, put_on
from easyeditor.edits.edit import Edit
from easyeditor.edits.ledger import Ledger
from easyeditor.errors import EasyEditError
from easyeditor.hparams import HyperParams, complete
from easyeditor.lm.clock import now, spent
from easyeditor.lm.model import LM
from easyeditor.registry import get_method
from easyeditor.requests import EditRequest


@dataclass
class Outcome:
    """What came of a step.

    Args:
        edits: The edits that are on the model now.
        errors: Position in the step -> why there is no edit of that fact.
    """

    edits: list[Edit] = field(default_factory=list)
    errors: dict[int, str] = field(default_factory=dict)


class Editing:
    """Edits facts for a row and a seed; what a method needs once is prepared when it is built.

    Args:
        lm: The model without edits.
        row: The row.
        plan: The run.
        seed: The seed.

    Attributes:
        preparation: Seconds of the preparation.
        settings: The complete settings of the method; empty for a control.
    """

    def __init__(self, lm: LM, row: Row, plan: Plan, seed: int) -> None:
        self.lm, self.row = lm, row
        self.spec = get_method(row.method) if row.method else None
        self.state: Mapping[str, Any] = {}
        self.hparams: HyperParams | None = None
        start = now()
        if self.spec is not None:
            self.hparams = complete(plan.hparams(self.spec.name, seed), lm)
            self.state = prepared(lm, self.spec, self.hparams)
        self.preparation = now() - start
        self.settings = self.hparams.to_dict() if self.hparams is not None else {}

    def __call__(self, facts: Sequence[EditRequest]) -> Outcome:
        """Edit facts and leave the edits on; a fact that cannot be edited is noted, and the others go on."""
        together = self.spec is not None and self.spec.requests == "many"
        out = Outcome()
        for group in [range(len(facts))] if together else [range(i, i + 1) for i in range(len(facts))]:
            try:
                out.edits.append(self._put([facts[i] for i in group]))
            except OSError:  # a full disk is no property of the fact
                raise
            except Exception as error:
                out.errors |= dict.fromkeys(group, sentence(error))
        return out

    def _put(self, facts: Sequence[EditRequest]) -> Edit:
        if self.spec is not None and self.hparams is not None:
            edit = make_edit(self.lm, self.spec, facts, self.hparams, self.state)
            put_on(self.lm, edit, facts)
            return edit
        edit = in_prompt(facts[0]) if self.row.in_context else no_op(self.lm, facts[0])
        with spent("apply"):
            Ledger.of(self.lm).apply(edit)
        return edit


def sentence(error: Exception) -> str:
    """An error on one line."""
    text = " ".join(str(error).split()) or "no message"
    return text if isinstance(error, EasyEditError) else f"An unexpected {type(error).__name__}: {text}"
