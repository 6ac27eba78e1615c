"""Files to rows: JSON, JSON lines and CSV, with errors that say what is wrong and where."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from easyeditor.errors import UsageError

SUFFIXES = (".json", ".jsonl", ".csv")


def _never(_: Mapping[str, Any]) -> bool:
    return False


def read_rows(path: str | Path, whole: Callable[[Mapping[str, Any]], bool] = _never) -> list[dict[str, Any]]:
    """Read a file of records.

    Args:
        path: A ``.json`` file with a list of records (or an object whose only value is such a list), a ``.jsonl``
            file with one record per line, or a ``.csv`` file with a header row. UTF-8, with or without a BOM.
        whole: Whether an object that is the whole of a ``.json`` file is a record, the only one.

    Returns:
        The records, in order. The cells of a CSV file are texts.

    Raises:
        UsageError: The file is missing, empty, of another kind, or broken.
    """
    path = Path(path).expanduser()
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(f"'{path}' ends in '{path.suffix}'. Records are read from {', '.join(SUFFIXES)} files.")
    text = _read_text(path)
    if not text.strip():
        raise UsageError(f"The file '{path}' is empty. Put at least one record into it.")
    rows = _json(text, path, whole) if suffix == ".json" else {".jsonl": _json_lines, ".csv": _csv}[suffix](text, path)
    if not rows:
        raise UsageError(f"The file '{path}' holds no records. Put at least one into it.")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UsageError(
                f"{path.name}, record {number}: it is {_kind(row)}. A record is an object with named fields, such as "
                '{"prompt": ..., "target_new": ...}.'
            )
    return rows


def _read_text(path: Path) -> str:
    if path.is_dir():
        raise UsageError(f"'{path}' is a folder. Name a file of records in it.")
    if not path.exists():
        raise UsageError(f"There is no file '{path}'. Check the path; it is relative to '{Path.cwd()}'.")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"The file '{path}' is not UTF-8 (byte {error.start}). Save it as UTF-8.") from None
    except OSError as error:
        raise UsageError(f"The file '{path}' cannot be read: {error.strerror}.") from None


def _json(text: str, path: Path, whole: Callable[[Mapping[str, Any]], bool]) -> list[Any]:
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        hint = " If it holds one record per line, name it .jsonl." if error.msg == "Extra data" else ""
        raise UsageError(
            f"{path.name}, line {error.lineno}, column {error.colno}: not valid JSON ({error.msg}). "
            f"Correct it there.{hint}"
        ) from None
    if isinstance(raw, list):
        return raw
    if isinstance(raw, dict):
        if whole(raw):
            return [raw]
        lists = [value for value in raw.values() if isinstance(value, list)]
        if len(raw) == 1 and len(lists) == 1:
            return list(lists[0])
        seen = f"an object with the fields {', '.join(map(repr, list(raw)[:6]))}"
    else:
        seen = _kind(raw)
    raise UsageError(
        f"The file '{path}' holds {seen}. Expected a list of records, or an object whose only value is one; "
        "put a single record into [ ]."
    )


def _json_lines(text: str, path: Path) -> list[Any]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UsageError(
                f"{path.name}, line {number}, column {error.colno}: not valid JSON ({error.msg}). "
                "A .jsonl file has one complete record per line."
            ) from None
    return rows


def _csv(text: str, path: Path) -> list[Any]:
    header = text.lstrip().split("\n", 1)[0]
    delimiter = ";" if ";" in header and "," not in header else ","
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        rows = list(reader)
    except csv.Error as error:
        raise UsageError(f"{path.name}, line {reader.line_num}: not valid CSV ({error}). Correct it there.") from None
    names = [str(name).strip() for name in reader.fieldnames or ()]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"{path.name}: the column '{twice[0]}' is there twice. Give each column its own name.")
    for number, row in enumerate(rows, 1):
        if None in row:
            raise UsageError(
                f"{path.name}, record {number}: it has more cells than the header has columns. "
                'Put a cell that contains a comma into quotes: "...".'
            )
    return [{str(key).strip(): value or "" for key, value in row.items()} for row in rows]


def _kind(value: Any) -> str:
    kinds = {list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else kinds.get(type(value), f"a {type(value).__name__}")
