"""Requests from a file, whatever layout its records have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easyeditor.data.catalogue import DATA_SETS, DataSet, data_set
from easyeditor.data.dataset import first
from easyeditor.data.hub import hub_rows, is_hub_id
from easyeditor.data.reading import read_rows
from easyeditor.data.records import Record, build
from easyeditor.errors import UsageError
from easyeditor.requests import EditRequest

LOOKED_AT = 1000  # records that tell the layout; one that is no such record is named when it is read

__all__ = ["Loaded", "load", "load_requests", "read_rows"]


@dataclass(frozen=True)
class Loaded:
    """What was found in a file: the data set whose layout it has, its number of records, and its edits."""

    data_set: DataSet
    records: int
    edits: tuple[Record, ...]


def load_requests(path: str | Path, limit: int | None = None, layout: str | None = None) -> list[EditRequest]:
    """Read edit requests from a file; the layout is told by the fields of its records.

    Known layouts:

    * a file of your own, in JSON, JSON lines or CSV: ``prompt`` and ``target_new``, and as far as you have them
      ``subject``, ``ground_truth``, ``target_neg``, ``rephrase_prompt``, ``locality_prompt`` and
      ``locality_ground_truth``, ``portability_prompt`` and ``portability_ground_truth``, ``loc_prompt``. A field may
      hold a list of texts; in CSV, ``|`` separates them. Or the nested request dicts of existing scripts.
    * the published data sets that ``easyedit data`` lists.

    Args:
        path: A ``.json``, ``.jsonl`` or ``.csv`` file; or a hub id, ``owner/name[@config][:split]`` (extra ``data``).
        limit: Return at most this many requests. All records are checked all the same.
        layout: The name of the data set, where the fields alone do not tell it, or tell another.

    Returns:
        The requests, in order. A record that is several edits gives several requests.

    Raises:
        UsageError: The file cannot be read, or a record cannot be used: the first few are named, with field and remedy.
        MissingExtra: It is a hub id, and what fetches it is not installed.
    """
    return first([edit.request for edit in load(path, layout).edits], limit)


def no_layout(name: str, layout: str | None) -> None:
    """See that nobody gives a layout to facts that are read from no file.

    Raises:
        UsageError: Somebody does.
    """
    if layout is not None:
        raise UsageError(f"'{name}' is the bundled table and no file, so it is not read as '{layout}'. Leave --as out.")


def load(path: str | Path, layout: str | None = None) -> Loaded:
    """Read a file; see `load_requests`.

    Raises:
        UsageError: The file or one of its records cannot be used.
        MissingExtra: It is a hub id, and what fetches it is not installed.
    """
    named = data_set(layout) if layout is not None else None
    if is_hub_id(path):
        source, rows = str(path), hub_rows(str(path))
    else:
        path = Path(path).expanduser()
        source, rows = path.name, read_rows(path, _is_record)
    if not rows:
        raise UsageError(f"The data set '{source}' holds no records. Name another split.")
    found = named or _told(rows, source)
    if Path(source).suffix.lower() == ".csv":
        rows = [found.layout.cells(row) for row in rows]
    return Loaded(found, len(rows), tuple(build(rows, found.layout, source)))


def _is_record(whole: Mapping[str, Any]) -> bool:
    return any(each.layout.whole and each.layout.told_by(whole) for each in DATA_SETS)


def _told(rows: Sequence[Mapping[str, Any]], source: str) -> DataSet:
    for each in DATA_SETS:
        if any(each.layout.told_by(row) for row in rows[:LOOKED_AT]):
            return each
    fields = sorted({key for row in rows for key in row})
    raise UsageError(
        f"{source} has the fields {', '.join(map(repr, fields[:12]))}, which belong to no layout that is known. "
        "Name the columns 'prompt' and 'target_new' (and 'subject', 'rephrase_prompt', ... as far as you have them), "
        "or pass a file of a published data set ('easyedit data' lists them)."
    )
