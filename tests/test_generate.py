"""Free generation: the same answer in any batch, order and padding; natural ends; seeded samples."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from easyeditor.core.likelihood import answers
from easyeditor.core.prompts import contexts
from easyeditor.lm.generate import answer, continuations, sample
from easyeditor.lm.model import LM
from families import TEXT, build

FAMILIES = ("gpt2", "llama", "gemma2", "neox", "falcon", "opt", "bloom", "t5", "qwen3_5", "baichuan", "chatglm", "bare")


def prompts(count: int = 32) -> list[str]:
    rng, words = random.Random(0), TEXT.split()
    return [" ".join(rng.choices(words, k=rng.randint(1, 12))) for _ in range(count)]


def plainly(lm: LM, prompt: str, tokens: int) -> str:
    """One row, no padding, no cache, the whole text again for each token."""
    ids, out = list(lm.text.encode(prompt).ids), []
    decoder = [lm.decoder_start] if lm.seq2seq else []
    for _ in range(tokens):
        with torch.no_grad():
            if lm.seq2seq:
                found: Any = lm.model(input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([decoder + out]))
            else:
                found = lm.model(input_ids=torch.tensor([ids + out]))
        logits = found if isinstance(found, Tensor) else found.logits
        token = int(logits[0, -1].argmax())
        if token in lm.text.eos_ids or (out and "\n" in lm.tokenizer.decode([token]) and lm.text.decode(out).strip()):
            break
        out.append(token)
    return lm.text.decode(out).strip().split("\n")[0].strip()


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_order_and_padding_side(family: str) -> None:
    lm, asked = build(family), prompts()
    expected = [plainly(lm, prompt, 3) for prompt in asked]
    assert len(set(expected)) > 8, "the model has something to say"
    shuffled = list(range(len(asked)))
    random.Random(1).shuffle(shuffled)
    for batch_size, side in ((1, "right"), (8, "left"), (32, "right")):
        lm.tokenizer.padding_side = side
        assert answer(lm, asked, 3, batch_size) == expected
        assert lm.tokenizer.padding_side == side
    moved = answer(lm, [asked[i] for i in shuffled], 3, 8)
    assert moved == [expected[i] for i in shuffled]


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom", "qwen3_5", "chatglm"])
def test_with_cache_is_without(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, asked = build(family), prompts(8)
    with_cache = answer(lm, asked, 8)
    lengths: list[int] = []
    run = LM.run

    def spy(self: LM, ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        lengths.append(ids.shape[1])
        return run(self, ids, *args, **kwargs)

    monkeypatch.setattr(LM, "run", spy)
    assert answer(lm, asked, 8) == with_cache
    assert lengths.count(1) >= 7, "with a cache each step reads one token"
    lm.accepts = lm.accepts - {"past_key_values", "use_cache"}
    lengths.clear()
    assert answer(lm, asked, 8) == with_cache
    assert lengths == sorted(lengths) and lengths[-1] > 8


class Says(nn.Module):
    """Says the same tokens to everything, counted from the end of the prompt, which is a full stop."""

    def __init__(self, script: list[int], vocab: int) -> None:
        super().__init__()
        self.script, self.vocab = script, vocab
        self.words = nn.Embedding(vocab, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, input_ids: Tensor) -> Tensor:
        _ = self.layers[0](self.words(input_ids))
        stop = self.vocab - 1
        ends = [max((i for i, t in enumerate(row) if t == stop), default=0) for row in input_ids.tolist()]
        since = [input_ids.shape[1] - 1 - end for end in ends]
        out = torch.zeros(*input_ids.shape, self.vocab)
        for i, n in enumerate(since):
            out[i, -1, self.script[min(n, len(self.script) - 1)]] = 1.0
        return out


def saying(*script: str, **kwargs: Any) -> tuple[LM, str]:
    lm = build("gpt2")
    tok = lm.tokenizer
    stop = len(tok) - 1
    model = Says(tok.convert_tokens_to_ids(list(script)), len(tok))
    return LM.wrap(model, tok, editable=False, **kwargs), tok.convert_ids_to_tokens(stop)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (("paris", "</s>", "rome"), "paris"),
        (("paris", "rome", "\n", "lima"), "paris rome"),
        (("\n", "paris", "\n", "lima"), "paris"),
        (("\n", "\n", "paris", "</s>"), "paris"),
        (("</s>", "paris"), ""),
        (("paris", "rome"), "paris rome rome rome rome"),
    ],
)
def test_natural_ends(script: tuple[str, ...], said: str) -> None:
    """An end of the sequence ends the answer, a line break ends it once something has been said."""
    lm, stop = saying(*script)
    assert answer(lm, [stop, f"the {stop}"], 5) == [said, said]


def test_rows_end_for_themselves() -> None:
    lm, asked = build("llama"), prompts(16)
    rows = [list(lm.text.encode(prompt).ids) for prompt in asked]
    first = continuations(lm, rows, 1)
    lm.tokenizer.eos_token = lm.tokenizer.convert_ids_to_tokens(first[0][0])  # the first row ends at once
    found = continuations(lm, rows, 6, batch_size=16)
    assert found[0] == [] and max(map(len, found)) == 6
    assert all(first[0][0] not in row for row in found)


def test_no_tokens_asked_for() -> None:
    assert answer(build("gpt2"), ["the", "a cat"], 0) == ["", ""] and answer(build("gpt2"), [], 4) == []


def test_samples_are_seeded() -> None:
    lm = build("gpt2")
    state = torch.get_rng_state()
    first = sample(lm, ["The", "I"], 12, seed=3)
    torch.manual_seed(99)
    again, other = sample(lm, ["The", "I"], 12, seed=3), sample(lm, ["The", "I"], 12, seed=4)
    assert first == again != other and first[0].startswith("The")
    assert sample(lm, ["The"], 12, 5, top_k=1)[0] == "The" + lm.text.decode(
        continuations(lm, [list(lm.text.encode("The").ids)], 12)[0]
    )
    torch.set_rng_state(state)
    sample(lm, ["The", "I"], 12, seed=3)
    answer(lm, ["The"], 5)
    assert torch.equal(state, torch.get_rng_state()), "the generator that everybody shares is not touched"


def test_contexts_are_seeded() -> None:
    lm = build("gpt2")
    found = contexts(lm, [[3, 2], [5, 1]], seed=0)
    assert found == contexts(lm, [[3, 2], [5, 1]], seed=0) != contexts(lm, [[3, 2], [5, 1]], seed=1)
    assert found[0] == "{}" and len(found) == 4
    assert all(text.count("{}") == 1 and text.endswith(". {}") and "\n" not in text for text in found[1:])


def test_no_left_padding_elsewhere() -> None:
    lm = build("gpt2")
    lm.tokenizer.padding_side = "left"
    batch = answers(lm, [("the capital of ada ra is", "lima"), ("bo", "a cat")])
    assert batch.mask[:, 0].tolist() == [1, 1] and batch.mask.sum(1).tolist() == [6, 2]


def test_rewriters_and_processors() -> None:
    """Prompt edits change what is asked, decoding edits what is chosen."""
    lm = build("gpt2")
    lm.rewriters.append(lambda prompt: "The red cat . " + prompt)
    assert answer(lm, ["bo lives in"], 5) == [plainly(lm, "The red cat . bo lives in", 5)]
    lm.rewriters.clear()
    lima = lm.tokenizer.convert_tokens_to_ids("lima")
    seen: list[tuple[int, ...]] = []

    def always(ids: Tensor, logits: Tensor) -> Tensor:
        seen.append(tuple(ids.shape))
        out = torch.zeros_like(logits)
        out[:, lima] = 1.0
        return out

    lm.processors.append(always)
    assert answer(lm, ["bo", "ada ra"], 3) == ["lima lima lima"] * 2
    assert seen == [(2, 2), (2, 3), (2, 4)], "a rule sees all tokens so far"
