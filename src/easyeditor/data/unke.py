"""UnKEBench (Deng et al., ICLR 2025, arXiv:2405.15349): unstructured answers, a paragraph long."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from easyeditor.data.dataset import RecordDataset
from easyeditor.data.records import Layout, Record, case_id, take, take_texts
from easyeditor.requests import EditRequest


def _convert(row: Mapping[str, Any], record: str) -> EditRequest:
    parts, answers = (take_texts(row, key, record) for key in ("sub_question", "sub_answer"))
    return EditRequest.from_dict(
        {
            "prompt": take(row, "question", str, record),
            "target_new": take(row, "answer", str, record),
            "rephrase_prompts": take_texts(row, "para_question", record),
            "portability": {"sub_question": {"prompt": parts, "ground_truth": answers}} if parts else {},
            "case_id": case_id(row, "id", "case_id"),
        },
        record,
    )


UNKE = Layout(
    "UnKE",
    lambda row: {"question", "answer"} <= row.keys() and bool({"para_question", "sub_question"} & row.keys()),
    _convert,
)


class UnKEDataset(RecordDataset):
    """UnKEBench; each item is the record: ``id``, ``question``, ``para_question``, ``answer``, the sub-questions."""

    layout = UNKE

    def _item(self, record: Record) -> dict[str, Any]:
        return {"id": record.index, **record.row}
