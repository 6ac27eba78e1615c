"""How varied a text is: the weighted entropy of its n-grams, and how much of it repeats.

ROME, section 3.4; Zhang et al., 2018; Welleck et al., 2020, arXiv:1908.04319 (seq-rep-n).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

WORD = re.compile(r"\w+(?:'\w+)?|[^\w\s]")
WEIGHTS = ((2, 2 / 3), (3, 4 / 3))
REPEATED = 4  # words of a sequence that counts as a repetition


def words(text: str) -> list[str]:
    """The words and punctuation marks of a text."""
    return WORD.findall(text)


def ngram_entropy(texts: Sequence[str]) -> float | None:
    """The mean over texts of the weighted mean of bigram and trigram entropy, in bits.

    Args:
        texts: Generated texts.

    Returns:
        The entropy with weights 2/3 and 4/3 for n = 2 and 3; None if no text has three words.
    """
    found = [score for text in texts if (score := _one(words(text))) is not None]
    return sum(found) / len(found) if found else None


def _one(tokens: list[str]) -> float | None:
    if len(tokens) < WEIGHTS[-1][0]:
        return None
    return sum(weight * _entropy(tokens, n) for n, weight in WEIGHTS) / len(WEIGHTS)


def _entropy(tokens: list[str], n: int) -> float:
    counts = Counter(zip(*(tokens[i:] for i in range(n)), strict=False))
    total = sum(counts.values())
    return -sum(c / total * math.log2(c / total) for c in counts.values())


def repetition(texts: Sequence[str]) -> float | None:
    """The share of sequences of four words that occurred before in the same text: 1 - distinct / all.

    Args:
        texts: Generated texts.

    Returns:
        The mean over texts, between 0 and 1; None if no text has four words.
    """
    found = []
    for text in texts:
        tokens = words(text)
        grams = list(zip(*(tokens[i:] for i in range(REPEATED)), strict=False))
        if grams:
            found.append(1 - len(set(grams)) / len(grams))
    return sum(found) / len(found) if found else None
