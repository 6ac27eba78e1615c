"""The counterfactual model of SERAC: what would be said of a text if a fact were so. arXiv:2206.06520, section 3.

It reads the fact, then the text. Where no folder names one, it is a small decoder over the embeddings and the head of
the model that is edited; besides saying a token of its own it may point at one of the fact's answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from easyeditor.core.likelihood import Answers, answers
from easyeditor.core.scope_classifier import Measure, Scope, TextReader, TokenReader, Tokens, weight_of
from easyeditor.lm.model import LM, logits_of

TINY = float(torch.finfo(torch.float32).eps)  # what every probability is raised by before its logarithm is taken


@dataclass(frozen=True)
class Question:
    """A text of which something is to be said as if a fact were so.

    Args:
        prompt: Of the fact, its tokens.
        answer: Of the fact, with the token that ends it.
        text: The text; of an encoder-decoder model what the encoder reads, then what the decoder reads.
        split: Where the decoder's part of the text begins; None: there is one part.
        places: After which of its tokens.
    """

    prompt: Tokens
    answer: Tokens
    text: Tokens
    split: int | None
    places: Sequence[int]


class Pointer(nn.Module):
    """A small decoder that says tokens, or points at them.

    Args:
        embedded: The width of the embeddings of the model that is edited.
        width: Of the decoder.
        blocks: How many it has.
    """

    def __init__(self, embedded: int, width: int, blocks: int) -> None:
        super().__init__()
        self.reader = TokenReader(embedded, width, blocks)
        self.asks, self.offers = nn.Linear(width, width, bias=False), nn.Linear(2 * width, width, bias=False)
        self.gate, self.up = nn.Linear(width, 1), nn.Linear(width, embedded, bias=False)

    def forward(self, lm: LM, questions: Sequence[Question]) -> Tensor:
        """The logarithm of the probability of each token at the places of each question, (places, vocab), fp32."""
        states = self.reader.whole(lm, [(q.prompt, q.answer, q.text) for q in questions])
        place, longest = states.device, max(len(q.answer) for q in questions)
        counts = torch.tensor([len(q.places) for q in questions], device=place)
        row = torch.repeat_interleave(torch.arange(len(questions), device=place), counts)
        column = torch.tensor([len(q.prompt) + len(q.answer) + at for q in questions for at in q.places], device=place)
        at = states[row, column]  # (places, width)
        start = torch.tensor([len(q.prompt) for q in questions], device=place)[:, None]
        step = torch.arange(longest, device=place)
        there = step < torch.tensor([len(q.answer) for q in questions], device=place)[:, None]
        tokens = torch.tensor([[*q.answer, *[0] * (longest - len(q.answer))] for q in questions], device=place)
        every = torch.arange(len(questions), device=place)[:, None]  # a token is known by itself and by what led to it
        own, before = ((start + step - back).clamp(min=0) * there for back in (0, 1))
        met = torch.cat([states[every, own], states[every, before]], dim=-1)
        offered = self.offers(met)
        score = (offered[row] * self.asks(at)[:, None]).sum(-1).float() / self.reader.width**0.5
        share = score.masked_fill(~there[row], -torch.inf).softmax(-1)  # (places, longest)
        head = weight_of(lm.head)
        said = linear(self.up(at).to(head), head).float().softmax(-1).to(place)
        pointed = torch.zeros_like(said).scatter_add(1, tokens[row], share)
        gate: Tensor = self.gate(at).float().sigmoid()
        return (gate * said + (1 - gate) * pointed + TINY).log()


class Small(nn.Module):
    """A language model of transformers that shares its tokens with the model that is edited.

    Args:
        config: Of the model, as transformers write it.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        known = AutoConfig.for_model(**config)
        auto: Any = AutoModelForSeq2SeqLM if known.is_encoder_decoder else AutoModelForCausalLM
        self.model = auto.from_config(known)

    def forward(self, lm: LM, questions: Sequence[Question]) -> Tensor:
        """See `Pointer`."""
        found = []
        for q in questions:
            split = len(q.text) if q.split is None else q.split
            read = self._ids([*q.prompt, *q.answer, *q.text[:split]])
            if q.split is None:
                logits = logits_of(self.model(input_ids=read, use_cache=False))[0]
                first = len(q.prompt) + len(q.answer)
            else:
                spoken = self._ids(q.text[split:])
                logits = logits_of(self.model(input_ids=read, decoder_input_ids=spoken, use_cache=False))[0]
                first = -split
            found.append(logits[[first + at for at in q.places]].float())
        width = len(weight_of(lm.head))
        logits = torch.cat(found)[:, :width]
        return pad(logits, (0, width - logits.shape[1]), value=-torch.inf).softmax(-1).add(TINY).log()

    def _ids(self, tokens: Tokens) -> Tensor:
        """Tokens that it does not have, which only fill up the vocabulary of the other model, become its last one."""
        size = self.model.get_input_embeddings().weight.shape[0]
        return torch.tensor([tokens], device=self.model.device).clamp(max=size - 1)


class Networks(nn.Module):
    """What SERAC trains: the scope classifier and the counterfactual model.

    Args:
        scope: The first.
        counterfactual: The second.
    """

    def __init__(self, scope: Scope, counterfactual: Pointer | Small) -> None:
        super().__init__()
        self.scope, self.counterfactual = scope, counterfactual

    def checkpointed(self) -> None:
        """Compute the states inside models of transformers again in the backward pass, to save memory."""
        for part in (self.scope.reader, self.counterfactual):
            if isinstance(part, TextReader | Small) and part.model.supports_gradient_checkpointing:
                part.model.gradient_checkpointing_enable()
                for module in part.modules():  # only what is in training is checkpointed; no dropout goes with it
                    module.training = not isinstance(module, nn.Dropout)


@dataclass(frozen=True)
class Asked:
    """Prompts with their answers as the networks read them.

    Args:
        batch: For a pass of the model.
        texts: What the model reads, without the last token of the answer.
        ends: How many tokens of each text are the prompt.
        splits: See `Question`.
        answers: The answers, each with the token that ends it, where there is one.
    """

    batch: Answers
    texts: list[list[int]]
    ends: list[int]
    splits: list[int | None]
    answers: list[list[int]]

    def prompt(self, row: int) -> list[int]:
        """The prompt of a row."""
        return self.texts[row][: self.ends[row]]

    def places(self, row: int) -> range:
        """After which of its tokens the answer's tokens follow."""
        first = self.ends[row] - (self.splits[row] is None)
        return range(first, first + len(self.answers[row]))


def asked(lm: LM, pairs: Sequence[tuple[str, str]]) -> Asked:
    """Encode prompts, as the model is asked them, with their answers."""
    batch = answers(lm, pairs, with_end=bool(lm.text.eos_ids))
    rows = batch.rows.tolist()
    told: list[list[int]] = [[] for _ in pairs]
    for row, label in zip(rows, batch.labels.tolist(), strict=True):
        told[row].append(label)
    read = [ids[mask.bool()].tolist() for ids, mask in zip(batch.ids, batch.mask, strict=True)]
    if batch.decoder_ids is None:
        ends = [len(text) + 1 - len(answer) for text, answer in zip(read, told, strict=True)]
        return Asked(batch, read, ends, [None] * len(pairs), told)
    ends = [len(text) for text in read]
    spoken = [ids[: len(answer)].tolist() for ids, answer in zip(batch.decoder_ids, told, strict=True)]
    return Asked(batch, [a + b for a, b in zip(read, spoken, strict=True)], ends, list(ends), told)


def networks(spec: Mapping[str, Any], seed: int = 0) -> Networks:
    """The networks that a description describes, with drawn weights; the global generators are left alone.

    Args:
        spec: ``embedded``, ``width``, ``blocks``, ``measure`` and ``window``; ``reader`` and ``model`` where they come
            from folders: the configs of transformers, and of the tokenizer its ``size`` and ``pad`` token.
        seed: Draws.
    """
    size = spec["embedded"], spec["width"], spec["blocks"]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        own, small = spec.get("reader"), spec.get("model")
        reader = TextReader(**own, window=spec["window"]) if own else TokenReader(*size)
        scope = Scope(reader, Measure(**spec["measure"]), None if own else spec["width"])
        return Networks(scope, Small(small) if small else Pointer(*size)).float().eval()
