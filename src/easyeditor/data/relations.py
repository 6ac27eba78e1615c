"""LRE relations (Hernandez et al., ICLR 2024, arXiv:2308.09124): true triples by relation, made into edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from easyeditor.data.dataset import RecordDataset
from easyeditor.data.records import Layout, fill, take, take_objects, take_texts
from easyeditor.errors import UsageError
from easyeditor.requests import EditRequest

NEIGHBOURS = 3


def _parts(rows: Sequence[dict[str, Any]], index: int, record: str) -> list[dict[str, Any]]:
    """One row per triple; the new object is the next one in the file that is not true of the subject.

    Triples of a relation whose subjects share all objects are left out.
    """
    relation = rows[index]
    samples = take_objects(relation, "samples", record, "with 'subject' and 'object'")
    triples = [_triple(sample, record) for sample in samples]
    true: dict[str, set[str]] = {}
    for subject, answer in triples:
        true.setdefault(subject, set()).add(answer)
    parts = []
    for place, (subject, answer) in enumerate(triples):
        after = [*triples[place + 1 :], *triples[:place]]
        new = next((other for _, other in after if other not in true[subject]), None)
        near = [other for other in after[: 4 * NEIGHBOURS] if other[0] != subject][:NEIGHBOURS]
        parts.append({**relation, "subject": subject, "object": answer, "new": new, "near": near, "true": true})
    return parts


def _triple(sample: Mapping[str, Any], record: str) -> tuple[str, str]:
    subject, answer = (take(sample, key, str, record, "samples.").strip() for key in ("subject", "object"))
    return subject, answer


def _convert(row: Mapping[str, Any], record: str) -> EditRequest:
    templates = take_texts(row, "prompt_templates", record)
    if not templates:
        raise UsageError(f"{record}, field 'prompt_templates': it holds no template. Give a text with '{{}}' in it.")
    others = [text for text in take_texts(row, "prompt_templates_zs", record) if text not in templates]
    prompt, *rephrase = (fill(text, row["subject"], record, "prompt_templates") for text in [*templates, *others])
    return EditRequest.from_dict(
        {
            "prompt": prompt,
            "target_new": row["new"],
            "subject": row["subject"],
            "ground_truth": row["object"],
            "rephrase_prompts": rephrase,
            "locality": {
                "neighborhood": [
                    {"prompt": templates[0].replace("{}", other), "ground_truth": sorted(row["true"][other])}
                    for other, _ in row["near"]
                ]
            },
        },
        record,
    )


RELATIONS = Layout(
    "LRE relations",
    lambda row: {"prompt_templates", "samples"} <= row.keys(),
    _convert,
    parts=_parts,
    usable=lambda row: row["new"] is not None,
    skipped="their relation has no other object",
    whole=True,
)


class RelationsDataset(RecordDataset):
    """One relation of LRE: each true triple as an edit to another object of the relation; items are request dicts."""

    layout = RELATIONS
