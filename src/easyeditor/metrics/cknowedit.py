"""The score of CKnowEdit: how near free answers come to the references, with fluency, as one number.

Fang et al., "CKnowEdit", 2024, arXiv:2409.05806:
total = 0.2 edit + 0.35 portability + 0.35 locality + 0.1 (10 fluency), each part 0 to 100 but for the fluency, in bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from easyeditor.metrics.overlap import rouge_recall, similarity
from easyeditor.requests import EditRequest

WEIGHTS = (("edit", 0.2), ("portability", 0.35), ("locality", 0.35), ("fluency", 1.0))
Pair = tuple[str, str]


def cknowedit(records: Iterable[Mapping[str, Any]], encoder: str, phase: str = "post") -> dict[str, float | None]:
    """Score records of an editor.

    Args:
        records: With ``requested_rewrite`` and, under the phase, ``rewrite_gen_content``, the answers to locality and
            portability probes, and ``fluency`` (``test_generation=True``).
        encoder: A sentence-transformers folder.
        phase: ``pre``, ``post`` or ``final``.

    Returns:
        ``edit``, ``portability``, ``locality``: 100 times the mean of `nearness` to the new answer or the references;
        ``fluency``: the mean n-gram entropy; ``total``. None where there is nothing to score.

    Raises:
        MissingExtra: rouge-score or sentence-transformers is not installed.
        UsageError: The folder holds no such model.
    """
    pairs: dict[str, list[Pair]] = {"edit": [], "portability": [], "locality": []}
    entropies = []
    for record in records:
        request = EditRequest.from_dict(record["requested_rewrite"], "A record")
        scores = record[phase]
        pairs["edit"].append((scores["rewrite_gen_content"][0], request.target_new))
        for group, named in (("portability", request.portability), ("locality", request.locality)):
            for name, probes in named.items():
                said = zip(scores[group][f"{name}_gen_content"], probes, strict=True)
                pairs[group] += [(text, probe.answers[0]) for text, probe in said if probe.answers]
        entropies.append((scores.get("fluency") or {}).get("ngram_entropy"))
    found = {name: _percent(nearness(listed, encoder)) for name, listed in pairs.items()}
    found["fluency"] = _mean(entropies)
    parts = [(found[name], weight) for name, weight in WEIGHTS]
    known = [value * weight for value, weight in parts if value is not None]
    return {**found, "total": sum(known) if len(known) == len(parts) else None}


def nearness(pairs: Sequence[Pair], encoder: str) -> list[float | None]:
    """The mean of ROUGE-L recall and of the cosine of sentence embeddings.

    Args:
        pairs: What was said, and the reference.
        encoder: A sentence-transformers folder.

    Returns:
        At most 1 each; 0 for an empty answer, None for an empty reference.
    """
    if not pairs:
        return []
    recalls = [rouge_recall(*pair)["rougeL"] for pair in pairs]
    cosines = similarity([said for said, _ in pairs], [reference for _, reference in pairs], encoder)
    return [None if r is None else (r + (c or 0.0)) / 2 for r, c in zip(recalls, cosines, strict=True)]


def _percent(values: Sequence[float | None]) -> float | None:
    mean = _mean(values)
    return None if mean is None else 100 * mean


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
