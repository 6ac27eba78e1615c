"""HalluEditBench (Huang et al., ICLR 2025, arXiv:2410.16251): what a model got wrong, corrected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from easyeditor.data.dataset import RecordDataset
from easyeditor.data.records import Layout, Record, case_id, is_absent, matching_subject, take, take_probe, take_texts
from easyeditor.requests import EditRequest

HOPS = tuple(f"{number}hop" for number in range(2, 7))


def _said(row: Mapping[str, Any]) -> str | None:
    """What the model said before: the first ``output_...`` column that has a text."""
    texts = (row[key] for key in row if key.startswith("output_"))
    return next((text for text in texts if isinstance(text, str) and text.strip()), None)


def _convert(row: Mapping[str, Any], record: str) -> EditRequest:
    prompt, answer = take(row, "question", str, record), take(row, "object", str, record)
    given = {**row, "Yes": "Yes", "No": "No"}
    if not is_absent(row.get("multiple_choice_with_letters")):
        given["choice"] = f"{prompt}\n{take(row, 'multiple_choice_with_letters', str, record)}"
    asked = {
        "yes": ("yes_question", "Yes"),
        "no": ("no_question", "No"),
        "mcq": ("choice", "multiple_choice_labels"),
        "reversed": ("reversed_relation_question", "subject"),
        **{hop: (f"question_{hop}", f"answer_{hop}") for hop in HOPS},
    }
    near = take_texts(row, "locality_question", record)
    return EditRequest.from_dict(
        {
            "prompt": prompt,
            "target_new": answer,
            "subject": matching_subject(row, prompt),
            "ground_truth": _said(row),
            "rephrase_prompts": take_texts(row, "paraphrased_question", record),
            "locality": {"same_subject": {"prompt": near}} if near else {},
            "portability": {name: take_probe(given, *fields, record) for name, fields in asked.items()},
            "case_id": case_id(row, "case_id"),
        },
        record,
    )


HALLUEDIT = Layout("HalluEditBench", lambda row: {"relation", "object", "question"} <= row.keys(), _convert)


class HalluEditBenchDataset(RecordDataset):
    """HalluEditBench, CSV or JSON.

    Each item is a dict with ``case_id``, ``subject``, ``relation``, ``prompt``, ``target_new``, ``ground_truth``
    (what the model said before), ``efficacy``, ``generalization`` (``rephrase``, ``yes``, ``no``, ``mcq``,
    ``reversed``), ``portability`` (``2hop`` to ``6hop``) and ``locality``; each probe is a dict with ``prompt`` and
    ``ground_truth``.
    """

    layout = HALLUEDIT

    def _item(self, record: Record) -> dict[str, Any]:
        row, request = record.row, record.request
        probes = request.to_dict()["portability"]
        first = {"prompt": request.prompt, "ground_truth": request.target_new}
        again = [{"prompt": text, "ground_truth": request.target_new} for text in request.rephrase_prompts]
        return {
            "case_id": row.get("case_id", record.index),
            "subject": row.get("subject"),
            "relation": row["relation"],
            "prompt": request.prompt,
            "target_new": request.target_new,
            "ground_truth": request.ground_truth,
            "efficacy": first,
            "generalization": {
                **({"rephrase": again[0]} if again else {}),
                **{name: probe for name, probe in probes.items() if name not in HOPS},
            },
            "portability": {name: probe for name, probe in probes.items() if name in HOPS},
            "locality": request.to_dict()["locality"],
        }
