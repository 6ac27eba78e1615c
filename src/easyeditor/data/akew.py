"""AKEW (Wu et al., EMNLP 2024, arXiv:2402.18909): the same facts as triples and as a paragraph that tells them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from easyeditor.data.counterfact import PLACE
from easyeditor.data.dataset import RecordDataset
from easyeditor.data.mquake import edits_of, multi_hop, other_hops
from easyeditor.data.records import (
    Layout,
    Record,
    case_id,
    matching_subject,
    take,
    take_objects,
    take_probe,
    take_texts,
)
from easyeditor.data.unke import UNKE
from easyeditor.errors import UsageError, did_you_mean
from easyeditor.requests import EditRequest

FILES = {
    "wikiupdate": "AKEW/WikiUpdate.json",
    "counterfact": "AKEW/CounterFact.json",
    "mquake": "AKEW/MQuAKE-CF.json",
    "unke": "UnKE/final_data_v3.json",
}


def _object(rewrite: Mapping[str, Any], which: str, record: str) -> str | None:
    """An object of a rewrite: ``target_new`` with its ``str``, or ``answer_new``."""
    found = rewrite.get(f"target_{which}")
    text = found.get("str") if isinstance(found, Mapping) else rewrite.get(f"answer_{which}")
    if which == "new" and not isinstance(text, str):
        return take(rewrite, "answer_new", str, record, PLACE)
    return text if isinstance(text, str) else None


def _prompts(rewrite: Mapping[str, Any], record: str) -> list[str]:
    """The prompt with its subject, then the question and the full prompt where there are any."""
    template, subject = (take(rewrite, key, str, record, PLACE) for key in ("prompt", "subject"))
    others = [text for key in ("question", "prompt_full") for text in take_texts(rewrite, key, record)]
    return list(dict.fromkeys([template.replace("{}", subject), *others]))


def _structured(row: Mapping[str, Any], record: str) -> EditRequest:
    rewrite = take(row, "requested_rewrite", dict, record)
    prompt, *others = _prompts(rewrite, record)
    old = _object(rewrite, "true", record)
    near = take_texts(row, "neighborhood_prompts", record)
    return EditRequest.from_dict(
        {
            "prompt": prompt,
            "target_new": _object(rewrite, "new", record),
            "subject": matching_subject(rewrite, prompt),
            "ground_truth": old,
            "rephrase_prompts": [*others, *take_texts(row, "paraphrase_prompts", record)],
            "locality": {
                "neighborhood": {"prompt": near, "ground_truth": [old or ""] * len(near)} if near else None,
                "unrelated": take_probe(row, "loc", "loc_ans", record),
                "neighbour_hops": other_hops(row, record),
            },
            "portability": multi_hop(row, record),
            "case_id": case_id(row, "case_id"),
        },
        record,
    )


def _unstructured(row: Mapping[str, Any], record: str) -> EditRequest:
    rewrite = take(row, "requested_rewrite", dict, record)
    filled, *questions = _prompts(rewrite, record)
    prompt, *others = [*questions, filled]
    facts = take_objects(rewrite, "unsfact_triplets_GPT", record, "with 'prompt', 'subject' and 'target'")
    place = f"{PLACE}unsfact_triplets_GPT."
    triples = [[take(fact, key, str, record, place) for key in ("prompt", "subject", "target")] for fact in facts]
    return EditRequest.from_dict(
        {
            "prompt": prompt,
            "target_new": take(rewrite, "fact_new_uns", str, record, PLACE),
            "subject": matching_subject(rewrite, prompt),
            "ground_truth": _object(rewrite, "true", record),
            "rephrase_prompts": [*others, *take_texts(row, "paraphrase_prompts", record)],
            "locality": {
                "unrelated": take_probe(row, "loc", "loc_ans", record),
                "neighbour_hops": other_hops(row, record),
            },
            "portability": {
                "sub_question": [{"prompt": p.replace("{}", s), "ground_truth": t} for p, s, t in triples if t.strip()],
                **multi_hop(row, record),
            },
            "case_id": case_id(row, "case_id"),
        },
        record,
    )


def _told_by(row: Mapping[str, Any]) -> bool:
    rewrites = row.get("requested_rewrite")
    return isinstance(rewrites, dict) and bool({"fact_new_uns", "answer_new"} & rewrites.keys())


AKEW = Layout("AKEW", _told_by, _structured, parts=edits_of)
AKEW_TEXTS = Layout("AKEW, unstructured", _told_by, _unstructured, parts=edits_of)


class AKEWUnifiedDataset(RecordDataset):
    """AKEW, and UnKEBench beside it.

    Args:
        data_dir: A file, or the folder that holds ``AKEW/WikiUpdate.json``, ``AKEW/CounterFact.json``,
            ``AKEW/MQuAKE-CF.json`` and ``UnKE/final_data_v3.json``.
        dataset_type: Which of them: ``wikiupdate``, ``counterfact``, ``mquake`` or ``unke``.
        size: Use at most this many records.
        config: Kept as it is.
        model_name: Not used: a model's chat template is put around a prompt when the model is asked.
        use_unstructured_data: Edit in the paragraphs. Items have ``id``, ``question``, ``para_question``, ``answer``,
            ``sub_question``, ``sub_answer``; else ``case_id``, ``subject``, ``prompt``, ``target_new``,
            ``ground_truth``, ``rephrase``, ``locality``, ``locality_ans``, ``portability_prompt``,
            ``portability_ground_truth``.

    Raises:
        UsageError: There is no such file or data set, or a record cannot be used.
    """

    layout = AKEW

    def __init__(
        self,
        data_dir: str | Path,
        dataset_type: str = "wikiupdate",
        size: int | None = None,
        config: Any = None,
        model_name: str | None = None,
        use_unstructured_data: bool = False,
    ) -> None:
        kind = dataset_type.lower().replace("-", "").removesuffix("cf")
        if kind not in FILES:
            raise UsageError(f"AKEW has no data set '{dataset_type}'. {did_you_mean(dataset_type, FILES)}")
        unstructured = AKEW_TEXTS if use_unstructured_data else AKEW
        self.layout = UNKE if kind == "unke" else unstructured
        super().__init__(Path(data_dir) / FILES[kind] if Path(data_dir).is_dir() else data_dir, size, config)

    def _item(self, record: Record) -> dict[str, Any]:
        request = record.request
        rephrase = request.rephrase_prompts[0] if request.rephrase_prompts else None
        if self.layout is not AKEW:
            parts = request.portability.get("sub_question", ())
            return {
                "id": record.index,
                "question": request.prompt,
                "para_question": rephrase,
                "answer": request.target_new,
                "sub_question": [probe.prompt for probe in parts],
                "sub_answer": [probe.answers[0] for probe in parts],
            }
        near = next((group[0] for group in request.locality.values()), None)
        hops = [probe for group in request.portability.values() for probe in group]
        return {
            "case_id": record.index if request.case_id is None else request.case_id,
            "subject": request.subject,
            "prompt": request.prompt,
            "target_new": request.target_new,
            "ground_truth": request.ground_truth,
            "rephrase": rephrase,
            "locality": near.prompt if near else None,
            "locality_ans": near.answers[0] if near and near.answers else None,
            "portability_prompt": [probe.prompt for probe in hops],
            "portability_ground_truth": [probe.answers[0] for probe in hops],
        }
