"""What the data set classes share: a file as a sequence of dicts, and as requests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from easyeditor.data.reading import read_rows
from easyeditor.data.records import Layout, Record, build
from easyeditor.errors import UsageError
from easyeditor.requests import EditRequest


class RecordDataset:
    """A published data set as a sequence of dicts, and as requests.

    Args:
        data_dir: The file.
        size: Use at most this many records.
        config: Kept as it is, for whoever builds batches.

    Raises:
        UsageError: The file or one of its records cannot be used.
    """

    layout: Layout

    def __init__(self, data_dir: str | Path, size: int | None = None, config: Any = None) -> None:
        self.config = config
        rows = read_rows(data_dir, lambda whole: self.layout.whole and self.layout.told_by(whole))
        layout = self._layout_of(rows)
        if Path(data_dir).suffix.lower() == ".csv":
            rows = [layout.cells(row) for row in rows]
        records = first(_by_record(build(rows, layout, Path(data_dir).name)), size)
        self._items = [item for edits in records for item in self._items_of(edits)]
        self._requests = [edit.request for edits in records for edit in edits]

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._items[index]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._items)

    def requests(self) -> list[EditRequest]:
        """The records as requests, with every probe that they carry."""
        return list(self._requests)

    def _layout_of(self, rows: Sequence[dict[str, Any]]) -> Layout:
        """The layout that the rows have."""
        return self.layout

    def _items_of(self, edits: Sequence[Record]) -> list[dict[str, Any]]:
        """The dicts that stand for the edits of one record."""
        return [self._item(edit) for edit in edits]

    def _item(self, record: Record) -> dict[str, Any]:
        """The dict that stands for one edit."""
        case_id = record.request.case_id
        return {"case_id": record.index if case_id is None else case_id, **record.request.to_dict()}


def first(items: list[Any], limit: int | None) -> list[Any]:
    """At most so many items.

    Raises:
        UsageError: The limit is negative.
    """
    if limit is not None and limit < 0:
        raise UsageError(f"A limit of {limit} records makes no sense. Pass a positive number, or None for all.")
    return items[:limit]


def _by_record(edits: Sequence[Record]) -> list[list[Record]]:
    groups: dict[int, list[Record]] = {}
    for edit in edits:
        groups.setdefault(edit.index, []).append(edit)
    return list(groups.values())
