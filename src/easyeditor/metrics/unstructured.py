"""Long answers about paragraphs, as UnKE and AKEW score them: how far they overlap with the target.

Deng et al., "UnKE", ICLR 2025, arXiv:2405.15349; Wu et al., "AKEW", EMNLP 2024, arXiv:2402.18909.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

from easyeditor.errors import UsageError
from easyeditor.metrics.overlap import bleu, rouge_recall, similarity

PARTS = {  # name -> where the answers are, and where what they should be is
    "Original": ("original_prediction", "answer"),
    "Para": ("para_prediction", "answer"),
    "Sub": ("sub_pred", "sub_answer"),
}
NAMES = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}


def unstructured(rows: Iterable[Mapping[str, Any]], encoder: str | None) -> dict[str, dict[str, float | None]]:
    """Average the overlap of answers with their targets.

    Args:
        rows: ``answer`` and ``original_prediction``; as far as they were asked, ``para_prediction``, and ``sub_answer``
            with ``sub_pred`` (lists).
        encoder: A sentence-transformers folder; None: no similarity.

    Returns:
        ``Original``, ``Para``, ``Sub`` -> ``BLEU`` (over characters), the recall of ``ROUGE-1``, ``ROUGE-2`` and
        ``ROUGE-L``, ``Bert Score`` (existing scripts call the cosine of sentence embeddings so): 0 to 1; and ``n``.

    Raises:
        UsageError: There is no row, or one lacks a field.
        MissingExtra: A package is not installed.
    """
    listed = list(rows)
    if not listed:
        raise UsageError("There are no results to score. Name a file with a list of answered records.")
    found = {}
    for name, (said, target) in PARTS.items():
        pairs = [pair for i, row in enumerate(listed) for pair in _pairs(row, said, target, i)]
        if pairs:
            found[name] = _means(pairs, encoder)
    return found


def _pairs(row: Mapping[str, Any], said: str, target: str, number: int) -> list[tuple[str, str]]:
    if said not in row and said != PARTS["Original"][0]:
        return []
    if missing := [key for key in (said, target) if key not in row]:
        raise UsageError(f"Result {number}, field '{missing[0]}': it is missing. Give '{said}' and '{target}'.")
    one, other = (value if isinstance(value, list) else [value] for value in (row[said], row[target]))
    if len(one) != len(other):
        raise UsageError(f"Result {number}: {len(one)} texts in '{said}' and {len(other)} in '{target}'.")
    return [(str(a), str(b)) for a, b in zip(one, other, strict=True)]


def _means(pairs: list[tuple[str, str]], encoder: str | None) -> dict[str, float | None]:
    recalls = [rouge_recall(*pair) for pair in pairs]
    scores: dict[str, list[float | None]] = {"BLEU": [bleu(*pair, tokens="char") for pair in pairs]}
    scores |= {shown: [recall[name] for recall in recalls] for name, shown in NAMES.items()}
    if encoder is not None:
        scores["Bert Score"] = similarity([a for a, _ in pairs], [b for _, b in pairs], encoder)
    means: dict[str, float | None] = {}
    for name, values in scores.items():
        known = [value for value in values if value is not None]
        means[name] = fmean(known) if known else None
    return {**means, "n": len(pairs)}
