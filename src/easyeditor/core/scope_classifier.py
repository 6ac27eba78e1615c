"""Which texts a fact is about: the scope classifier of SERAC. Mitchell et al., ICML 2022.

arXiv:2206.06520

What is said of a text at a token depends on the tokens up to there alone. So nothing depends on padding, on batching,
on a KV cache, or on somebody telling where a prompt ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from easyeditor.lm.model import LM

HALF = 0.5  # the likeness from which on a fact is about a text
HEADS = 4
FEW = 1e-6  # distances and probabilities below it are as good as none

Tokens = Sequence[int]


@dataclass(frozen=True)
class Measure:
    """How alike a fact and a text are.

    Args:
        cross_attend: They are read together; otherwise each becomes a vector, and the distance d says exp(-d).
        cos: The distance is one minus the cosine; otherwise that of the vectors.
        square: That distance is squared.
        bound_embeds: The numbers of the vectors are kept between -1 and 1.
        dist_heads: The vectors are cut into so many parts, of which the nearest count.
    """

    cross_attend: bool = False
    cos: bool = False
    square: bool = True
    bound_embeds: bool = False
    dist_heads: int = 1

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """The distance of vectors (..., width), of any shapes that broadcast."""
        a, b = (self._parts(x) for x in (a, b))
        if self.cos:
            return (1 - torch.cosine_similarity(a, b, dim=-1)).clamp(min=0).amin(-1)
        squares = (a - b).square().sum(-1)
        far: Tensor = squares if self.square else (squares + FEW**2).sqrt()
        return far.amin(-1)

    def _parts(self, x: Tensor) -> Tensor:
        parts = x.reshape(*x.shape[:-1], self.dist_heads, -1)
        return parts.tanh() if self.bound_embeds else parts


class Reader(Protocol):
    """What turns texts into states."""

    width: int

    def __call__(self, lm: LM, texts: Sequence[Sequence[Tokens]]) -> Tensor:
        """A state at each token of the last part of each text, (texts, longest last part, width).

        Args:
            lm: The model whose tokens these are.
            texts: Each in parts that follow one another.
        """


class TokenReader(nn.Module):
    """A small decoder over the embeddings of the model that is edited, which stay as they are.

    Args:
        embedded: The width of the embeddings.
        width: Of the decoder.
        blocks: How many it has.
    """

    def __init__(self, embedded: int, width: int, blocks: int) -> None:
        super().__init__()
        self.width = width
        self.down = nn.Linear(embedded, width, bias=False)
        self.part = nn.Embedding(3, width)
        heads = HEADS if width % (2 * HEADS) == 0 else 1
        config = LlamaConfig(
            vocab_size=1,
            bos_token_id=None,
            eos_token_id=None,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=blocks,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            initializer_range=0.6 * width**-0.5,  # that of larger models, for this width
        )
        self.body = LlamaModel(config)
        del self.body.embed_tokens  # it is given embeddings

    def whole(self, lm: LM, texts: Sequence[Sequence[Tokens]]) -> Tensor:
        """A state at each token of each text, (texts, longest, width); what lies behind a text's end is undefined."""
        rows = [torch.tensor([token for part in text for token in part]) for text in texts]
        kinds = [torch.tensor([i for i, part in enumerate(text) for _ in part]) for text in texts]
        ids, kind = (
            nn.utils.rnn.pad_sequence(each, batch_first=True).to(self.down.weight.device) for each in (rows, kinds)
        )
        table = weight_of(lm.model.get_input_embeddings())  # type: ignore[operator]
        embedded = table[ids.to(table.device)].to(self.down.weight)
        embedded = embedded / (embedded.square().mean(-1, keepdim=True) + FEW**2).sqrt()
        x = self.down(embedded) + self.part(kind)
        return self.body(inputs_embeds=x, use_cache=False).last_hidden_state  # type: ignore[no-any-return]

    def forward(self, lm: LM, texts: Sequence[Sequence[Tokens]]) -> Tensor:
        """See `Reader`."""
        return last_parts(self.whole(lm, texts), texts)


class TextReader(nn.Module):
    """An encoder with a tokenizer of its own; one that reads both ways is run once per token.

    Args:
        config: Of the encoder, as transformers write it.
        size: Of its tokenizer, in bytes.
        pad: The token that its tokenizer fills up with.
        window: How many of the tokens up to a place are read.
    """

    tokenizer: Tensor

    def __init__(self, config: dict[str, Any], size: int, pad: str, window: int) -> None:
        super().__init__()
        known = AutoConfig.for_model(**config)
        self.model = AutoModel.from_config(known)
        self.width, self.window, self.pad = int(known.hidden_size), window, pad
        self.register_buffer("tokenizer", torch.zeros(size, dtype=torch.uint8))
        self._built: Any = None

    def forward(self, lm: LM, texts: Sequence[Sequence[Tokens]]) -> Tensor:
        """See `Reader`."""
        asked = [
            (
                *(lm.text.decode(part) for part in text[:-1] if part),
                lm.text.decode(text[-1][max(end - self.window, 0) : end]),
            )
            for text in texts
            for end in range(1, len(text[-1]) + 1)
        ]
        batch = self._tokenizer()(
            [list(each) if len(each) > 1 else each[0] for each in asked],
            return_tensors="pt",
            padding=True,
            truncation=True,
        )
        states = self.model(**batch.to(self.tokenizer.device)).last_hidden_state
        first = states[:, 0]
        return nn.utils.rnn.pad_sequence(list(first.split([len(text[-1]) for text in texts])), batch_first=True)

    def _tokenizer(self) -> Any:
        if self._built is None:
            text = self.tokenizer.cpu().numpy().tobytes().decode()
            self._built = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text), pad_token=self.pad)
        return self._built


def weight_of(module: nn.Module) -> Tensor:
    """The weight of embeddings or of a head, which nothing is learnt of here."""
    return module.get_parameter("weight").detach()


def last_parts(states: Tensor, texts: Sequence[Sequence[Tokens]]) -> Tensor:
    """Of the states of texts, (texts, longest, width), those of the last parts, (texts, longest last part, width)."""
    spans = [(sum(map(len, text[:-1])), sum(map(len, text))) for text in texts]
    return nn.utils.rnn.pad_sequence([row[a:b] for row, (a, b) in zip(states, spans, strict=True)], batch_first=True)


class Scope(nn.Module):
    """How alike facts and texts are.

    Args:
        reader: What turns texts into states.
        measure: How two are compared.
        width: Of the vectors; None: those of the reader.
    """

    def __init__(self, reader: TokenReader | TextReader, measure: Measure, width: int | None) -> None:
        super().__init__()
        self.reader, self.measure = reader, measure
        size = 2 if measure.cross_attend else width
        self.out = nn.Identity() if size is None else nn.Linear(reader.width, size)

    def freeze(self, last: int | None) -> None:
        """Let only so many of the last blocks of the reader learn, and what follows them; None: all of it."""
        if last is None:
            return
        blocks = next(module for module in self.reader.modules() if isinstance(module, nn.ModuleList))
        self.reader.requires_grad_(False)
        for block in list(blocks)[len(blocks) - last :]:
            block.requires_grad_(True)

    def vectors(self, lm: LM, texts: Sequence[Tokens]) -> Tensor:
        """The vector of each text up to each of its tokens, (texts, longest, width), fp32."""
        found: Tensor = self.out(self.reader(lm, [(text,) for text in texts]))
        return found.float()

    def keys(self, lm: LM, prompts: Sequence[Tokens]) -> Tensor:
        """The vector of each prompt, (prompts, width)."""
        vectors = self.vectors(lm, prompts)
        return vectors[torch.arange(len(prompts)), [len(prompt) - 1 for prompt in prompts]]

    def forward(self, lm: LM, prompts: Sequence[Tokens], texts: Sequence[Tokens], keys: Tensor | None = None) -> Tensor:
        """The logarithm of how alike each fact is to each text up to each token.

        Args:
            lm: The model.
            prompts: Of the facts.
            texts: The texts.
            keys: What `keys` says of the prompts, if that is known.

        Returns:
            (texts, longest, facts), at most 0.
        """
        if self.measure.cross_attend:
            pairs = [(prompt, text) for text in texts for prompt in prompts]
            found: Tensor = self.out(self.reader(lm, pairs)).log_softmax(-1)[..., 0]
            return found.reshape(len(texts), len(prompts), -1).transpose(1, 2)
        own = self.keys(lm, prompts) if keys is None else keys
        return -self.measure.distance(self.vectors(lm, texts)[:, :, None], own)


def standing(likeness: Tensor) -> tuple[Tensor, Tensor]:
    """Which fact stands at each token: one that is about the text up to here, else the one that stood before.

    As long as no fact was about it, the one that was most like it.

    Args:
        likeness: (texts, length, facts).

    Returns:
        How alike that fact was where it came to stand, and which it is, (texts, length) each.
    """
    near, which = likeness.max(-1)
    place = torch.arange(near.shape[1], device=near.device)
    at = torch.where(near > HALF, 1.0 + place, near).cummax(1).indices
    return near.gather(1, at), which.gather(1, at)
