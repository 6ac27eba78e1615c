"""ConflictEdit and RoundEdit (Li et al., ICLR 2024, arXiv:2310.02129): edits that contradict or distort each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from easyeditor.data.dataset import RecordDataset
from easyeditor.data.records import Layout, fill, take, take_objects
from easyeditor.errors import UsageError
from easyeditor.requests import EditRequest

PARTS = "with 'relation', 'subject', 'object' and 'new_object'"


def _name(triple: Mapping[str, Any], key: str, record: str) -> str:
    return take(take(triple, key, dict, record), "label", str, record, f"{key}.")


def _asked(triple: Mapping[str, Any], record: str, subject: str | None = None, form: str = "prompt") -> str:
    template = take(take(triple, "relation", dict, record), form, str, record, "relation.")
    return fill(template, subject or _name(triple, "subject", record), record, f"relation.{form}")


def _implied(row: Mapping[str, Any], one: Mapping[str, Any], two: Mapping[str, Any], record: str) -> dict[str, Any]:
    """What follows from the first edit alone, asked with the second one's words."""
    if row.get("type") == "reverse":
        return {"reverse": {"prompt": _asked(two, record), "ground_truth": _name(one, "subject", record)}}
    if row.get("type") == "composite":
        return {"composite": {"prompt": _asked(two, record), "ground_truth": _name(one, "new_object", record)}}
    return {}


def _conflict(rows: Sequence[dict[str, Any]], index: int, record: str) -> list[dict[str, Any]]:
    """The two edits of a record; the first with what it implies, both with the facts that hold all the time."""
    row = rows[index]
    edits, triples = (take_objects(row, key, record, PARTS) for key in ("edits", "triples"))
    places = row.get("prerequisites") or []
    if not isinstance(places, list) or not all(place in range(len(triples)) for place in places):
        raise UsageError(
            f"{record}, field 'prerequisites': expected places in 'triples', counted from 0, got {places!r}."
        )
    kept = [triples[place] for place in places]
    near = [{"prompt": _asked(each, record), "ground_truth": _name(each, "object", record)} for each in kept]
    if len(edits) != 2:
        raise UsageError(f"{record}, field 'edits': expected two objects {PARTS}, got {len(edits)}.")
    follows: tuple[dict[str, Any], ...] = (_implied(row, edits[0], edits[1], record), {})
    return [
        {**edit, "kept": near, "follows": more, "case_id": index} for edit, more in zip(edits, follows, strict=True)
    ]


def _round(rows: Sequence[dict[str, Any]], index: int, record: str) -> list[dict[str, Any]]:
    """The edit forth and the edit back; after it, any of the true objects is right."""
    edit = take(rows[index], "edit", dict, record)
    known = take_objects(rows[index], "true_objects", record, "with 'label'")
    true = [take(each, "label", str, record, "true_objects.") for each in known]
    back = {**edit, "object": edit.get("new_object"), "new_object": edit.get("object")}
    answer = {"true_objects": {"prompt": _asked(edit, record), "ground_truth": true}} if true else {}
    return [{**edit, "follows": {}, "case_id": index}, {**back, "follows": answer, "case_id": index}]


def _convert(row: Mapping[str, Any], record: str) -> EditRequest:
    relation = take(row, "relation", dict, record)
    return EditRequest.from_dict(
        {
            "prompt": _asked(row, record),
            "target_new": _name(row, "new_object", record),
            "subject": _name(row, "subject", record),
            "ground_truth": _name(row, "object", record),
            "rephrase_prompts": [_asked(row, record, form="query")] if relation.get("query") else [],
            "locality": {"prerequisite": row.get("kept")},
            "portability": row["follows"],
            "case_id": row["case_id"],
        },
        record,
    )


CONFLICTEDIT = Layout("ConflictEdit", lambda row: {"edits", "triples"} <= row.keys(), _convert, parts=_conflict)
ROUNDEDIT = Layout("RoundEdit", lambda row: {"edit", "true_objects"} <= row.keys(), _convert, parts=_round)


class ConflictEditDataset(RecordDataset):
    """ConflictEdit (coverage, reverse, composite) or RoundEdit (easy, hard): two edits per record, to make in order.

    Each item is a request dict with its ``case_id``, which both edits of a record share.
    """

    layout = CONFLICTEDIT

    def _layout_of(self, rows: Sequence[dict[str, Any]]) -> Layout:
        return ROUNDEDIT if any(ROUNDEDIT.told_by(row) for row in rows) else CONFLICTEDIT
