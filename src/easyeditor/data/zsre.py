"""zsRE (Levy et al., CoNLL 2017) in the layout of MEND (Mitchell et al., ICLR 2022, arXiv:2110.11309)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from easyeditor.data.counterfact import one_hop
from easyeditor.data.dataset import RecordDataset
from easyeditor.data.records import Layout, Record, matching_subject, take, take_texts
from easyeditor.requests import EditRequest

FIELDS = (
    "case_id",
    "subject",
    "src",
    "pred",
    "rephrase",
    "alt",
    "answers",
    "loc",
    "loc_ans",
    "cond",
    "portability",
    "inverse question",
    "alternative_subject",
    "alter_subject_question",
)


def _has_edit(row: Mapping[str, Any]) -> bool:
    return row.get("alt") is None or not isinstance(row["alt"], str) or bool(row["alt"].strip())


def _convert(row: Mapping[str, Any], record: str) -> EditRequest:
    prompt, new = take(row, "src", str, record), take(row, "alt", str, record)
    answers = take_texts(row, "answers", record)
    locality: dict[str, Any] = {}
    if row.get("loc"):
        question = take(row, "loc", str, record)
        locality["neighborhood"] = {"prompt": question, "ground_truth": take(row, "loc_ans", str, record)}
    portability = one_hop(row, record)
    if row.get("inverse question"):
        inverse, subject = take(row, "inverse question", str, record), take(row, "subject", str, record)
        portability["inverse_relation"] = {"prompt": inverse, "ground_truth": subject}
    if row.get("alter_subject_question"):
        other = take(row, "alter_subject_question", str, record)
        portability["subject_replace"] = {"prompt": other, "ground_truth": new}
    return EditRequest.from_dict(
        {
            "prompt": prompt,
            "target_new": new,
            "subject": matching_subject(row, prompt),
            "ground_truth": answers[0] if answers else None,
            "rephrase_prompts": take_texts(row, "rephrase", record),
            "locality": locality,
            "portability": portability,
            "case_id": row.get("case_id"),
        },
        record,
    )


ZSRE = Layout("zsRE", FIELDS, _convert, _has_edit, "their 'alt', the answer to edit in, is empty")


class ZsreDataset(RecordDataset):
    """zsRE as MEND and EasyEdit publish it (``src``, ``alt``, ``answers``, ``rephrase``, ``loc``, ``loc_ans``).

    Each item is a dict with ``case_id``, ``prompt``, ``target_new``, ``ground_truth``, ``rephrase_prompt``,
    ``locality_prompt``, ``locality_ground_truth``, ``cond`` and ``subject``. Records with an empty ``alt`` are left
    out, and the log says how many; ``case_id`` is the record's place in the file, counted from 0. The locality
    question is passed on as it stands in the file, with its "nq question: " if it has one.
    """

    def _layout(self, rows: Sequence[dict[str, Any]]) -> Layout:
        return ZSRE

    def _item(self, record: Record) -> dict[str, Any]:
        row, request = record.row, record.request
        return {
            "case_id": row.get("case_id", record.index),
            "prompt": request.prompt,
            "target_new": request.target_new,
            "ground_truth": request.ground_truth,
            "rephrase_prompt": request.rephrase_prompts[0] if request.rephrase_prompts else None,
            "locality_prompt": row.get("loc"),
            "locality_ground_truth": row.get("loc_ans"),
            "cond": f"{request.ground_truth or ''} >> {request.target_new} || {request.prompt}",
            "subject": row.get("subject"),
        }
