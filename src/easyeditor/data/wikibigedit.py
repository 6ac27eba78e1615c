"""WikiBigEdit (Thede et al., ICML 2025, arXiv:2503.05683), and the like: UltraEditBench, zsRE as UltraEdit has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from easyeditor.data.dataset import RecordDataset
from easyeditor.data.records import Layout, Record, case_id, is_absent, matching_subject, take, take_probe, take_texts
from easyeditor.requests import EditRequest

QUESTIONS = ("update", "src", "prompt")  # WikiBigEdit, zsRE, UltraEditBench


def _convert(row: Mapping[str, Any], record: str) -> EditRequest:
    prompt = take(row, next((key for key in QUESTIONS if key in row), QUESTIONS[0]), str, record)
    truth = row.get("ground_truth")
    return EditRequest.from_dict(
        {
            "prompt": prompt,
            "target_new": take(row, "ans", str, record),
            "subject": matching_subject(row, prompt),
            "ground_truth": None if is_absent(truth) else truth,
            "rephrase_prompts": take_texts(row, "rephrase", record) or take_texts(row, "rephrase_prompt", record),
            "locality": {"neighborhood": take_probe(row, "loc", "loc_ans", record)},
            "portability": {
                "personas": take_probe(row, "personas", "ans", record),
                "multi_hop": take_probe(row, "mhop", "mhop_ans", record),
            },
            "case_id": case_id(row, "case_id"),
        },
        record,
    )


WIKIBIGEDIT = Layout("WikiBigEdit", lambda row: "ans" in row and any(key in row for key in QUESTIONS), _convert)


class WikiBigEditDataset(RecordDataset):
    """WikiBigEdit.

    Each item is a dict with ``case_id``, ``subject``, ``prompt``, ``target_new``, ``ground_truth``, ``rephrase``,
    ``portability_personas``, ``portability_hop``, ``portability_hop_ans``, ``locality`` and ``locality_ans``; None
    where a record has nothing.
    """

    layout = WIKIBIGEDIT

    def _item(self, record: Record) -> dict[str, Any]:
        row, request = record.row, record.request
        return {
            "case_id": row.get("case_id", record.index),
            "subject": row.get("subject"),
            "prompt": request.prompt,
            "target_new": request.target_new,
            "ground_truth": request.ground_truth,
            "rephrase": request.rephrase_prompts[0] if request.rephrase_prompts else None,
            "portability_personas": row.get("personas"),
            "portability_hop": row.get("mhop"),
            "portability_hop_ans": row.get("mhop_ans"),
            "locality": row.get("loc"),
            "locality_ans": row.get("loc_ans"),
        }
