"""QAEdit (Yang et al., ACL 2025, arXiv:2502.11177): questions of real question-answering benchmarks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from easyeditor.data.records import Layout, matching_subject, take, take_texts
from easyeditor.errors import UsageError
from easyeditor.requests import EditRequest

FIELDS = ("id", "source", "prompt", "target", "subject", "rephrase", "locality")


def _convert(row: Mapping[str, Any], record: str) -> EditRequest:
    prompt = take(row, "prompt", str, record)
    asked = row.get("locality") or []
    if not isinstance(asked, list) or not all(isinstance(probe, Mapping) for probe in asked):
        raise UsageError(f"{record}, field 'locality': expected a list of objects with 'loc' and 'loc_ans'.")
    probes = [
        {
            key: take(probe, field, str, record, "locality.")
            for key, field in (("prompt", "loc"), ("ground_truth", "loc_ans"))
        }
        for probe in asked
    ]
    return EditRequest.from_dict(
        {
            "prompt": prompt,
            "target_new": take(row, "target", str, record),
            "subject": matching_subject(row, prompt),
            "rephrase_prompts": take_texts(row, "rephrase", record),
            "locality": {"neighborhood": probes} if probes else {},
            "case_id": row.get("id"),
        },
        record,
    )


QAEDIT = Layout("QAEdit", FIELDS, _convert)
