"""ConceptEdit (Wang et al., EMNLP 2024, arXiv:2403.06259): the definition of a concept is replaced by another one's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from easyeditor.data.dataset import RecordDataset
from easyeditor.data.records import Layout, case_id, matching_subject, take, take_texts
from easyeditor.requests import EditRequest


def _convert(row: Mapping[str, Any], record: str) -> EditRequest:
    prompt = take(row, "prompt", str, record)
    near, known = (take_texts(row, key, record) for key in ("locality_prompt", "locality_answer"))
    instances = take_texts(row, "instance_prompt", record)
    return EditRequest.from_dict(
        {
            "prompt": prompt,
            "target_new": take(row, "target_new_desc", str, record),
            "subject": matching_subject({"subject": row.get("label")}, prompt),
            "ground_truth": take_texts(row, "target_old_desc", record),
            "rephrase_prompts": take_texts(row, "phrase_prompt", record),
            "locality": {"neighborhood": {"prompt": near, "ground_truth": known}} if near else {},
            # an instance of the old concept is none of the new one
            "portability": {"instance": [{"prompt": text, "ground_truth": "No"} for text in instances]},
            "case_id": case_id(row, "case_id", "id"),
        },
        record,
    )


CONCEPTEDIT = Layout("ConceptEdit", lambda row: "target_new_desc" in row, _convert)


class ConceptEditDataset(RecordDataset):
    """ConceptEdit; each item is a request dict with its ``case_id``."""

    layout = CONCEPTEDIT
