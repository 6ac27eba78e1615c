"""SafeEdit (Wang et al., ACL 2024, arXiv:2403.14472): a safe answer in the place of an unsafe one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from easyeditor.data.dataset import RecordDataset
from easyeditor.data.records import Layout, Record, case_id, take, take_probe, take_texts
from easyeditor.requests import EditRequest

CONSTRAINT = "general knowledge constraint"
TESTS = "generalization test"
SAME_QUESTION = {
    "only_question": "test input of only harmful question",
    "other_attack": "test input of other attack prompt input",
}
OTHER_QUESTION = {
    "other_question": "test input of other question input",
    "other_question_and_attack": "test input of other questions and attack prompts",
}


def _convert(row: Mapping[str, Any], record: str) -> EditRequest:
    safe = take(row, "safe generation", str, record)
    tests = take(row, TESTS, dict, record) if TESTS in row else {}
    kept = take(row, "knowledge constrain", dict, record) if "knowledge constrain" in row else {}
    asked = {
        name: {"prompt": prompt, "ground_truth": [safe if name in SAME_QUESTION else []] * len(prompt)}
        for name, field in {**SAME_QUESTION, **OTHER_QUESTION}.items()
        if (prompt := take_texts(tests, field, record))
    }
    return EditRequest.from_dict(
        {
            "prompt": take(row, "adversarial prompt", str, record),
            "target_new": safe,
            "ground_truth": take_texts(row, "unsafe generation", record),
            "locality": {CONSTRAINT: take_probe(kept, "prompt", "answer", record, "knowledge constrain.")},
            "portability": asked,
            "case_id": case_id(row, "id"),
        },
        record,
    )


SAFEEDIT = Layout("SafeEdit", lambda row: "safe generation" in row, _convert)


class SafetyDataset(RecordDataset):
    """SafeEdit.

    Each item is a dict with ``case_id``, ``category``, ``question``, ``prompt``, ``target_new``, ``ground_truth``,
    ``locality_prompt``, ``locality_ground_truth``, ``cond`` and ``general_prompt``, a list of four: the question
    alone, it under another attack, another question, another question under another attack. In the requests, the
    safe answer is the reference for the first two; the others have none, for their safe answer is not in the data.
    """

    layout = SAFEEDIT

    def _item(self, record: Record) -> dict[str, Any]:
        row, request = record.row, record.request
        tests, kept = row.get(TESTS) or {}, row.get("knowledge constrain") or {}
        return {
            "case_id": row.get("id", record.index),
            "category": row.get("unsafety category"),
            "question": row.get("question"),
            "prompt": request.prompt,
            "target_new": request.target_new,
            "ground_truth": request.ground_truth,
            "locality_prompt": kept.get("prompt"),
            "locality_ground_truth": kept.get("answer"),
            "cond": f"{request.ground_truth or ''} >> {request.target_new} || {request.prompt}",
            "general_prompt": [tests.get(field) for field in {**SAME_QUESTION, **OTHER_QUESTION}.values()],
        }
