"""What is left of earlier edits: of the facts that held right after their edit, those that hold later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def retention(
    after: Sequence[Mapping[str, Any]], later: Sequence[Mapping[str, Any]], score: str = "rewrite_gen"
) -> list[float | None]:
    """Compare each request's measurement right after its edit with a later one.

    Args:
        after: Measurements, each made right after the edit of its request.
        later: Measurements of the same requests, made on one later model.
        score: Which score; a list of several values counts as held where all of them are 1.

    Returns:
        Per request 1.0 if it still holds, 0.0 if it was lost, None if it did not hold in the first place.
    """
    pairs = zip(after, later, strict=True)
    return [float(_holds(new.get(score))) if _holds(old.get(score)) else None for old, new in pairs]


def _holds(values: Sequence[float | None] | None) -> bool:
    return bool(values) and all(value == 1.0 for value in values or ())
