"""Which tokens a pass of the model stands for, with a cache or without, and what it says after each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from easyeditor.errors import EditFailed
from easyeditor.lm.model import LM

READ = "_easyeditor_read"  # where a cache, or what an encoder returned, keeps the tokens that it stands for


class Unread(EditFailed):
    """A pass of the model goes on from something of which nobody knows the tokens."""


@dataclass(frozen=True)
class Seen:
    """The tokens that a pass stands for.

    Args:
        texts: Of each row all tokens so far; of an encoder-decoder model those of the encoder, then the decoder's.
        splits: Where the decoder's begin; None: there is one part.
        tokens: Which token of its text each new place is, (rows, new) as lists; -1: none, it is filled up.
    """

    texts: list[list[int]]
    splits: list[int | None]
    tokens: list[list[int]]


@dataclass(frozen=True)
class Place:
    """Something that is said in a pass.

    Args:
        row: Of which row.
        token: After which token of its text.
        at: Where in the logits.
    """

    row: int
    token: int
    at: tuple[int, int]


@dataclass
class Kept:
    """What a cache stands for.

    Args:
        texts: The tokens of each row.
        length: How many places it has, with those that are filled up.
    """

    texts: list[list[int]]
    length: int


def read(lm: LM, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Seen:
    """What a pass of the model has read.

    Raises:
        Unread: It was given no tokens, or a cache of which nobody knows the tokens.
    """
    first = args[0] if args else kwargs.get("input_ids")
    ids: Tensor | None = kwargs.get("decoder_input_ids") if lm.seq2seq else first
    if ids is None:
        raise Unread("SERAC decides by the tokens of a text, and the model was given none. Pass input_ids.")
    mask: Any = kwargs.get("decoder_attention_mask" if lm.seq2seq else "attention_mask")
    plain = isinstance(mask, Tensor) and mask.dim() == 2
    filled: Tensor = mask[:, -ids.shape[1] :].long() if plain else torch.ones_like(ids)
    new, cache = masked(ids, filled), cached(output)
    kept: Kept | None = getattr(kwargs.get("past_key_values"), READ, None)
    kept = kept or Kept([[] for _ in new], 0)
    length = cache.get_seq_length() if hasattr(cache, "get_seq_length") else kept.length + ids.shape[1]
    if len(kept.texts) != len(new) or length != kept.length + ids.shape[1]:
        raise Unread(
            "SERAC decides by the tokens of a text, and this cache was made before its edit was there, or was changed. "
            "Begin with the whole text and an empty cache."
        )
    texts = [[*old, *more] for old, more in zip(kept.texts, new, strict=True)]
    if cache is not None:
        keep(cache, Kept(texts, length))
    leads = encoded(args, kwargs, len(texts)) if lm.seq2seq else [[] for _ in texts]
    counts = [len(lead) + len(old) for lead, old in zip(leads, kept.texts, strict=True)]
    tokens = [
        [start + n - 1 if there else -1 for n, there in zip(row.cumsum(0).tolist(), row.tolist(), strict=True)]
        for row, start in zip(filled, counts, strict=True)
    ]
    whole_texts = [[*lead, *text] for lead, text in zip(leads, texts, strict=True)]
    return Seen(whole_texts, [len(lead) if lm.seq2seq else None for lead in leads], tokens)


def cached(output: Any) -> Any:
    """The cache in the output of a model; None where there is none."""
    return getattr(output, "past_key_values", None)


def masked(ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    """The tokens of each row that are not filled up."""
    rows = ids.tolist() if mask is None else [row[there.bool()].tolist() for row, there in zip(ids, mask, strict=True)]
    return [list(row) for row in rows]


def remember(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
    """A hook of an encoder: what it returns knows the tokens that it was made from."""
    ids = args[0] if args else kwargs.get("input_ids")
    if isinstance(ids, Tensor) and not isinstance(output, tuple):
        setattr(output, READ, masked(ids, kwargs.get("attention_mask")))


def encoded(args: tuple[Any, ...], kwargs: Mapping[str, Any], rows: int) -> list[list[int]]:
    """The tokens that the encoder has read, of each row.

    Raises:
        Unread: Nobody knows them.
    """
    ids = args[0] if args else kwargs.get("input_ids")
    texts = masked(ids, kwargs.get("attention_mask")) if isinstance(ids, Tensor) else None
    texts = texts or getattr(kwargs.get("encoder_outputs"), READ, None)
    if not texts or rows % len(texts):
        raise Unread("SERAC decides by the tokens of a text, and the encoder was not run with its edit. Run it again.")
    return [text for text in texts for _ in range(rows // len(texts))]


def keep(cache: Any, kept: Kept) -> None:
    """Let a cache know its tokens, also when its rows change places."""
    try:
        setattr(cache, READ, kept)
        for name in ("reorder_cache", "batch_select_indices"):
            if hasattr(cache, name):
                setattr(cache, name, MethodType(_moved[name], cache))
    except AttributeError:  # a cache that is a tuple: what goes on from it will be refused
        return


def _mover(name: str) -> Callable[[Any, Tensor], None]:
    def move(cache: Any, rows: Tensor) -> None:
        getattr(type(cache), name)(cache, rows)
        kept: Kept = getattr(cache, READ)
        setattr(cache, READ, Kept([kept.texts[row] for row in rows.tolist()], kept.length))

    return move


_moved = MappingProxyType({name: _mover(name) for name in ("reorder_cache", "batch_select_indices")})


def places_of(lm: LM, seen: Seen, logits: Tensor) -> list[Place]:
    """What is said in a pass."""
    picked = lm.kept.picked
    if picked is not None and picked.used:
        where = zip(picked.rows.tolist(), picked.columns.tolist(), strict=True)
        every = [(row, column, (0, i)) for i, (row, column) in enumerate(where)]
    else:
        count = logits.shape[1]
        every = [
            (row, len(tokens) - count + i, (row, i)) for row, tokens in enumerate(seen.tokens) for i in range(count)
        ]
    found = (Place(row, seen.tokens[row][column], at) for row, column, at in every)
    return [place for place in found if place.token >= 0]


def with_logits(lm: LM, output: Any, logits: Tensor, labels: Tensor | None) -> Any:
    """The output of a model with other logits, and the loss that belongs to them."""
    if isinstance(output, Tensor):
        return logits
    if isinstance(output, tuple):
        own = next(i for i, part in enumerate(output) if isinstance(part, Tensor) and part.dim() == logits.dim())
        return (*output[:own], logits, *output[own + 1 :])
    output.logits = logits
    if labels is not None:
        said, told = (logits, labels) if lm.seq2seq else (logits[:, :-1], labels[:, 1:])
        output.loss = cross_entropy(said.float().flatten(0, 1), told.flatten().to(said.device))
    return output
