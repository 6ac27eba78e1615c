"""KnowEdit (Zhang et al., 2024, arXiv:2401.01286): wiki_recent, wiki_counterfact, ZsRE and WikiBio."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from easyeditor.data.records import Layout, matching_subject, take, take_texts
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
            "locality": _groups(row, "locality", record),
            "portability": _groups(row, "portability", record),
            "case_id": row.get("case_id"),
        },
        record,
    )


def _groups(row: Mapping[str, Any], kind: str, record: str) -> dict[str, Any]:
    """The probes of a record; the answers to one of them may be lists of aliases, nested to any depth."""
    groups = row.get(kind) or {}
    if not isinstance(groups, Mapping):
        raise UsageError(f"{record}, field '{kind}': expected an object with groups such as '{GROUPS[0]}'.")
    for name, probes in groups.items():
        for probe in probes if isinstance(probes, list) else [probes]:
            if not isinstance(probe, Mapping):
                raise UsageError(
                    f"{record}, field '{kind}.{name}': expected probes with 'prompt' and 'ground_truth', got {probe!r}."
                )
            take(probe, "prompt", str, record, f"{kind}.{name}.")
    return dict(groups)


KNOWEDIT = Layout("KnowEdit", FIELDS, _convert)
