"""QAEdit (Yang et al., ACL 2025, arXiv:2502.11177): questions of real question-answering benchmarks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from easyeditor.data.dataset import RecordDataset
from easyeditor.data.records import Layout, matching_subject, take, take_probes, take_texts
from easyeditor.requests import EditRequest


def _told_by(row: Mapping[str, Any]) -> bool:
    asked = row.get("locality")
    return isinstance(asked, list) and any(isinstance(probe, Mapping) and "loc" in probe for probe in asked)


def _convert(row: Mapping[str, Any], record: str) -> EditRequest:
    prompt = take(row, "prompt", str, record)
    return EditRequest.from_dict(
        {
            "prompt": prompt,
            "target_new": take(row, "target", str, record),
            "subject": matching_subject(row, prompt),
            "rephrase_prompts": take_texts(row, "rephrase", record),
            "locality": {"unrelated": take_probes(row, "locality", "loc", "loc_ans", record)},
            "case_id": row.get("id"),
        },
        record,
    )


QAEDIT = Layout("QAEdit", _told_by, _convert, ("id", "source", "prompt", "target", "subject", "rephrase", "locality"))


class QAEditDataset(RecordDataset):
    """QAEdit; each item is a request dict with its ``case_id``."""

    layout = QAEDIT
