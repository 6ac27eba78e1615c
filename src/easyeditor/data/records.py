"""Rows to requests: every record is checked before any is returned, and the first bad ones are named together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from easyeditor.errors import UsageError, did_you_mean
from easyeditor.requests import EditRequest

log = logging.getLogger(__name__)

SHOWN = 5
KINDS: dict[type, str] = {str: "a text", list: "a list", dict: "an object"}
T = TypeVar("T")


def _always(_: Mapping[str, Any]) -> bool:
    return True


@dataclass(frozen=True)
class Layout:
    """How the records of a data set are written down.

    Args:
        name: What to call it in messages.
        fields: Every field that it knows, also those that no request needs.
        convert: Makes a request of a row; raises `UsageError` naming the record, the field and what to do.
        usable: Whether a row is an edit at all; others are left out.
        skipped: What to say about those that are left out.
    """

    name: str
    fields: tuple[str, ...]
    convert: Callable[[Mapping[str, Any], str], EditRequest]
    usable: Callable[[Mapping[str, Any]], bool] = _always
    skipped: str = "they hold no edit"


@dataclass(frozen=True)
class Record:
    """A row, its place in the file counted from 0, and the request made of it."""

    index: int
    row: dict[str, Any]
    request: EditRequest


def build(rows: Sequence[dict[str, Any]], layout: Layout, source: str, limit: int | None = None) -> list[Record]:
    """Turn rows into requests.

    Args:
        rows: What was read.
        layout: How they are written down.
        source: The file's name, for messages.
        limit: Return at most this many; the others are checked all the same.

    Returns:
        The records, in order.

    Raises:
        UsageError: A field is unknown, or a record cannot be used; the first few are named, with a count.
    """
    if limit is not None and limit < 0:
        raise UsageError(f"A limit of {limit} records makes no sense. Pass a positive number, or None for all.")
    _check_fields(rows, layout, source)
    built: list[Record] = []
    problems: list[str] = []
    for index, row in enumerate(rows):
        if not layout.usable(row):
            continue
        try:
            built.append(Record(index, row, layout.convert(row, f"{source}, record {index + 1}")))
        except UsageError as error:
            problems.append(str(error))
    _raise(problems, f"{len(problems)} of {len(rows)} records of {source} cannot be used.")
    if len(built) < len(rows):
        log.info("%s: %d of %d records were left out: %s.", source, len(rows) - len(built), len(rows), layout.skipped)
    lost = sum(bool(record.row.get("subject")) and record.request.subject is None for record in built)
    if lost:
        log.warning("%s: %d records spell their subject otherwise than their prompt; it was left out.", source, lost)
    return built[:limit]


def _check_fields(rows: Sequence[dict[str, Any]], layout: Layout, source: str) -> None:
    first: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        for key in row.keys() - set(layout.fields):
            first.setdefault(key, number)
    if not first:
        return
    keys = sorted(first, key=lambda key: (first[key], key))
    hint = did_you_mean(keys[0], layout.fields)
    where = f"{source}, record {first[keys[0]]}: unknown field '{keys[0]}' (read as {layout.name})."
    also = ", ".join(f"'{key}' (record {first[key]})" for key in keys[1:SHOWN])
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    raise UsageError(f"{where} {hint}" + (f" Also unknown: {also}{more}." if also else ""))


def _raise(problems: list[str], summary: str) -> None:
    if len(problems) == 1:
        raise UsageError(problems[0])
    if problems:
        more = [f"... and {len(problems) - SHOWN} more."] if len(problems) > SHOWN else []
        raise UsageError("\n".join([summary, *problems[:SHOWN], *more]))


def take(row: Mapping[str, Any], key: str, kind: type[T], record: str, place: str = "") -> T:
    """A field of a row, checked.

    Raises:
        UsageError: It is missing or of another kind.
    """
    name, expected = f"{place}{key}", KINDS.get(kind, kind.__name__)
    if row.get(key) is None:
        raise UsageError(f"{record}, field '{name}': it is missing. Add it, as {expected}.")
    value = row[key]
    if not isinstance(value, kind):
        raise UsageError(f"{record}, field '{name}': expected {expected}, got {value!r}.")
    return value


def take_texts(row: Mapping[str, Any], key: str, record: str) -> list[str]:
    """A field that holds a text or a list of texts, as a list; empty if the field is not there.

    Raises:
        UsageError: It holds something else.
    """
    value = row.get(key)
    items = [value] if isinstance(value, str) else value or []
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        raise UsageError(f"{record}, field '{key}': expected a text or a list of texts, got {value!r}.")
    return [item for item in items if item.strip()]


def matching_subject(row: Mapping[str, Any], prompt: str) -> str | None:
    """The subject of a published record, unless its prompt spells it otherwise."""
    subject = row.get("subject")
    return subject if isinstance(subject, str) and subject.strip() and subject in prompt else None
