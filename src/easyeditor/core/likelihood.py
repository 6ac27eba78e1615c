"""How likely a model finds answers: prompts joined with answers, as padded rows that know the answer's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from easyeditor.lm.model import LM, logits_of
from easyeditor.lm.resume import head_at
from easyeditor.lm.text import pad


@dataclass(frozen=True)
class Answers:
    """Prompts with their answers, ready for a teacher-forced pass.

    Args:
        ids: What the model reads, (rows, length).
        mask: Which places are filled, (rows, length).
        decoder_ids: What the decoder reads, (rows, length), for an encoder-decoder model.
        rows: Of each answer token, (tokens,).
        columns: The position whose logits predict it, (tokens,).
        labels: The answer tokens, (tokens,).
    """

    ids: Tensor
    mask: Tensor
    decoder_ids: Tensor | None
    rows: Tensor
    columns: Tensor
    labels: Tensor


def answers(lm: LM, pairs: Sequence[tuple[str, str]], at_prompt_end: bool = False) -> Answers:
    """Encode prompts with their answers.

    Args:
        lm: The model.
        pairs: Prompt, as the model is to be asked (prompt edits and chat template applied), and answer.
        at_prompt_end: Whether all tokens of an answer are predicted from the prompt's last token (FT-L).

    Returns:
        The rows, padded on the right.
    """
    if lm.seq2seq:
        return _seq2seq(lm, pairs)
    encoded = [lm.text.encode_pair(prompt, answer) for prompt, answer in pairs]
    where = [
        (i, first - 1 if at_prompt_end else first - 1 + j, label)
        for i, (row, first) in enumerate(encoded)
        for j, label in enumerate(row.ids[first:])
    ]
    inputs = [row.ids[:first] if at_prompt_end else row.ids[:-1] for row, first in encoded]
    ids, mask = pad(inputs, lm.text.pad_id, "right", lm.device)
    return Answers(ids, mask, None, *_columns(where, lm.device))


def _seq2seq(lm: LM, pairs: Sequence[tuple[str, str]]) -> Answers:
    ids, mask = pad([lm.text.encode(prompt).ids for prompt, _ in pairs], lm.text.pad_id, "right", lm.device)
    labels = [lm.text.encode(answer).ids for _, answer in pairs]
    decoder_ids, _ = pad([(lm.decoder_start, *row[:-1]) for row in labels], lm.text.pad_id, "right", lm.device)
    where = [(i, j, label) for i, row in enumerate(labels) for j, label in enumerate(row)]
    return Answers(ids, mask, decoder_ids, *_columns(where, lm.device))


def _columns(where: list[tuple[int, int, int]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns, labels = torch.tensor(where, dtype=torch.long, device=device).T
    return rows, columns, labels


def answer_logits(lm: LM, batch: Answers) -> Tensor:
    """The logits that predict each answer token, (tokens, vocab); the head sees no other position."""
    with head_at(lm, batch.rows, batch.columns) as at:
        out = lm.run(batch.ids, batch.mask, decoder_input_ids=batch.decoder_ids)
    return at.logits(logits_of(out))


def token_log_probs(lm: LM, batch: Answers) -> Tensor:
    """The log-probability of each answer token, (tokens,), fp32."""
    logp = answer_logits(lm, batch).float().log_softmax(-1)
    return logp.gather(1, batch.labels[:, None].to(logp.device)).squeeze(1)


def mean_per_row(values: Tensor, batch: Answers) -> Tensor:
    """The mean over the tokens of each answer, (rows,)."""
    rows = batch.rows.to(values.device)
    count = torch.bincount(rows, minlength=len(batch.ids))
    total = torch.zeros(len(batch.ids), device=values.device, dtype=values.dtype).index_add(0, rows, values)
    return total / count
