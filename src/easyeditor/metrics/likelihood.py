"""What a model makes of given answers: teacher-forced token accuracy and probabilities.

The answer stands in the input, so these numbers flatter; they are for comparison with the literature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from easyeditor.core.likelihood import answer_logits, answers
from easyeditor.errors import UsageError
from easyeditor.lm.model import LM, logits_of
from easyeditor.lm.text import pad


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


@torch.no_grad()
def read_texts(lm: LM, texts: Sequence[str], max_tokens: int | None = None, batch_size: int = 8) -> list[list[float]]:
    """The log-probability of each token of texts after those before it.

    Args:
        lm: The model with whatever edits are on it.
        texts: Texts as they are.
        max_tokens: How many tokens of each are read; None: all.
        batch_size: Texts per forward pass; it does not change the result.

    Returns:
        One list per text; the first token has nothing before it and is left out.

    Raises:
        UsageError: The model reads one text and writes another.
    """
    if lm.seq2seq:
        raise UsageError("The likelihood of a text needs a decoder-only model; this one is an encoder-decoder.")
    rows = [lm.text.encode(text).ids[:max_tokens] for text in texts]
    out: list[list[float]] = [[] for _ in rows]
    order = sorted((i for i, row in enumerate(rows) if len(row) > 1), key=lambda i: len(rows[i]))
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        ids, mask = pad([rows[i] for i in part], lm.text.pad_id, "right", lm.device)
        logp = logits_of(lm.run(ids, mask))[:, :-1].float().log_softmax(-1)
        gold = logp.gather(-1, ids[:, 1:, None].to(logp.device)).squeeze(-1)
        for i, row in zip(part, gold.tolist(), strict=True):
            out[i] = row[: len(rows[i]) - 1]
    return out
