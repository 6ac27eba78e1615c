"""The keyword arguments that existing scripts pass: which call knows which, and what they mean here."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from easyeditor.errors import UnknownArgument, UsageError, did_you_mean

OPTIONS = MappingProxyType(
    {
    "edit": ("test_generation", "requests", "subject", "loc_prompts", "train_ds", "eval_metric", "pre_edit", "pre_file",
             "metric_kwargs", "keep_original_weight"),
    "batch_edit": ("test_generation", "subject", "loc_prompts", "keep_original_weight"),
    "edit_requests": ("eval_metric", "pre_edit", "pre_file", "train_ds", "metric_kwargs", "keep_original_weight"),
    "generate_edit": ("subject", "loc_prompts", "train_ds", "keep_original_weight"),
}
)  # fmt: skip


def check_known(call: str, kwargs: Mapping[str, Any]) -> None:
    """Refuse keyword arguments that a call does not know.

    Raises:
        UnknownArgument: The first of them, with the nearest known name.
    """
    for name in kwargs:
        if name not in OPTIONS[call]:
            raise unknown(call, name, OPTIONS[call])


def unknown(call: str, name: str, known: Sequence[str]) -> UnknownArgument:
    """The error for a keyword argument that a call does not know."""
    return UnknownArgument(f"{call}() has no argument '{name}'. {did_you_mean(name, known)}")


def earlier_measurements(kwargs: Mapping[str, Any], sequential: bool, count: int) -> Sequence[Mapping[str, Any]] | None:
    """Check what existing scripts pass besides, and return the measurements made before, if any.

    Args:
        kwargs: What was passed.
        sequential: Whether all edits stay.
        count: The number of requests.

    Raises:
        UsageError: Two arguments contradict each other, or one is not available here.
    """
    if kwargs.get("keep_original_weight") and sequential:
        raise UsageError("keep_original_weight=True and sequential_edit=True contradict each other. Pass one of them.")
    if kwargs.get("train_ds") is not None:
        raise UsageError("train_ds holds demonstrations for IKE, and this method uses none. Leave it out.")
    if kwargs.get("metric_kwargs") is not None:
        raise UsageError(
            "metric_kwargs belongs to the ConvSent scores, which this version does not have. Leave it out."
        )
    metric = kwargs.get("eval_metric")
    if metric not in (None, "exact match", "token_em", "token em"):
        raise UsageError(f"eval_metric is '{metric}'. This version scores 'exact match' and 'token_em'; leave it out.")
    if kwargs.get("pre_file"):
        _check_writable(Path(kwargs["pre_file"]))
    if not kwargs.get("pre_edit"):
        return None
    pre = [entry.get("pre", entry) for entry in kwargs["pre_edit"]]
    if len(pre) != count:
        raise UsageError(f"'pre_edit' has {len(pre)} entries for {count} requests. Give one per request, in order.")
    if odd := [i for i, scores in enumerate(pre) if "locality" not in scores]:
        raise UsageError(f"'pre_edit', entry {odd[0]}, is no measurement (no 'locality'). Pass what pre_file wrote.")
    return pre


def _check_writable(path: Path) -> None:
    """Find out before the work is done whether its result can be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"pre_file '{path}' cannot be written: {error.strerror}. Choose another place.") from None
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UsageError(f"pre_file '{path}' cannot be written: it is a folder, or in one that is read-only.")
