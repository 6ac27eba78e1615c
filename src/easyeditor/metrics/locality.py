"""Kinds of locality: near, far and distracting, told by the name of a group of probes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

KINDS = MappingProxyType(
    {
        "distracting": ("distract",),
        "far": ("far", "forget", "unrelated", "random", "nq", "loc_hop", "general", "other_question"),
        "near": ("near", "neighbo", "specific", "same_relation", "attribute", "subject", "prerequisite", "coupled"),
    }
)


def kind(name: str) -> str | None:
    """Near (what stands beside the fact), far (anything else) or distracting (the edit is said first).

    Args:
        name: Of a group of locality probes, such as ``neighborhood``, ``Forgetfulness``, ``distracting_neighbor``.

    Returns:
        ``near``, ``far`` or ``distracting``; None for a name that does not tell.
    """
    folded = name.casefold()
    return next((known for known, parts in KINDS.items() if any(part in folded for part in parts)), None)


def by_kind(scores: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[float | None]]]:
    """Collect the locality values of measurements by kind.

    Args:
        scores: Measurements that `compare_locality` has seen, such as the ``post`` of records.

    Returns:
        Kind (``other`` for names that do not tell) -> ``acc``, ``gen``, ``js`` -> values.
    """
    out: dict[str, dict[str, list[float | None]]] = {}
    for measured in scores:
        for key, values in measured["locality"].items():
            name, _, unit = key.rpartition("_")
            if unit in ("acc", "gen", "js"):
                out.setdefault(kind(name) or "other", {}).setdefault(unit, []).extend(values)
    return out
