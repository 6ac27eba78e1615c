"""How varied a text is: the weighted entropy of its n-grams. ROME, section 3.4; Zhang et al., 2018."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

WORD = re.compile(r"\w+(?:'\w+)?|[^\w\s]")
WEIGHTS = ((2, 2 / 3), (3, 4 / 3))


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
