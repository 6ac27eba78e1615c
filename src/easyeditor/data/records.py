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


def _as_it_is(rows: Sequence[dict[str, Any]], index: int, record: str) -> list[dict[str, Any]]:
    return [rows[index]]


def _filled(row: Mapping[str, str]) -> dict[str, Any]:
    return {key: cell for key, cell in row.items() if cell.strip()}


@dataclass(frozen=True)
class Layout:
    """How the records of a data set are written down.

    Args:
        name: What to call it in messages.
        told_by: Whether a record shows by its fields that it is written in this layout.
        convert: Makes a request of a row; raises `UsageError` naming the record, the field and what to do.
        fields: Every field that it knows, also those that no request needs; others are refused. Empty where the
            published versions differ: then other fields are passed over.
        parts: The edits of a record, as rows; for data sets whose record is not one edit. It gets all records, the
            place of this one, and how messages name it.
        usable: Whether a row is an edit at all; others are left out.
        skipped: What to say about those that are left out.
        cells: Makes a record of a CSV row; empty cells are absent.
        whole: Whether a file may be one object, which is then its only record.
    """

    name: str
    told_by: Callable[[Mapping[str, Any]], bool]
    convert: Callable[[Mapping[str, Any], str], EditRequest]
    fields: tuple[str, ...] = ()
    parts: Callable[[Sequence[dict[str, Any]], int, str], list[dict[str, Any]]] = _as_it_is
    usable: Callable[[Mapping[str, Any]], bool] = _always
    skipped: str = "they hold no edit"
    cells: Callable[[Mapping[str, str]], dict[str, Any]] = _filled
    whole: bool = False


@dataclass(frozen=True)
class Record:
    """One edit: the place of its record in the file counted from 0, its row, and the request made of it."""

    index: int
    row: dict[str, Any]
    request: EditRequest


def build(rows: Sequence[dict[str, Any]], layout: Layout, source: str) -> list[Record]:
    """Turn records into requests.

    Args:
        rows: What was read.
        layout: How they are written down.
        source: The file's name, for messages.

    Returns:
        The edits, in order.

    Raises:
        UsageError: A field is unknown, or a record cannot be used; the first few are named, with a count.
    """
    if layout.fields:
        _check_fields(rows, layout, source)
    built: list[Record] = []
    problems: list[str] = []
    found = 0
    for index in range(len(rows)):
        record = f"{source}, record {index + 1}"
        try:
            parts = layout.parts(rows, index, record)
        except UsageError as error:
            problems.append(str(error))
            continue
        for number, row in enumerate(parts, 1):
            found += 1
            if not layout.usable(row):
                continue
            try:
                name = record if len(parts) == 1 else f"{record}, edit {number}"
                built.append(Record(index, row, layout.convert(row, name)))
            except UsageError as error:
                problems.append(str(error))
    _raise(problems, f"{len(problems)} of {max(found, len(rows))} records of {source} cannot be used.")
    if not built:
        raise UsageError(f"{source} holds no edit: of its {len(rows)} records none can be used ({layout.skipped}).")
    if len(built) < found:
        log.info("%s: %d of %d records were left out: %s.", source, found - len(built), found, layout.skipped)
    lost = sum(bool(record.row.get("subject")) and record.request.subject is None for record in built)
    if lost:
        log.warning("%s: %d records spell their subject otherwise than their prompt; it was left out.", source, lost)
    return built


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


def take_objects(row: Mapping[str, Any], key: str, record: str, what: str) -> list[dict[str, Any]]:
    """A field that holds a list of objects; empty if it is not there.

    Raises:
        UsageError: It holds something else; ``what`` says what is expected of the objects.
    """
    items = row.get(key) or []
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise UsageError(f"{record}, field '{key}': expected a list of objects {what}, got {items!r:.80}.")
    return items


def take_probe(
    row: Mapping[str, Any], question: str, answer: str, record: str, place: str = ""
) -> dict[str, Any] | None:
    """A question of a row and the answer beside it, as a group of one probe; None if the row asks no question.

    The answer is a text, or a list of accepted answers, nested to any depth.

    Raises:
        UsageError: The question is no text, or its answer is missing or of another kind.
    """
    if is_absent(row.get(question)):
        return None
    asked = take(row, question, str, record, place)
    known = row.get(answer)
    if is_absent(known):
        raise UsageError(f"{record}, field '{place}{answer}': it is missing. Add it, or drop '{place}{question}'.")
    if not is_answer(known):
        raise UsageError(f"{record}, field '{place}{answer}': expected a text or a list of texts, got {known!r}.")
    return {"prompt": asked, "ground_truth": known}


def take_probes(row: Mapping[str, Any], key: str, question: str, answer: str, record: str) -> list[dict[str, Any]]:
    """A field that holds a list of objects, each with a question and its answer, as probes; empty if it is not there.

    Raises:
        UsageError: It holds something else.
    """
    items = take_objects(row, key, record, f"with '{question}' and '{answer}'")
    for item in items:
        take(item, question, str, record, f"{key}.")
    return [probe for item in items if (probe := take_probe(item, question, answer, record, f"{key}."))]


def fill(template: str, subject: str, record: str, name: str) -> str:
    """A template with the subject put in.

    Raises:
        UsageError: It has no place for it.
    """
    if "{}" not in template:
        raise UsageError(f"{record}, field '{name}': no '{{}}' in '{template}'. Put it where the subject goes.")
    return template.replace("{}", subject)


def case_id(row: Mapping[str, Any], *keys: str) -> int | None:
    """The number of a record in its data set, if one of the fields holds one."""
    return next((row[key] for key in keys if isinstance(row.get(key), int)), None)


def is_absent(value: Any) -> bool:
    """Whether a field has nothing in it: null, an empty text or list, or the not-a-number of a table."""
    return value is None or value in ("", []) or value != value


def is_answer(value: Any) -> bool:
    """Whether a value is a text, a number, or a list of such, nested to any depth."""
    return isinstance(value, str | int | float) or (isinstance(value, list) and all(map(is_answer, value)))
