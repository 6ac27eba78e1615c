"""Taking single facts back out of an edit of many: what solving without them would have given."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from torch import Tensor

from easyeditor.core.solve import quality_of, without
from easyeditor.edits.delta import Delta, LowRank
from easyeditor.edits.edit import WeightEdit
from easyeditor.errors import UsageError


def without_facts(edit: WeightEdit, facts: Collection[int]) -> WeightEdit:
    """An edit of many facts without some of them.

    At each weight the system is solved again for the other facts, with their keys and residuals as they were, by
    down-dating its factor; no model is run.

    Args:
        edit: The edit, of a method that solves for all facts at once.
        facts: Which of its requests to take out, by number.

    Returns:
        The new edit.

    Raises:
        UsageError: The edit cannot be taken apart, or a fact shares its value with one that is to stay.
    """
    columns = _columns(edit, facts)
    deltas: dict[str, Delta] = dict(edit.deltas)
    keys, residuals, factors = dict(edit.keys), dict(edit.residuals), dict(edit.factors)
    solved: dict[str, dict[str, float]] = {}
    for name, delta in edit.deltas.items():
        assert isinstance(delta, LowRank)
        r, factor = residuals[name], factors[name]
        for column in sorted(columns, reverse=True):
            delta, r, factor = without(delta, r, factor, column)
        deltas[name], residuals[name], factors[name] = delta, r, factor
        keys[name] = _without_columns(keys[name], columns)
        solved[name] = quality_of(delta, keys[name], r.double(), factor)
    kept = [i for i in range(len(edit.requests)) if i not in facts]
    notes = {key: value for key, value in edit.notes.items() if key not in ("health", "losses", "shared")}
    notes["solved"] = solved
    if "losses" in edit.notes:
        notes["losses"] = [trace for c, trace in enumerate(edit.notes["losses"]) if c not in columns]
    if "shared" in edit.notes:
        place = {c: n for n, c in enumerate(sorted({edit.notes["shared"][i] for i in kept}))}
        notes["shared"] = [place[edit.notes["shared"][i]] for i in kept]
    return dataclasses.replace(
        edit,
        deltas=deltas,
        keys=keys,
        residuals=residuals,
        factors=factors,
        requests=tuple(edit.requests[i] for i in kept),
        scores={},
        notes=notes,
    )


def _columns(edit: WeightEdit, facts: Collection[int]) -> set[int]:
    """Which columns of the systems facts stand for."""
    shared: list[int] = list(edit.notes.get("shared", range(len(edit.requests))))
    columns = {shared[i] for i in facts}
    for i, column in enumerate(shared):
        if column in columns and i not in facts:
            raise UsageError(
                f"'{edit.facts[i]}' shares its value with the fact to be taken back (merge_same_subject). "
                "Take back all facts of the subject, or the whole edit."
            )
    if set(edit.factors) != set(edit.deltas) or not edit.factors:
        raise UsageError(
            f"The edit {edit.id} ({edit.method}) changes {len(edit.requests)} facts together and cannot be taken "
            f"apart. Take it back as a whole by its id, rollback('{edit.id}'), and make it again without the fact."
        )
    return columns


def _without_columns(matrix: Tensor, columns: Collection[int]) -> Tensor:
    return matrix[:, [c for c in range(matrix.shape[1]) if c not in columns]]
