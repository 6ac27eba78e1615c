"""Batched, seeded continuation with a KV cache. Left padding happens here and nowhere else.

An answer ends where the model ends it: at an end-of-sequence token or a line break, at the latest after
``max_new_tokens``. Nothing here knows what the answer should be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from easyeditor.lm.decoding import decided, exits, watched_by
from easyeditor.lm.model import LM, logits_of
from easyeditor.lm.text import pad

FEWER = 0.75  # rows that have ended leave a batch when no more than this share of it is left

Choose = Callable[[Tensor], Tensor]  # (rows, vocab) -> (rows,)
Watch = Callable[[int, Tensor], None]  # row, logits of its first new token (vocab,)


def answer(
    lm: LM,
    prompts: Sequence[str],
    max_new_tokens: int = 24,
    batch_size: int = 8,
    *,
    one_line: bool = True,
    watch: Watch | None = None,
) -> list[str]:
    """What the model says to each prompt, greedily.

    Args:
        lm: The model, with whatever edits are on it.
        prompts: Prompts as a person writes them; prompt edits and the chat template are applied here.
        max_new_tokens: The longest answer, in tokens.
        batch_size: Prompts per forward pass; it does not change the answers.
        one_line: Whether a line break ends an answer.
        watch: Called for each prompt with its index and the logits of the first token of its answer.

    Returns:
        One answer per prompt, without the prompt and without surrounding space.
    """
    rows = [list(lm.text.encode(lm.rewrite(prompt)).ids) for prompt in prompts]
    out = continuations(lm, rows, max_new_tokens, batch_size, one_line=one_line, watch=watch)
    texts = [lm.text.decode(ids).strip() for ids in out]
    return [text.split("\n")[0].strip() for text in texts] if one_line else texts


def sample(lm: LM, prompts: Sequence[str], max_new_tokens: int, seed: int, top_k: int = 5) -> list[str]:
    """Random continuations of each prompt, drawn from the likeliest tokens; the same seed draws the same.

    Args:
        lm: The model.
        prompts: Texts to go on from, as they are.
        max_new_tokens: How many tokens to draw.
        seed: Of a generator of its own; the global one is not touched.
        top_k: From how many of the likeliest tokens each is drawn.

    Returns:
        The prompts with their continuations.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(logits: Tensor) -> Tensor:
        best = logits.float().cpu().topk(min(top_k, logits.shape[-1]), dim=-1)
        pick = torch.multinomial(best.values.softmax(-1), 1, generator=generator)
        return best.indices.gather(-1, pick).squeeze(-1)

    rows = [list(lm.text.encode(prompt).ids) for prompt in prompts]
    out = continuations(lm, rows, max_new_tokens, len(rows), draw)
    return [prompt + lm.text.decode(ids) for prompt, ids in zip(prompts, out, strict=True)]


def continuations(
    lm: LM,
    rows: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int = 8,
    choose: Choose | None = None,
    *,
    one_line: bool = True,
    watch: Watch | None = None,
) -> list[list[int]]:
    """The tokens that follow each row, up to and without the one that ends the answer.

    Args:
        lm: The model.
        rows: Token rows of any lengths.
        max_new_tokens: The longest continuation.
        batch_size: Rows per forward pass.
        choose: Logits (rows, vocab) to tokens (rows,); None: the likeliest.
        one_line: Whether a line break ends a continuation.
        watch: Called for each row with its index and the logits of its first new token, (vocab,).

    Returns:
        One list of tokens per row.
    """
    out: list[list[int]] = [[] for _ in rows]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for batch in _batches(lm, order, rows, batch_size):
        with torch.no_grad():
            found = _batch(lm, batch, rows, max_new_tokens, choose, one_line, watch)
            for i, ids in zip(batch, found, strict=True):
                out[i] = ids
    return out


def positions(lm: LM) -> int:
    """How many positions the model knows, as far as it says; 0 where it does not."""
    config: Any = getattr(lm.model, "config", None)
    inner = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(getattr(inner, "max_position_embeddings", None) or 0)


def _batches(lm: LM, order: list[int], rows: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Neighbours in length; a model that is moved by padding gets rows of one length only."""
    batch: list[int] = []
    for i in order:
        uneven = batch and len(rows[batch[-1]]) != len(rows[i]) and not lm.pads_left
        if batch and (len(batch) == max(batch_size, 1) or uneven):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _batch(
    lm: LM,
    batch: list[int],
    rows: Sequence[Sequence[int]],
    max_new_tokens: int,
    choose: Choose | None,
    one_line: bool,
    watch: Watch | None,
) -> list[list[int]]:
    ids, mask = pad([rows[i] for i in batch], lm.text.pad_id, "left", lm.device)
    out: list[list[int]] = [[] for _ in batch]
    running = there = list(range(len(batch)))  # rows that have not ended; rows that are passed through the model
    step = _Seq2SeqStep(lm, ids, mask) if lm.seq2seq else _CausalStep(lm, ids, mask)
    for n in range(max_new_tokens):
        with exits(lm, watched_by(lm.processors)) as seen:
            logits = decided(lm.processors, step.ids, step.logits(), seen)
        if watch is not None and n == 0:
            for i, row in enumerate(batch):
                watch(row, logits[i])
        chosen = (logits.argmax(-1) if choose is None else choose(logits)).to(ids.device)
        tokens = dict(zip(there, chosen.tolist(), strict=True))
        running = [
            i for i in running if not (tokens[i] in lm.text.eos_ids or (one_line and _breaks(lm, tokens[i], out[i])))
        ]
        for i in running:
            out[i].append(tokens[i])
        if not running:
            break
        step.append(chosen)
        if choose is None and len(running) <= FEWER * len(there):  # what is drawn depends on how many rows there are
            left = set(running)
            if step.keep(torch.tensor([n for n, i in enumerate(there) if i in left], device=ids.device)):
                there = running
    return out


def _breaks(lm: LM, token: int, before: list[int]) -> bool:
    """Whether a token is a line break behind some text."""
    return bool(before) and "\n" in lm.text.tokenizer.decode([token]) and bool(lm.text.decode(before).strip())


class _CausalStep:
    """Left-padded rows that grow by a token at a time; with a cache if the model gives one."""

    def __init__(self, lm: LM, ids: Tensor, mask: Tensor) -> None:
        self.lm, self.ids, self.mask = lm, ids, mask
        self.past: Any = None

    def logits(self) -> Tensor:
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
        new = slice(-1, None) if self.past is not None else slice(None)
        out = self.lm.run(
            self.ids[:, new],
            self.mask,
            position_ids=positions[:, new],
            past=self.past,
            use_cache=True,
            last_only=True,
        )
        self.past = getattr(out, "past_key_values", None) if "past_key_values" in self.lm.accepts else None
        return logits_of(out)[:, -1]

    def append(self, tokens: Tensor) -> None:
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=1)
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)

    def keep(self, rows: Tensor) -> bool:
        """Go on with some rows; false: the cache cannot, and all go on."""
        if self.past is not None:
            layers = getattr(self.past, "layers", ())
            if not layers or not all(hasattr(layer, "batch_select_indices") for layer in layers):
                return False
            self.past.batch_select_indices(rows)
        self.ids, self.mask = self.ids[rows], self.mask[rows]
        return True


class _Seq2SeqStep:
    """An encoder that runs once, and a decoder that grows by a token at a time."""

    def __init__(self, lm: LM, ids: Tensor, mask: Tensor) -> None:
        self.lm, self.source, self.mask = lm, ids, mask
        self.encoded = lm.model.get_encoder()(input_ids=ids, attention_mask=mask)  # type: ignore[operator]
        self.ids = torch.full_like(ids[:, :1], lm.decoder_start)
        self.past: Any = None

    def logits(self) -> Tensor:
        new = slice(-1, None) if self.past is not None else slice(None)
        out = self.lm.run(
            self.source,
            self.mask,
            decoder_input_ids=self.ids[:, new],
            encoder_outputs=self.encoded,
            past=self.past,
            use_cache=True,
        )
        self.past = getattr(out, "past_key_values", None) if "past_key_values" in self.lm.accepts else None
        return logits_of(out)[:, -1]

    def keep(self, rows: Tensor) -> bool:
        """All rows go on: decoders of this kind keep two caches and answer briefly."""
        return False

    def append(self, tokens: Tensor) -> None:
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=1)
