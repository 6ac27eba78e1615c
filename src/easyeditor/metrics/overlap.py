"""How near a long answer comes to the whole target: ROUGE, BLEU, cosine of sentence embeddings.

ROUGE: Lin, 2004 (rouge-score). BLEU: Papineni et al., 2002; Post, 2018 (sacrebleu). For answers of a sentence and more,
as in UnKE and AKEW; a short answer is right or wrong, which is what exact match says.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

from easyeditor.errors import MissingExtra, UsageError

WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_]+")  # a character of CJK, or a word
CJK = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]")


class _Words:
    """The tokenizer of rouge-score knows ASCII only, so that any Chinese answer would score 0."""

    def tokenize(self, text: str) -> list[str]:
        return [token.casefold() for token in WORD.findall(text)]


def rouge(said: str, target: str) -> dict[str, float | None]:
    """ROUGE of an answer.

    Args:
        said: What the model said.
        target: What it should say.

    Returns:
        ``rouge1``, ``rouge2``, ``rougeL`` (F-measure) and ``rougeL_recall`` (as UnKE and AKEW report it), 0 to 1; None
        where the target has no such n-gram.

    Raises:
        MissingExtra: rouge-score is not installed.
    """
    found = _rouge(said, target)
    out = {name: None if score is None else float(score.fmeasure) for name, score in found.items()}
    return {**out, "rougeL_recall": None if found["rougeL"] is None else float(found["rougeL"].recall)}


def rouge_recall(said: str, target: str) -> dict[str, float | None]:
    """The recall of ``rouge1``, ``rouge2`` and ``rougeL``; see `rouge`."""
    return {name: None if score is None else float(score.recall) for name, score in _rouge(said, target).items()}


def _rouge(said: str, target: str) -> dict[str, Any]:
    scorer = _package("rouge_score.rouge_scorer", "rouge-score", "ROUGE")
    needs = {"rouge1": 1, "rouge2": 2, "rougeL": 1}
    found = scorer.RougeScorer(list(needs), tokenizer=_Words()).score(target, said)
    words = len(_Words().tokenize(target))
    return {name: found[name] if words >= need else None for name, need in needs.items()}


def bleu(said: str, target: str, tokens: str | None = None) -> float | None:
    """Sentence BLEU of an answer, 0 to 1, with exponential smoothing; None for a target without a word.

    Args:
        said: What the model said.
        target: What it should say.
        tokens: A tokenizer of sacrebleu, such as ``char``; None: ``13a``, or ``zh`` for a Chinese target.

    Raises:
        MissingExtra: sacrebleu is not installed.
    """
    if not WORD.search(target):
        return None
    tokens = tokens or ("zh" if CJK.search(target) else "13a")
    return float(_package("sacrebleu", "sacrebleu", "BLEU").sentence_bleu(said, [target], tokenize=tokens).score) / 100


def similarity(said: Sequence[str], targets: Sequence[str], encoder: str) -> list[float | None]:
    """The cosine between the sentence embeddings of answers and targets.

    Args:
        said: What the model said.
        targets: What it should say, one per answer.
        encoder: A sentence-transformers folder.

    Returns:
        Between -1 and 1 each; None for an empty answer or target.

    Raises:
        MissingExtra: sentence-transformers is not installed.
        UsageError: The folder holds no such model.
    """
    pairs = list(zip(said, targets, strict=True))
    model = _encoder(encoder)
    whole = [pair for pair in pairs if all(text.strip() for text in pair)]
    a, b = (model.encode([pair[i] for pair in whole], normalize_embeddings=True) for i in (0, 1)) if whole else ((), ())
    cosines = {pair: float((x * y).sum()) for pair, x, y in zip(whole, a, b, strict=True)}
    return [cosines.get(pair) for pair in pairs]


@cache
def _encoder(folder: str) -> Any:
    package = _package("sentence_transformers", "easyeditor[retrieval]", "Embedding similarity")
    try:
        return package.SentenceTransformer(folder)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"'{folder}' holds no sentence-transformers model ({str(error).splitlines()[0]}). "
            "Give the folder of one, such as a copy of all-MiniLM-L6-v2."
        ) from None


def _package(name: str, wheel: str, what: str) -> ModuleType:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError:
        raise MissingExtra(f"{what} needs a package that is not installed: pip install '{wheel}'.") from None
