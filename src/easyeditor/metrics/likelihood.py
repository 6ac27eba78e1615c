"""What a model makes of given answers: teacher-forced token accuracy and probabilities.

The answer stands in the input, so these numbers flatter; they are for comparison with the literature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from easyeditor.core.likelihood import answer_logits, answers
from easyeditor.lm.model import LM


@dataclass(frozen=True)
class Reading:
    """How a model reads one answer.

    Args:
        predicted: The likeliest token at each place of the answer.
        accuracy: The share of these that are the answer's.
        log_prob: The mean log-probability of the answer's tokens, natural logarithm.
    """

    predicted: tuple[int, ...]
    accuracy: float
    log_prob: float


@torch.no_grad()
def read(lm: LM, pairs: Sequence[tuple[str, str]], batch_size: int = 16) -> dict[tuple[str, str], Reading]:
    """Read answers after prompts; equal pairs are read once.

    Args:
        lm: The model with whatever edits are on it.
        pairs: Prompt, as a person writes it, and answer.
        batch_size: Pairs per forward pass; it does not change the result.

    Returns:
        Pair -> how it is read.
    """
    unique = sorted(set(pairs), key=lambda pair: len(pair[0]) + len(pair[1]))
    out: dict[tuple[str, str], Reading] = {}
    for start in range(0, len(unique), batch_size):
        part = unique[start : start + batch_size]
        batch = answers(lm, [(lm.rewrite(prompt), answer) for prompt, answer in part])
        logp = answer_logits(lm, batch).float().log_softmax(-1)
        labels, rows = batch.labels.to(logp.device), batch.rows.to(logp.device)
        gold, best = logp.gather(1, labels[:, None]).squeeze(1), logp.argmax(-1)
        for i, pair in enumerate(part):
            own = rows == i
            hits = (best[own] == labels[own]).float().mean()
            out[pair] = Reading(tuple(best[own].tolist()), float(hits), float(gold[own].mean()))
    return out
