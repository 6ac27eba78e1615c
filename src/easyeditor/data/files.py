"""Requests from a file, whatever layout its records have."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from easyeditor.data.counterfact import COUNTERFACT
from easyeditor.data.knowedit import GROUPS, KNOWEDIT
from easyeditor.data.own import OWN, split_cells
from easyeditor.data.qaedit import QAEDIT
from easyeditor.data.reading import read_rows
from easyeditor.data.records import Layout, build
from easyeditor.data.zsre import ZSRE
from easyeditor.errors import UsageError
from easyeditor.requests import EditRequest

TARGETS = ("target_new", "target")

__all__ = ["load_requests", "read_rows"]


def load_requests(path: str | Path, limit: int | None = None) -> list[EditRequest]:
    """Read edit requests from a file; the layout is told by the fields of its records.

    Known layouts:

    * a file of your own, in JSON, JSON lines or CSV: ``prompt`` and ``target_new``, and as far as you have them
      ``subject``, ``ground_truth``, ``target_neg``, ``rephrase_prompt``, ``locality_prompt`` and
      ``locality_ground_truth``, ``portability_prompt`` and ``portability_ground_truth``, ``loc_prompt``. A field may
      hold a list of texts; in CSV, ``|`` separates them. Or the nested request dicts of existing scripts.
    * CounterFact, original or flat; zsRE as in MEND; KnowEdit; QAEdit.

    Args:
        path: A ``.json``, ``.jsonl`` or ``.csv`` file.
        limit: Return at most this many requests. All records are checked all the same.

    Returns:
        The requests, in order.

    Raises:
        UsageError: The file cannot be read, or a record cannot be used: the first few are named, with field and remedy.
    """
    path = Path(path).expanduser()
    rows = read_rows(path)
    layout = _layout(rows, path.name)
    if layout is OWN and path.suffix.lower() == ".csv":
        rows = [split_cells(row) for row in rows]
    return [record.request for record in build(rows, layout, path.name, limit)]


def _layout(rows: Sequence[Mapping[str, Any]], source: str) -> Layout:
    keys = {key for row in rows for key in row}
    if any(isinstance(row.get("requested_rewrite"), Mapping) for row in rows):
        return COUNTERFACT
    if {"src", "alt"} <= keys:
        return ZSRE
    if {"text", "labels"} <= keys or any(_has_known_groups(row) for row in rows):
        return KNOWEDIT
    if any(_has_loc_list(row) for row in rows):
        return QAEDIT
    if any(difflib.get_close_matches(key, ("prompt", *TARGETS), n=1, cutoff=0.75) for key in keys):
        return OWN
    raise UsageError(
        f"{source} has the fields {', '.join(map(repr, sorted(keys)[:12]))}, which belong to no layout that is known. "
        "Name the columns 'prompt' and 'target_new' (and 'subject', 'rephrase_prompt', ... as far as you have them), "
        "or pass a file of CounterFact, zsRE, KnowEdit or QAEdit as published."
    )


def _has_known_groups(row: Mapping[str, Any]) -> bool:
    groups = [row.get(kind) for kind in ("locality", "portability")]
    return any(name in group for group in groups if isinstance(group, Mapping) for name in GROUPS)


def _has_loc_list(row: Mapping[str, Any]) -> bool:
    probes = row.get("locality")
    return isinstance(probes, list) and any(isinstance(probe, Mapping) and "loc" in probe for probe in probes)
