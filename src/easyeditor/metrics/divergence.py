"""How far the next-token distribution moved: the Jensen-Shannon divergence, in bits. Lin, 1991.

A distribution is stored as its 256 likeliest tokens; what is left of the probability is spread evenly over all other
tokens. The divergence is exact between two distributions stored like this, and 0 between equal ones.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

KEPT = 256


@dataclass(frozen=True)
class Stored:
    """A distribution over the vocabulary.

    Args:
        tokens: Those that are stored, ascending, (kept,).
        probs: Their probabilities, (kept,), float64.
        vocab: How many tokens there are.
    """

    tokens: NDArray[np.int64]
    probs: NDArray[np.float64]
    vocab: int

    @property
    def other(self) -> float:
        """The probability of each token that is not stored."""
        left = self.vocab - len(self.tokens)
        return max(1.0 - float(self.probs.sum()), 0.0) / left if left else 0.0

    def at(self, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
        """The probabilities of some tokens, (n,)."""
        where = np.searchsorted(self.tokens, tokens).clip(max=len(self.tokens) - 1)
        return np.where(self.tokens[where] == tokens, self.probs[where], self.other)


def pack(logits: Tensor) -> str:
    """A distribution as text.

    Args:
        logits: Of the next token, (vocab,).

    Returns:
        ``<vocab>:<base64>``: the tokens (uint32) and their log-probabilities (float32), about 2.7 KB.
    """
    logp = logits.detach().float().cpu().log_softmax(-1)
    best = logp.topk(min(KEPT, len(logp))).indices.sort().values
    raw = best.numpy().astype("<u4").tobytes() + logp[best].numpy().astype("<f4").tobytes()
    return f"{len(logp)}:{base64.b64encode(raw).decode('ascii')}"


def unpack(text: str) -> Stored:
    """What `pack` wrote."""
    vocab, _, coded = text.partition(":")
    raw = base64.b64decode(coded)
    half = len(raw) // 2
    tokens = np.frombuffer(raw[:half], "<u4").astype(np.int64)
    return Stored(tokens, np.exp(np.frombuffer(raw[half:], "<f4").astype(np.float64)), int(vocab))


def jensen_shannon(a: str, b: str) -> float | None:
    """The divergence of two packed distributions.

    Args:
        a: What `pack` wrote of one model.
        b: Likewise of another, for the same prompt.

    Returns:
        Between 0 (equal) and 1 bit (nothing in common); None for vocabularies of different sizes.
    """
    p, q = unpack(a), unpack(b)
    if p.vocab != q.vocab:
        return None
    tokens = np.union1d(p.tokens, q.tokens)
    rest = p.vocab - len(tokens)
    x, y = np.append(p.at(tokens), rest * p.other), np.append(q.at(tokens), rest * q.other)
    x, y = x / x.sum(), y / y.sum()
    return float(np.clip((_bits(x, (x + y) / 2) + _bits(y, (x + y) / 2)) / 2, 0.0, 1.0))


def _bits(x: NDArray[np.float64], middle: NDArray[np.float64]) -> float:
    """The Kullback-Leibler divergence from x to the middle, in bits."""
    some = x > 0
    return float((x[some] * np.log2(x[some] / middle[some])).sum())


def next_token(logits: Tensor) -> str | None:
    """`pack`, or None where the logits are not finite numbers."""
    return pack(logits) if bool(torch.isfinite(logits).all()) else None
