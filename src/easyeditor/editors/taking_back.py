"""Which facts of an edit a person means, and the edit without them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from easyeditor.core.take_back import without_facts
from easyeditor.edits.edit import Edit, WeightEdit
from easyeditor.edits.health import health
from easyeditor.edits.ledger import Ledger
from easyeditor.errors import UsageError
from easyeditor.lm.model import LM
from easyeditor.requests import EditRequest


def facts_named(edit: Edit, key: str | EditRequest) -> list[int]:
    """The requests of an edit that a key names: by fact, prompt or new answer, the most exact that there is.

    Args:
        edit: The edit.
        key: ``prompt -> target_new``, a prompt, a new answer, or a request.

    Returns:
        Their numbers; empty if there are none.
    """
    if isinstance(key, EditRequest):
        key = f"{key.prompt} -> {key.target_new}"
    prompts = [str(request["prompt"]) for request in edit.requests]
    for names in (edit.facts, prompts, edit.targets):
        if found := [i for i, name in enumerate(names) if name == key]:
            return found
    return []


def smaller(edit: Edit, facts: Collection[int]) -> WeightEdit:
    """An edit without some of its facts; see `easyeditor.core.take_back.without_facts`.

    Args:
        edit: The edit.
        facts: Which of its requests to take out, by number; not all of them.

    Raises:
        UsageError: The edit cannot be taken apart.
    """
    if not isinstance(edit, WeightEdit):
        raise UsageError(
            f"The edit {edit.id} ({edit.method}) changes {len(edit.requests)} facts together and cannot be taken "
            f"apart. Take it back as a whole by its id: rollback('{edit.id}')."
        )
    return without_facts(edit, set(facts))


def take_back(lm: LM, key: str | Edit | EditRequest) -> tuple[list[Edit], dict[str, str | None]]:
    """Take edits or single facts off a model.

    Args:
        lm: The model.
        key: See `easyeditor.editors.base.BaseEditor.rollback`.

    Returns:
        The edits that were taken back, as they were, and what stands in the place of each: its id -> that of the edit
        without the facts, or None.

    Raises:
        UsageError: No edit on the model has this id or fact, or its method cannot take one out; nothing changes.
    """
    ledger = Ledger.of(lm)
    wanted = key.id if isinstance(key, Edit) else key
    if whole := [edit for edit in ledger.active if edit.id == wanted]:
        rests: list[tuple[Edit, WeightEdit | None]] = [(edit, None) for edit in whole]
    else:
        named = [(edit, facts) for edit in ledger.active if (facts := facts_named(edit, wanted))]
        rests = [(edit, smaller(edit, facts) if len(facts) < len(edit.requests) else None) for edit, facts in named]
    if not rests:
        there = ", ".join(f"{e.id} ({'; '.join(e.facts[:3])})" for e in ledger.active) or "none"
        raise UsageError(f"No edit on the model has the id or the fact '{wanted}'. Edits on it: {there}.")
    standing: dict[str, str | None] = {}
    for edit, rest in rests:
        standing[edit.id] = put_instead(lm, edit, rest) if rest is not None else None
        if rest is None:
            ledger.undo(edit.id)
    return [edit for edit, _ in rests], standing


def put_instead(lm: LM, edit: Edit, left: WeightEdit) -> str:
    """Put in the place of an edit what is left of it.

    Args:
        lm: The model, with the edit on it.
        edit: The edit.
        left: What `smaller` made of it.

    Returns:
        The id of what stands in its place.
    """
    ledger = Ledger.of(lm)
    new_id = ledger.replace(edit.id, left)
    notes = {**left.notes, "health": health(lm, left, applied=True)}
    notes.pop("solved", None)
    return ledger.replace(new_id, dataclasses.replace(left, notes=notes))
