"""What the data set classes share: a file as a sequence of dicts, and as requests."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from easyeditor.data.reading import read_rows
from easyeditor.data.records import Layout, Record, build
from easyeditor.requests import EditRequest


class RecordDataset(ABC):
    """A published data set as a sequence of dicts, and as requests.

    Args:
        data_dir: The file.
        size: Use at most this many records.
        config: Kept as it is, for whoever builds batches.

    Raises:
        UsageError: The file or one of its records cannot be used.
    """

    def __init__(self, data_dir: str | Path, size: int | None = None, config: Any = None) -> None:
        self.config = config
        rows = read_rows(data_dir)
        records = build(rows, self._layout(rows), Path(data_dir).name, size)
        self._items = [self._item(record) for record in records]
        self._requests = [record.request for record in records]

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._items[index]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._items)

    def requests(self) -> list[EditRequest]:
        """The records as requests, with every probe that they carry."""
        return list(self._requests)

    @abstractmethod
    def _layout(self, rows: Sequence[dict[str, Any]]) -> Layout:
        """The layout that the rows have."""

    @abstractmethod
    def _item(self, record: Record) -> dict[str, Any]:
        """The dict that stands for a record."""
