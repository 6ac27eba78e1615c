"""zsRE (Levy et al., CoNLL 2017) in the layout of MEND (Mitchell et al., ICLR 2022, arXiv:2110.11309).

The files that were added to it later have more fields: one hop, inverse relation, replaced subject (Yao et al., EMNLP
2023, arXiv:2305.13172).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from easyeditor.data.counterfact import one_hop
from easyeditor.data.dataset import RecordDataset
from easyeditor.data.records import Layout, Record, matching_subject, take, take_probe, take_texts
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


def has_edit(row: Mapping[str, Any]) -> bool:
    """Whether the answer to edit in is not the empty text."""
    return row.get("alt") is None or not isinstance(row["alt"], str) or bool(row["alt"].strip())


def convert(row: Mapping[str, Any], record: str) -> EditRequest:
    """Make a request of a record.

    Raises:
        UsageError: A field is missing or of another kind.
    """
    prompt, new = take(row, "src", str, record), take(row, "alt", str, record)
    return EditRequest.from_dict(
        {
            "prompt": prompt,
            "target_new": new,
            "subject": matching_subject(row, prompt),
            "ground_truth": take_texts(row, "answers", record),
            "rephrase_prompts": take_texts(row, "rephrase", record),
            "locality": {"unrelated": take_probe(row, "loc", "loc_ans", record)},
            "portability": {
                **one_hop(row, record),
                "inverse_relation": take_probe(row, "inverse question", "subject", record),
                "subject_replace": take_probe({**row, "new": new}, "alter_subject_question", "new", record),
            },
            "case_id": row.get("case_id"),
        },
        record,
    )


ZSRE = Layout(
    "zsRE",
    lambda row: {"src", "alt"} <= row.keys() and "image" not in row,
    convert,
    FIELDS,
    usable=has_edit,
    skipped="their 'alt', the answer to edit in, is empty",
)


class ZsreDataset(RecordDataset):
    """zsRE as MEND and EasyEdit publish it (``src``, ``alt``, ``answers``, ``rephrase``, ``loc``, ``loc_ans``).

    Each item is a dict with ``case_id``, ``prompt``, ``target_new``, ``ground_truth``, ``rephrase_prompt``,
    ``locality_prompt``, ``locality_ground_truth``, ``cond`` and ``subject``. Records with an empty ``alt`` are left
    out, and the log says how many; ``case_id`` is the record's place in the file, counted from 0. The locality
    question is passed on as it stands in the file, with its "nq question: " if it has one.
    """

    layout = ZSRE

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
