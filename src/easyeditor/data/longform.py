"""LEME (Rosati et al., NAACL 2024, arXiv:2402.09394): CounterFact and zsRE with passages to be written at length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from easyeditor.data import counterfact, zsre
from easyeditor.data.dataset import RecordDataset
from easyeditor.data.records import Layout, Record, take, take_probe, take_probes, take_texts
from easyeditor.errors import UsageError, did_you_mean
from easyeditor.requests import EditRequest, Probe, probes_of

COUPLED = "coupled_prompts_and_properties"
TYPES = ("zsre", "counterfact")


def _convert(row: Mapping[str, Any], record: str) -> EditRequest:
    convert = counterfact.convert if "requested_rewrite" in row else zsre.convert
    request = convert(row, record)
    coupled = take(row, COUPLED, dict, record)
    own = take_texts(take(coupled, "subject_entity", dict, record, f"{COUPLED}."), "coupled_prompt", record)
    asked = {"longform_subject": tuple(map(Probe, own))} if own else {}
    for name, question, answer in (("personas", "personas", "alt"), ("multi_hop", "mhop", "mhop_ans")):
        probe = take_probe(row, question, answer, record)
        if probe:
            asked[name] = probes_of(record, question, probe["prompt"], probe["ground_truth"])
    return replace(
        request,
        locality={**request.locality, **_related(coupled, record)},
        portability={**request.portability, **asked},
    )


def _related(coupled: Mapping[str, Any], record: str) -> dict[str, tuple[Probe, ...]]:
    """Passages about entities that are coupled to the subject; what they say is compared with what they said."""
    take_probes(coupled, "coupled_entities", "entity", "entity", record)
    prompts = [
        text for each in coupled.get("coupled_entities") or [] for text in take_texts(each, "coupled_prompt", record)
    ]
    return {"longform_coupled_entities": tuple(map(Probe, prompts))} if prompts else {}


LEME = Layout("LEME", lambda row: COUPLED in row, _convert, usable=zsre.has_edit, skipped=zsre.ZSRE.skipped)


class LongFormEditDataset(RecordDataset):
    """LEME.

    Args:
        data_dir: The file.
        dataset_type: ``zsre`` or ``counterfact``; only checked, for the records show which they are.
        size: Use at most this many records.
        config: Kept as it is.

    Each item is a dict with ``case_id``, ``subject``, ``prompt``, ``target_new``, ``ground_truth``, ``rephrase``,
    ``locality``, ``locality_ans``, ``cond``, ``longform_subject_prompt``, ``longform_coupled_entities``,
    ``portability_personas``, ``portability_hop`` and ``portability_hop_ans``; None where a record has nothing.
    """

    layout = LEME

    def __init__(
        self, data_dir: str | Path, dataset_type: str = "zsre", size: int | None = None, config: Any = None
    ) -> None:
        if dataset_type not in TYPES:
            raise UsageError(f"LEME has no data set '{dataset_type}'. {did_you_mean(dataset_type, TYPES)}")
        super().__init__(data_dir, size, config)

    def _item(self, record: Record) -> dict[str, Any]:
        row, request = record.row, record.request
        near = next((group[0] for group in request.locality.values()), None)
        coupled = row[COUPLED]
        return {
            "case_id": row.get("case_id", record.index),
            "subject": request.subject,
            "prompt": request.prompt,
            "target_new": request.target_new,
            "ground_truth": request.ground_truth,
            "rephrase": next(iter(request.rephrase_prompts), None),
            "locality": near.prompt if near else None,
            "locality_ans": near.answers[0] if near and near.answers else None,
            "cond": f"{request.ground_truth or ''} >> {request.target_new} || {request.prompt}",
            "longform_subject_prompt": coupled["subject_entity"].get("coupled_prompt"),
            "longform_coupled_entities": coupled.get("coupled_entities") or [],
            "portability_personas": row.get("personas"),
            "portability_hop": row.get("mhop"),
            "portability_hop_ans": row.get("mhop_ans"),
        }
