"""CKnowEdit (Fang et al., 2024, arXiv:2409.05806): Chinese knowledge, from classical verse to traps of logic."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from easyeditor.data.dataset import RecordDataset
from easyeditor.data.records import Layout, Record, case_id, take, take_probes, take_texts
from easyeditor.requests import EditRequest

MEANING = re.compile(r"请解释(?P<subject>[^在]{1,8})在.+中的意思")
TASK = re.compile(r"[^：:]{0,24}[：:](?P<subject>.+)", re.DOTALL)
ENDS = "，。？！；、,.?!; "


def subject_of(prompt: str) -> str | None:
    """What a Chinese prompt is about: the word to explain, what follows the task's colon, or all but its last sign."""
    found = MEANING.match(prompt) or TASK.match(prompt)
    return (found["subject"] if found else prompt).strip(ENDS) or None


def _convert(row: Mapping[str, Any], record: str) -> EditRequest:
    prompt = take(row, "prompt", str, record)
    portability, locality = (take_probes(row, kind, "prompt", "answer", record) for kind in ("portability", "locality"))
    return EditRequest.from_dict(
        {
            "prompt": prompt,
            "target_new": take(row, "target_new", str, record),
            "subject": subject_of(prompt),
            "ground_truth": row.get("target_old"),
            "rephrase_prompts": take_texts(row, "rephrase", record),
            "locality": {"neighborhood": locality},
            "portability": {"reasoning": portability},
            "case_id": case_id(row, "case_id", "id"),
        },
        record,
    )


CKNOWEDIT = Layout("CKnowEdit", lambda row: {"prompt", "target_old"} <= row.keys(), _convert)


class CKnowEditDataset(RecordDataset):
    """CKnowEdit.

    Each item is a dict with ``case_id``, ``prompt``, ``target_new``, ``subject``, ``target_old``, ``portability``,
    ``locality`` (lists of dicts with ``prompt`` and ``answer``) and ``rephrase`` (a list).
    """

    layout = CKNOWEDIT

    def _item(self, record: Record) -> dict[str, Any]:
        row, request = record.row, record.request
        return {
            "case_id": row.get("case_id", record.index),
            "prompt": request.prompt,
            "target_new": request.target_new,
            "subject": request.subject,
            "target_old": request.ground_truth,
            "portability": row.get("portability") or [],
            "locality": row.get("locality") or [],
            "rephrase": list(request.rephrase_prompts),
        }
