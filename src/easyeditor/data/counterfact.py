"""CounterFact (Meng et al., NeurIPS 2022, arXiv:2202.05262): the original layout and the flat one.

The files that were added to it later have the original layout and more fields: one hop, replaced subject, distracting
neighbours, other attribute of the subject (Yao et al., EMNLP 2023, arXiv:2305.13172).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from easyeditor.data.dataset import RecordDataset
from easyeditor.data.own import OWN
from easyeditor.data.records import Layout, Record, fill, take, take_probe, take_texts
from easyeditor.requests import EditRequest

FIELDS = (
    "case_id",
    "pararel_idx",
    "requested_rewrite",
    "paraphrase_prompts",
    "neighborhood_prompts",
    "attribute_prompts",
    "generation_prompts",
    "portability",
    "alternative_subject",
    "unrelated_relation",
    "distracting_neighborhood_prompts",
)
PLACE = "requested_rewrite."


def one_hop(row: Mapping[str, Any], record: str) -> dict[str, Any]:
    """The portability question that was written for a record, as a group of probes; empty if there is none.

    Raises:
        UsageError: The question or its answer is missing.
    """
    if row.get("portability") is None:
        return {}
    asked = take(row, "portability", dict, record)
    take(asked, "New Question", str, record, "portability.")
    return {"one_hop": take_probe(asked, "New Question", "New Answer", record, "portability.")}


def label(rewrite: Mapping[str, Any], key: str, record: str) -> str:
    """The text of an object of a rewrite, ``{"str": ..., "id": ...}``.

    Raises:
        UsageError: It is missing or of another kind.
    """
    return take(take(rewrite, key, dict, record, PLACE), "str", str, record, f"{PLACE}{key}.")


def convert(row: Mapping[str, Any], record: str) -> EditRequest:
    """Make a request of a record in the original layout.

    Raises:
        UsageError: A field is missing or of another kind.
    """
    rewrite = take(row, "requested_rewrite", dict, record)
    template, subject = (take(rewrite, key, str, record, PLACE) for key in ("prompt", "subject"))
    prompt = fill(template, subject, record, f"{PLACE}prompt")
    new, old = (label(rewrite, key, record) for key in ("target_new", "target_true"))
    return EditRequest.from_dict(
        {
            "prompt": prompt,
            "target_new": new,
            "subject": subject,
            "ground_truth": old,
            "rephrase_prompts": take_texts(row, "paraphrase_prompts", record),
            "locality": _locality(row, new, old, record),
            "portability": {**one_hop(row, record), **_other_name(row, template, new, record)},
            "case_id": row.get("case_id"),
        },
        record,
    )


def _locality(row: Mapping[str, Any], new: str, old: str, record: str) -> dict[str, Any]:
    groups: dict[str, Any] = {}
    for name, key, answer in (
        ("neighborhood", "neighborhood_prompts", old),
        ("distracting", "distracting_neighborhood_prompts", old),
        ("attribute", "attribute_prompts", new),  # other subjects, of which the new answer is true already
    ):
        prompts = take_texts(row, key, record)
        groups[name] = {"prompt": prompts, "ground_truth": [answer] * len(prompts)} if prompts else None
    if row.get("unrelated_relation") is not None:
        other = take(row, "unrelated_relation", dict, record)
        take(other, "question", str, record, "unrelated_relation.")
        groups["other_attribute"] = take_probe(other, "question", "object", record, "unrelated_relation.")
    return groups


def _other_name(row: Mapping[str, Any], template: str, answer: str, record: str) -> dict[str, Any]:
    if row.get("alternative_subject") is None:
        return {}
    name = take(row, "alternative_subject", str, record)
    return {"subject_replace": {"prompt": template.replace("{}", name), "ground_truth": answer}}


COUNTERFACT = Layout("CounterFact", lambda row: isinstance(row.get("requested_rewrite"), dict), convert, FIELDS)


class CounterFactDataset(RecordDataset):
    """CounterFact in its original layout (``requested_rewrite``, ...) or the flat one (``prompt``, ``target_new``...).

    Each item is a dict with ``prompt``, ``target_new``, ``ground_truth``, ``subject``, ``rephrase_prompt``,
    ``locality_prompt``, ``locality_ground_truth`` and ``case_id``; those of the original layout also have all
    ``paraphrase_prompts`` and ``neighborhood_prompts``. The requests have every probe: ``locality["neighborhood"]``
    with the true answer of the edited fact, ``["attribute"]`` with the new one, and ``distracting``,
    ``other_attribute``, ``portability["one_hop"]`` and ``["subject_replace"]`` where the file has them.
    """

    layout = COUNTERFACT

    def _layout_of(self, rows: Sequence[dict[str, Any]]) -> Layout:
        return COUNTERFACT if any("requested_rewrite" in row for row in rows) else OWN

    def _item(self, record: Record) -> dict[str, Any]:
        row, request = record.row, record.request
        if "requested_rewrite" not in row:
            return {"case_id": record.index, **row}
        paraphrases, neighbours = (list(row.get(f"{kind}_prompts") or []) for kind in ("paraphrase", "neighborhood"))
        return {
            "case_id": row.get("case_id", record.index),
            "prompt": request.prompt,
            "target_new": request.target_new,
            "ground_truth": request.ground_truth,
            "subject": request.subject,
            "rephrase_prompt": paraphrases[0] if paraphrases else None,
            "locality_prompt": neighbours[0] if neighbours else None,
            "locality_ground_truth": request.ground_truth if neighbours else None,
            "paraphrase_prompts": paraphrases,
            "neighborhood_prompts": neighbours,
        }
