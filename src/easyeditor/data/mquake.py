"""MQuAKE (Zhong et al., EMNLP 2023, arXiv:2305.14795): chains of facts, of which one or more are edited."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from easyeditor.data.counterfact import PLACE, label
from easyeditor.data.dataset import RecordDataset
from easyeditor.data.records import Layout, Record, case_id, fill, take, take_objects, take_texts
from easyeditor.errors import UsageError
from easyeditor.requests import EditRequest


def edits_of(rows: Sequence[dict[str, Any]], index: int, record: str) -> list[dict[str, Any]]:
    """One row per rewrite of a case; ``edits`` holds the rewrites up to and with this one, ``last`` marks the last.

    Raises:
        UsageError: There are none.
    """
    row = rows[index]
    found = row.get("requested_rewrite")
    alone = {**row, "requested_rewrite": [found] if isinstance(found, dict) else found}
    rewrites = take_objects(alone, "requested_rewrite", record, "with 'prompt' and 'subject'")
    if not rewrites:
        raise UsageError(f"{record}, field 'requested_rewrite': it holds no edit. Add at least one.")
    return [
        {**row, "requested_rewrite": each, "edits": rewrites[: number + 1], "last": number + 1 == len(rewrites)}
        for number, each in enumerate(rewrites)
    ]


def multi_hop(row: Mapping[str, Any], record: str) -> dict[str, Any]:
    """The questions along the chain: with the last edit of a case, for only then they have their new answer.

    Raises:
        UsageError: The questions are no texts, or their answer is missing.
    """
    questions = take_texts(row, "questions", record)
    if not questions or not row["last"]:
        return {}
    answers = [take(row, "new_answer", str, record), *take_texts(row, "new_answer_alias", record)]
    return {
        "multi_hop" if len(row["edits"]) == 1 else "multi_hop_of_all_edits": {
            "prompt": questions,
            "ground_truth": [answers] * len(questions),
        }
    }


def other_hops(row: Mapping[str, Any], record: str) -> list[dict[str, Any]]:
    """The facts along the new chain that no edit changes, with their aliases.

    Raises:
        UsageError: The chain is not what it should be.
    """
    edited = [edit.get("question") for edit in row["edits"]]
    hops = take_objects(row, "new_single_hops", record, "with 'question' and 'answer'") if row["last"] else []
    place = "new_single_hops."
    return [
        {
            "prompt": take(hop, "question", str, record, place),
            "ground_truth": [take(hop, "answer", str, record, place), *take_texts(hop, "answer_alias", record)],
        }
        for hop in hops
        if hop.get("question") not in edited
    ]


def _convert(row: Mapping[str, Any], record: str) -> EditRequest:
    rewrite = take(row, "requested_rewrite", dict, record)
    template, subject = (take(rewrite, key, str, record, PLACE) for key in ("prompt", "subject"))
    return EditRequest.from_dict(
        {
            "prompt": fill(template, subject, record, f"{PLACE}prompt"),
            "target_new": label(rewrite, "target_new", record),
            "subject": subject,
            "ground_truth": label(rewrite, "target_true", record) if "target_true" in rewrite else None,
            "rephrase_prompts": take_texts(rewrite, "question", record),
            "locality": {"neighbour_hops": other_hops(row, record)},
            "portability": multi_hop(row, record),
            "case_id": case_id(row, "case_id"),
        },
        record,
    )


MQUAKE = Layout("MQuAKE", lambda row: isinstance(row.get("requested_rewrite"), list), _convert, parts=edits_of)


class MQuAKEDataset(RecordDataset):
    """MQuAKE.

    Each item is a dict for a case, with ``case_id``, the lists ``prompt``, ``target_new`` and ``rephrase_prompt``
    (one place per edit), ``portability_prompt`` (all questions along the chain) and ``portability_ground_truth``.
    A case is one request per edit; all have the case's ``case_id``, and the last has the questions along the chain.
    """

    layout = MQUAKE

    def _items_of(self, edits: Sequence[Record]) -> list[dict[str, Any]]:
        row, requests = edits[0].row, [edit.request for edit in edits]
        return [
            {
                "case_id": row.get("case_id", edits[0].index),
                "prompt": [request.prompt for request in requests],
                "target_new": [request.target_new for request in requests],
                "rephrase_prompt": [next(iter(request.rephrase_prompts), None) for request in requests],
                "portability_prompt": row.get("questions"),
                "portability_ground_truth": row.get("new_answer"),
            }
        ]
