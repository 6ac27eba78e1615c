"""KnowEdit (Zhang et al., 2024, arXiv:2401.01286): wiki_recent, wiki_counterfact, ZsRE and WikiBio."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from easyeditor.data.dataset import RecordDataset
from easyeditor.data.records import Layout, Record, case_id, is_absent, matching_subject, take, take_probe, take_texts
from easyeditor.errors import UsageError
from easyeditor.requests import EditRequest

GROUPS = ("Relation_Specificity", "Forgetfulness", "Reasoning", "Subject_Aliasing", "Logical_Generalization")
FIELDS = (
    "subject",
    "concept",
    "prompt",
    "text",
    "target_new",
    "labels",
    "ground_truth",
    "rephrase_prompt",
    "rephrase",
    "locality",
    "portability",
    "cond",
    "case_id",
    "generate_prompt",
)


def _told_by(row: Mapping[str, Any]) -> bool:
    groups = [row.get(kind) for kind in ("locality", "portability")]
    known = any(name in group for group in groups if isinstance(group, Mapping) for name in GROUPS)
    return known or {"text", "labels"} <= row.keys()


def _convert(row: Mapping[str, Any], record: str) -> EditRequest:
    """Make a request of a record; WikiBio calls the subject a concept, the prompt a text, the target labels."""
    prompt = take(row, "text" if "text" in row else "prompt", str, record)
    return EditRequest.from_dict(
        {
            "prompt": prompt,
            "target_new": take(row, "labels" if "labels" in row else "target_new", str, record),
            "subject": matching_subject({"subject": row.get("concept", row.get("subject"))}, prompt),
            "ground_truth": row.get("ground_truth"),
            "rephrase_prompts": take_texts(row, "rephrase_prompt", record) or take_texts(row, "rephrase", record),
            "locality": groups(row, "locality", record),
            "portability": groups(row, "portability", record),
            "case_id": case_id(row, "case_id"),
        },
        record,
    )


def groups(row: Mapping[str, Any], kind: str, record: str) -> dict[str, list[dict[str, Any]]]:
    """The probes of a record by group; the answers to one of them may be lists of aliases, nested to any depth.

    Raises:
        UsageError: The groups or the probes in them are not what they should be.
    """
    raw = row.get(kind) or {}
    if not isinstance(raw, Mapping):
        raise UsageError(f"{record}, field '{kind}': expected an object with groups such as '{GROUPS[0]}'.")
    found: dict[str, list[dict[str, Any]]] = {}
    for name, probes in raw.items():
        for probe in probes if isinstance(probes, list) else [probes] if probes else []:
            if not isinstance(probe, Mapping):
                raise UsageError(
                    f"{record}, field '{kind}.{name}': expected probes with 'prompt' and 'ground_truth', got {probe!r}."
                )
            place = f"{kind}.{name}."
            asked = {"prompt": take(probe, "prompt", str, record, place)}
            answered = not is_absent(probe.get("ground_truth"))
            found.setdefault(name, []).append(
                (answered and take_probe(probe, "prompt", "ground_truth", record, place)) or asked
            )
    return found


KNOWEDIT = Layout("KnowEdit", _told_by, _convert, FIELDS)


class KnowEditDataset(RecordDataset):
    """KnowEdit.

    Each item is a dict with ``case_id``, ``subject``, ``prompt``, ``target_new``, ``ground_truth``, and the probes as
    the file has them, None if it has none: ``portability_r`` (reasoning), ``portability_s`` (subject aliasing),
    ``portability_l`` (logical generalisation), ``locality_rs`` (relation specificity), ``locality_f``
    (forgetfulness).
    """

    layout = KNOWEDIT

    def _item(self, record: Record) -> dict[str, Any]:
        row, request = record.row, record.request
        port, near = (row.get(kind) or {} for kind in ("portability", "locality"))
        return {
            "case_id": row.get("case_id", record.index),
            "subject": row.get("subject", row.get("concept")),
            "prompt": request.prompt,
            "target_new": request.target_new,
            "ground_truth": row.get("ground_truth"),
            "portability_r": port.get("Reasoning"),
            "portability_s": port.get("Subject_Aliasing"),
            "portability_l": port.get("Logical_Generalization"),
            "locality_rs": near.get("Relation_Specificity"),
            "locality_f": near.get("Forgetfulness"),
        }


class WikiRecentDataset(RecordDataset):
    """The wiki_recent part of KnowEdit, one locality question per record: the first on relation specificity.

    Each item is a dict with ``case_id``, ``subject``, ``prompt``, ``target_new``, ``rephrase_prompt`` (the prompt
    where there is none), ``locality_prompt``, ``locality_ground_truth`` and ``cond``.
    """

    layout = KNOWEDIT

    def _item(self, record: Record) -> dict[str, Any]:
        request = record.request
        near = next(iter(request.locality.get("Relation_Specificity", ())), None)
        return {
            "case_id": record.row.get("case_id", record.index),
            "subject": record.row.get("subject"),
            "prompt": request.prompt,
            "target_new": request.target_new,
            "rephrase_prompt": next(iter(request.rephrase_prompts), request.prompt),
            "locality_prompt": near.prompt if near else None,
            "locality_ground_truth": near.answers[0] if near and near.answers else None,
            "cond": f"|ORIGIN_OUTPUT| >> {request.target_new} || {request.prompt}",
        }
