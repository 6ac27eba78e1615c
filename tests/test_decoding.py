"""Decoding rules: DoLa and DeCo against their equations, wherever tokens are chosen, and without a trace afterwards."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import easyeditor
import families
import toy
from easyeditor import SteerEditor
from easyeditor.core.likelihood import answers
from easyeditor.editors.base import BaseEditor
from easyeditor.editors.perform import make_edit, prepared, put_on
from easyeditor.edits.edit import DecodingEdit, Edit, LogitBias
from easyeditor.edits.ledger import Ledger, applied
from easyeditor.edits.store import load_edits, merge, save_edits
from easyeditor.errors import NotEditable, UsageError
from easyeditor.hparams import HyperParams, complete
from easyeditor.lm.decoding import FLOOR, exits, tied
from easyeditor.lm.generate import answer, continuations
from easyeditor.lm.model import LM
from easyeditor.methods.deco import Correction, DeCoHyperParams, by_depth
from easyeditor.methods.dola import DoLaHyperParams, LayerContrast, candidates
from easyeditor.metrics.likelihood import read
from easyeditor.registry import get_method

DECODER_ONLY = [family for family in toy.FAMILIES if family != "t5"]
METHODS: dict[str, dict[str, Any]] = {
    "DoLa": {"dola_layers": [0, 1, 2, 3], "relative_top": 0.1},
    "DeCo": {"early_exit_layers": [1, 2, 3], "alpha": 5.0, "threshold_top_p": 0.9, "threshold_top_k": 12},
}
ODD = ("I", "what of to bo ?", "where where where")
ASKED = [*(prompt for prompt, _, _ in toy.prompts()[::24]), *ODD]


def edit_of(lm: LM, name: str, **more: Any) -> Edit:
    spec = get_method(name)
    hparams = complete(spec.hparams(**{**METHODS[name], **more}), lm)
    return make_edit(lm, spec, [toy.request()], hparams, prepared(lm, spec, hparams))


def padded(lm: LM, prompts: Sequence[str]) -> dict[str, Tensor]:
    rows = [list(lm.text.encode(prompt).ids) for prompt in prompts]
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": torch.tensor([[0] * (length - len(r)) + [1] * len(r) for r in rows])}


def normed(lm: LM, states: Tensor) -> Tensor:
    """The final norm of each family, by name: what the library finds without names."""
    decoder = lm.model.get_decoder() if hasattr(lm.model, "get_decoder") else lm.model.base_model
    names = ("norm", "ln_f", "final_layer_norm", "final_layernorm")
    norm = next(m for n in names for m in [getattr(decoder, n, None)] if m is not None)
    logits = lm.head(norm(states))
    cap = getattr(lm.model.config, "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits


def early_and_final(lm: LM, ids: list[int], norm: bool = True) -> tuple[Tensor, Tensor]:
    """From transformers' own hidden states: (blocks, vocab) and (vocab,) at the last position."""
    with torch.no_grad():
        out = lm.model(input_ids=torch.tensor([ids]), output_hidden_states=True)
        states = torch.stack([h[0, -1] for h in out.hidden_states[:-1]])
        return (normed(lm, states) if norm else lm.head(states)).float(), out.logits[0, -1].float()


def dola_by_hand(early: Tensor, final: Tensor, layers: Sequence[int], relative_top: float) -> Tensor:
    """Token by token, as the paper writes it."""
    q = final.double().softmax(-1)
    distances = []
    for layer in layers:
        p = early[layer].double().softmax(-1)
        middle = (p + q) / 2
        distances.append(0.5 * (q * (q / middle).log()).sum() + 0.5 * (p * (p / middle).log()).sum())
    premature = early[layers[int(torch.stack(distances).argmax())]].double().softmax(-1)
    out = torch.full_like(q, float("-inf"))
    for token in range(len(q)):
        if q[token] >= relative_top * q.max():
            out[token] = (q[token] / premature[token]).log()
    return out


def deco_by_hand(early: Tensor, final: Tensor, layers: Sequence[int], alpha: float, top_p: float, top_k: int) -> Tensor:
    """Token by token, as the paper writes it."""
    q, kept, mass = final.double().softmax(-1), [], 0.0
    for token in q.argsort(descending=True)[:top_k].tolist():
        kept.append(token)
        mass += float(q[token])
        if mass >= top_p:
            break
    surest = max((float(early[layer].double().softmax(-1)[token]), layer) for layer in layers for token in kept)
    out = torch.full_like(q, float("-inf"))
    out[kept] = (final.double() + alpha * surest[0] * early[surest[1]].double())[kept]
    return out


def by_hand(lm: LM, name: str) -> Callable[[list[int]], Tensor]:
    def rule(ids: list[int]) -> Tensor:
        early, final = early_and_final(lm, ids)
        if name == "DoLa":
            return dola_by_hand(early, final, METHODS[name]["dola_layers"], METHODS[name]["relative_top"])
        return deco_by_hand(early, final, *METHODS[name].values())

    return rule


def plainly(lm: LM, prompt: str, tokens: int, rule: Callable[[list[int]], Tensor]) -> list[int]:
    """One row, no padding, no cache."""
    ids: list[int] = list(lm.text.encode(prompt).ids)
    start = len(ids)
    while len(ids) < start + tokens:
        token = int(rule(ids).argmax())
        if token in lm.text.eos_ids:
            break
        ids.append(token)
    return ids[start:]


# --- equations -----------------------------------------------------------------------------------------------------


def test_dola_is_its_equation() -> None:
    torch.manual_seed(0)
    early, final = torch.randn(5, 6, 50) * 3, torch.randn(6, 50) * 3
    for top in (0.1, 0.0, 1.0):
        found = LayerContrast((0, 2, 4, 6, 8), top, True)(final, early)
        for i in range(6):
            expected = dola_by_hand(early[:, i], final[i], range(5), top)
            ruled_out = expected.isinf()
            assert torch.equal(found[i] == FLOOR, ruled_out) and (top or not ruled_out.any())
            assert torch.allclose(found[i][~ruled_out].double(), expected[~ruled_out], atol=1e-5)


def test_deco_is_its_equation() -> None:
    torch.manual_seed(0)
    early, final = torch.randn(4, 6, 50) * 3, torch.randn(6, 50) * 2
    for alpha, top_p, top_k in ((0.6, 0.9, 20), (0.0, 0.5, 3), (2.0, 1.0, 100), (0.6, 1e-6, 20)):
        found = Correction((1, 2, 3, 4), alpha, top_p, top_k)(final, early)
        for i in range(6):
            expected = deco_by_hand(early[:, i], final[i], range(4), alpha, top_p, top_k)
            assert torch.equal(found[i] == FLOOR, expected.isinf())
            assert torch.allclose(found[i][~expected.isinf()].double(), expected[~expected.isinf()], atol=1e-4)
        assert alpha or torch.equal(found.argmax(-1), final.argmax(-1))


def test_a_ruled_out_token_stays_ruled_out_and_nothing_is_nan() -> None:
    final, early = torch.randn(2, 9), torch.randn(3, 2, 9)
    final[:, 4] = float("-inf")
    for rule in (LayerContrast((0, 1, 2), 0.1, True), LayerContrast((0, 1, 2), 0.0, True), Correction((1,), 1, 1.0, 9)):
        found = rule(final, early)
        assert not found.isnan().any() and (found[:, 4] <= FLOOR).all()


@pytest.mark.parametrize("family", DECODER_ONLY)
def test_early_exits_are_norm_and_head_of_the_hidden_states(family: str) -> None:
    lm = toy.build(family)
    for parameter in lm.model.parameters():
        if parameter.dim() == 1:  # norms and biases that are not as they were made
            torch.nn.init.normal_(parameter, 1.0, 0.2)
    prompts = ASKED[:3]
    with exits(lm, [0, 1, 3]) as seen:
        lm.model(**padded(lm, prompts), **_positions(lm, prompts))
        found, bare = seen.logits([3, 0, 1]), seen.logits([1], normed=False)
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in lm.model.modules())
    for i, prompt in enumerate(prompts):
        ids = list(lm.text.encode(prompt).ids)
        expected, _ = early_and_final(lm, ids)
        assert torch.allclose(found[:, i], expected[[3, 0, 1]], atol=1e-3)
        assert torch.allclose(bare[0, i], early_and_final(lm, ids, norm=False)[0][1], atol=1e-3)


def _positions(lm: LM, prompts: Sequence[str]) -> dict[str, Tensor]:
    mask = padded(lm, prompts)["attention_mask"]
    return {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if "position_ids" in lm.accepts else {}


# --- wherever tokens are chosen ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", DECODER_ONLY)
def test_generation_follows_the_equation_in_batches_and_with_a_cache(family: str, name: str) -> None:
    lm = toy.build(family)
    expected = [plainly(lm, prompt, 5, by_hand(lm, name)) for prompt in ASKED]
    bare = continuations(lm, [list(lm.text.encode(p).ids) for p in ASKED], 5)
    assert expected != bare, "the rule makes a difference"
    with applied(lm, edit_of(lm, name)):
        rows = [list(lm.text.encode(prompt).ids) for prompt in ASKED]
        assert continuations(lm, rows, 5, batch_size=1) == expected
        assert continuations(lm, rows, 5, batch_size=8) == expected
        for use_cache in (True, False):
            told = padded(lm, ASKED)
            out = lm.model.generate(**told, max_new_tokens=5, do_sample=False, use_cache=use_cache, pad_token_id=0)
            new = out[:, told["input_ids"].shape[1] :].tolist()
            assert [row[: row.index(2)] if 2 in row else row for row in new] == expected
    assert continuations(lm, [list(lm.text.encode(p).ids) for p in ASKED], 5) == bare


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", ["bloom", "qwen3_5", "baichuan", "chatglm", "bare"])
def test_models_of_other_makes(family: str, name: str) -> None:
    """Alibi, blocks of two kinds, code of its own, positions before rows, a module that is no transformers model."""
    lm = families.build(family)
    for dtype in (torch.float32, torch.bfloat16):
        lm = LM.wrap(lm.model.to(dtype), lm.tokenizer)
        asked = ["the capital of ada ra is", "bo lives in", "a cat is red and", "cy"]
        with applied(
            lm, edit_of(lm, name, **{"DoLa": {"dola_layers": "high"}, "DeCo": {"early_exit_layers": []}}[name])
        ):
            assert answer(lm, asked, 3, 1) == answer(lm, asked, 3, 8)
        assert not lm.processors and "generate" not in vars(lm.model)


def test_without_the_norm_at_early_exits() -> None:
    lm = toy.build("llama")

    def rule(ids: list[int]) -> Tensor:
        early, final = early_and_final(lm, ids, norm=False)
        return dola_by_hand(early, final, [0, 1, 2, 3], 0.1)

    with applied(lm, edit_of(lm, "DoLa", exit_norm=False)):
        found = continuations(lm, [list(lm.text.encode(prompt).ids) for prompt in ASKED], 4)
    assert found == [plainly(lm, prompt, 4, rule) for prompt in ASKED]


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_rules_of_the_tokens_in_generate_of_transformers(family: str) -> None:
    lm = toy.build(family)
    clown, rome = (lm.tokenizer.convert_tokens_to_ids(word) for word in ("clown", "rome"))
    edit = DecodingEdit(rule=LogitBias(torch.tensor([clown]), torch.tensor([1e6])))
    ids = torch.tensor([[5, 6]])

    def never_first(tokens: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(1, torch.tensor([clown]), float("-inf")).index_fill(1, torch.tensor([rome]), 1e9)

    with applied(lm, edit):
        assert lm.model.generate(ids, max_new_tokens=2, do_sample=False)[0, -2:].tolist() == [clown, clown]
        both = lm.model.generate(ids, max_new_tokens=2, do_sample=False, logits_processor=[never_first])
        assert both[0, -1] in (clown, rome), "a processor that is passed is used as well, before the edit"
        assert torch.equal(lm.model.generate(ids, None, [never_first], max_new_tokens=2, do_sample=False), both)


@pytest.mark.parametrize("name", METHODS)
def test_without_a_cache_it_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = toy.build("llama")
    with applied(lm, edit_of(lm, name)):
        said = answer(lm, ASKED, 5)
        monkeypatch.setattr(lm, "accepts", lm.accepts - {"past_key_values"})
        assert answer(lm, ASKED, 5) == said


@pytest.mark.parametrize("name", METHODS)
def test_beams_samples_and_penalties_of_transformers(name: str) -> None:
    lm = toy.build("llama")
    told = padded(lm, ASKED[:3])
    args = {**told, "max_new_tokens": 4, "pad_token_id": 0}
    with applied(lm, edit_of(lm, name)):
        greedy = lm.model.generate(**args, do_sample=False)
        one_beam = lm.model.generate(told["input_ids"], attention_mask=told["attention_mask"], max_new_tokens=4)
        assert torch.equal(one_beam, greedy)
        assert lm.model.generate(**args, do_sample=False, num_beams=3, num_return_sequences=2).shape[0] == 6
        scored = lm.model.generate(**args, do_sample=False, output_scores=True, return_dict_in_generate=True)
        early, final = early_and_final(lm, list(lm.text.encode(ASKED[0]).ids))
        assert scored.scores[0].argmax(-1)[0] == by_hand(lm, name)(list(lm.text.encode(ASKED[0]).ids)).argmax()
        torch.manual_seed(0)
        drawn = lm.model.generate(**args, do_sample=True, temperature=0.01)
        assert torch.equal(drawn, greedy), "nearly cold"
        lm.model.generate(**args, do_sample=False, repetition_penalty=1.2)
        with pytest.raises(UsageError, match="prompt_lookup_num_tokens"):
            lm.model.generate(**args, prompt_lookup_num_tokens=2)
        assert final.shape == early[0].shape


def test_rules_compose_and_those_of_the_tokens_come_last() -> None:
    lm = toy.build("llama")
    clown = lm.tokenizer.convert_tokens_to_ids("clown")
    bias = DecodingEdit(rule=LogitBias(torch.tensor([clown]), torch.tensor([1e6])))
    told = padded(lm, ASKED[:2])
    args = {**told, "max_new_tokens": 2, "pad_token_id": 0, "do_sample": False}
    ledger = Ledger.of(lm)
    ids = [ledger.apply(edit) for edit in (bias, edit_of(lm, "DoLa"), edit_of(lm, "DeCo"))]
    assert answer(lm, ASKED[:2], 2) == ["clown clown"] * 2
    assert (lm.model.generate(**args)[:, -2:] == clown).all()
    ledger.undo(ids[0])
    both = continuations(lm, [list(lm.text.encode(p).ids) for p in ASKED], 3)

    def rule(row: list[int]) -> Tensor:
        early, _ = early_and_final(lm, row)
        contrast = by_hand(lm, "DoLa")(row).clamp(min=FLOOR)
        return deco_by_hand(early, contrast.float(), *METHODS["DeCo"].values())

    assert both == [plainly(lm, prompt, 3, rule) for prompt in ASKED]


# --- scores with the answer given ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_teacher_forced_scores_see_the_rule(family: str, name: str) -> None:
    lm = toy.build(family)
    pairs = [("the home of ada ra is", "oslo rome"), ("the home of ada ra is", "lima"), ("bo su works as", "a judge")]
    bare = read(lm, pairs)
    with applied(lm, edit_of(lm, name)):
        found = read(lm, pairs)
    for pair in pairs:
        batch = answers(lm, [pair])
        row = batch.ids[0].tolist()
        logits = torch.stack([by_hand(lm, name)(row[: int(c) + 1]) for c in batch.columns]).clamp(min=FLOOR)
        assert found[pair].predicted == tuple(logits.argmax(-1).tolist())
        gold = logits.log_softmax(-1).gather(1, batch.labels[:, None])
        assert found[pair].log_prob == pytest.approx(float(gold.mean()), rel=1e-3, abs=1e-3)
    assert read(lm, pairs) == bare


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_teacher_forced_scores_see_a_rule_of_the_tokens(family: str) -> None:
    lm = toy.build(family)
    seen: list[list[int]] = []

    def says_lima_then_rome(ids: Tensor, logits: Tensor) -> Tensor:
        seen.extend(ids.tolist())
        lima, rome = (lm.tokenizer.convert_tokens_to_ids(word) for word in ("lima", "rome"))
        out = torch.zeros_like(logits)
        out[torch.arange(len(ids)), torch.where(ids[:, -1] == lima, rome, lima)] = 9.0
        return out

    lm.processors.append(says_lima_then_rome)
    found = read(lm, [("the home of ada ra is", "lima rome")])
    assert next(iter(found.values())).accuracy == 1.0
    assert len(seen) == 2


# --- on and off, saved and loaded ----------------------------------------------------------------------------------


def state_of(lm: LM) -> tuple[Any, ...]:
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.model.modules()]
    return set(vars(lm.model)), hooks, list(lm.processors), lm.model.training, lm.model.generation_config.to_dict()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "falcon"])
def test_contract(family: str, name: str, tmp_path: Any) -> None:
    lm = toy.build(family)
    before, state, rng = copy.deepcopy(lm.model.state_dict()), state_of(lm), torch.random.get_rng_state()
    said = answer(lm, ASKED, 5)
    edit = edit_of(lm, name)
    assert edit == edit_of(lm, name) and edit.id == edit_of(lm, name).id, "the same settings, the same bytes"
    assert state_of(lm) == state and torch.equal(rng, torch.random.get_rng_state())
    assert edit.facts == [] and edit.method == name, "it edits no fact"
    put_on(lm, edit, [toy.request()])
    steered = answer(lm, ASKED, 5)
    assert steered != said
    other = toy.build("llama", seed=3)
    assert not Ledger.of(other).active and "generate" not in vars(other.model)
    Ledger.of(lm).undo(edit.id)
    assert state_of(lm) == state and answer(lm, ASKED, 5) == said
    assert all(torch.equal(tensor, before[key]) for key, tensor in lm.model.state_dict().items())

    (loaded,) = load_edits(save_edits(edit, tmp_path / "edit"))
    assert loaded == edit and loaded.id == edit.id and json.loads((tmp_path / "edit" / "edit.json").read_text())
    with applied(lm, loaded):
        assert answer(lm, ASKED, 5) == steered
        with pytest.raises(UsageError, match=f"{name}.*decoding"):
            merge(lm, tmp_path / "model")
    assert state_of(lm) == state


def test_off_also_when_generation_fails() -> None:
    lm = toy.build("gpt2")
    with applied(lm, edit_of(lm, "DoLa")):
        state = state_of(lm)
        handle = lm.blocks[2].register_forward_hook(lambda *_: (_ for _ in ()).throw(MemoryError("no more")))
        for call in (lambda: answer(lm, ["I"], 2), lambda: lm.model.generate(torch.tensor([[5]]), max_new_tokens=2)):
            with pytest.raises(MemoryError):
                call()
        handle.remove()
        assert state_of(lm) == state


def test_a_copy_of_the_model_has_no_rule_and_an_own_generate_comes_back(tmp_path: Any) -> None:
    lm = toy.build("gpt2")
    ids = torch.tensor([[5, 6]])
    bare = lm.model.generate(ids, max_new_tokens=5, do_sample=False)
    calls: list[Any] = []

    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return type(lm.model).generate(lm.model, *args, **kwargs)

    with applied(lm, edit_of(lm, "DeCo")):
        twin = copy.deepcopy(lm.model)
        torch.save(lm.model, tmp_path / "model.pt")
        loaded = torch.load(tmp_path / "model.pt", weights_only=False)
        for other in (twin, loaded):
            assert torch.equal(other.generate(ids, max_new_tokens=5, do_sample=False), bare)
            assert other.generate.__self__ is other
    lm.model.generate = own  # type: ignore[assignment]
    with applied(lm, edit_of(lm, "DeCo")):
        lm.model.generate(ids, max_new_tokens=2, do_sample=False)
    assert lm.model.generate is own and len(calls) == 1


def test_with_an_edit_of_the_weights() -> None:
    lm = toy.taught("llama")
    request = toy.request()
    spec = get_method("FT")
    hparams = complete(spec.hparams(**toy.SETTINGS["FT"]), lm)
    rule = edit_of(lm, "DeCo", alpha=0.1)
    alone = make_edit(lm, spec, [request], hparams, {})
    ledger = Ledger.of(lm)
    ledger.apply(rule)
    edit = make_edit(lm, spec, [request], hparams, {})
    assert edit == alone, "a rule of the decoding is no part of what is trained"
    ledger.apply(edit)
    assert answer(lm, [request.prompt], 4) == [request.target_new]
    ledger.undo(rule.id)
    assert answer(lm, [request.prompt], 4) == [request.target_new]


# --- through an editor ---------------------------------------------------------------------------------------------


def hparams_of(lm: LM, name: str, **more: Any) -> HyperParams:
    return get_method(name).hparams(model_name=(lm.model, lm.tokenizer), max_new_tokens=5, **{**METHODS[name], **more})


@pytest.mark.parametrize("name", METHODS)
def test_steer_editor(name: str, tmp_path: Any) -> None:
    lm = toy.build("llama")
    state = state_of(lm)
    expected = [lm.text.decode(plainly(lm, prompt, 5, by_hand(lm, name))) for prompt in ASKED]
    bare = SteerEditor.from_hparams(get_method("FT").hparams(model_name=(lm.model, lm.tokenizer), max_new_tokens=5))
    unsteered = bare.generate(ASKED)
    assert bare.edit is None and unsteered != expected
    editor = SteerEditor.from_hparams(hparams_of(lm, name))
    assert editor.generate(input_text=ASKED[1]) == [expected[1]]
    assert editor.generate(ASKED, temperature=-1) == expected
    assert editor.model is lm.model and editor.tok is lm.tokenizer and editor.device.type == "cpu"
    told = padded(lm, ASKED)
    out = editor.model.generate(**told, max_new_tokens=5, do_sample=False, pad_token_id=0)
    texts = editor.tok.batch_decode(out[:, told["input_ids"].shape[1] :], skip_special_tokens=True)
    assert texts == expected, "the model's own generate follows the rule"
    assert len(editor.generate("I", max_new_tokens=1)[0].split()) <= 1
    assert editor.generate("I", max_length=4, repetition_penalty=1.2)
    assert len(editor.generate("I", num_beams=2, num_return_sequences=2)) == 2
    torch.manual_seed(0)
    drawn = {editor.generate("I", temperature=1.5)[0] for _ in range(6)}
    assert len(drawn) > 1
    assert editor.edit is not None and load_edits(save_edits(editor.edit, tmp_path / "rule")) == [editor.edit]
    again = SteerEditor(hparams_of(lm, name))
    assert again.generate(ASKED) == expected and len(Ledger.of(lm).active) == 1, "it is put on once"
    editor.rollback()
    assert editor.generate(ASKED) == unsteered and editor.edit is None
    assert state_of(lm)[0] - {"_hook_handles"} == state[0] and not lm.processors


def test_steer_editor_says_what_is_missing() -> None:
    editor = SteerEditor.from_hparams(DoLaHyperParams())
    for given, match in (({"input_image": "a.jpg"}, "not supported yet. Leave input_image out"), ({}, "no input_text")):
        with pytest.raises(UsageError, match=match):
            editor.generate(**given)
    with pytest.raises(UsageError, match="takes settings"):
        SteerEditor.from_hparams("DoLa")  # type: ignore[arg-type]
    lm = toy.build("t5")
    with pytest.raises(NotEditable, match="encoder-decoder"):
        SteerEditor.from_hparams(DoLaHyperParams(model_name=(lm.model, lm.tokenizer))).generate("I")


def test_names() -> None:
    for name in ("SteerEditor", "DoLaHyperParams", "DeCoHyperParams", "DecodingEdit"):
        assert getattr(easyeditor, name).__name__ == name


@pytest.mark.parametrize("sequential", [False, True])
def test_base_editor_puts_it_on_once_and_measures_all_requests(sequential: bool) -> None:
    lm = toy.build("llama")
    editor = BaseEditor.from_hparams(hparams_of(lm, "DeCo"))
    requests = [toy.request(i) for i in range(3)]
    records, model, edits = editor.edit_requests(requests, sequential_edit=sequential)
    assert model is lm.model and len(records) == 3 and len(edits) == 1
    assert Ledger.of(lm).active == edits and edits[0].requests == ()
    for record, request in zip(records, requests, strict=True):
        assert record["post"]["rewrite_gen_content"] == editor.ask(request.prompt)
        assert record["requested_rewrite"]["prompt"] == request.prompt
    editor.rollback(edits[0].id)
    assert [record["pre"]["rewrite_gen_content"] for record in records] == [editor.ask(r.prompt) for r in requests]
    assert not lm.processors


def test_apply_function_of_old_scripts() -> None:
    lm = toy.build("llama")
    said = answer(lm, ASKED, 5)
    model, back = easyeditor.apply_dola_to_model(
        lm.model, lm.tokenizer, [toy.request().to_dict()], hparams_of(lm, "DoLa")
    )
    assert model is lm.model and answer(lm, ASKED, 5) != said
    back()
    assert answer(lm, ASKED, 5) == said


# --- settings and errors -------------------------------------------------------------------------------------------


def test_candidates() -> None:
    lm = toy.build("llama")
    assert not tied(lm) and tied(toy.build("gpt2"))

    def layers(lm: LM, **given: Any) -> tuple[int, ...]:
        return candidates(lm, DoLaHyperParams(**given))

    assert layers(lm) == (0,) and layers(lm, dola_layers="high") == (2,)
    assert layers(toy.build("gpt2")) == (2,), "early exits of tied embeddings say what was read"
    assert layers(lm, dola_layers=[3, 1, 3]) == (3, 1)
    lm.blocks = lm.blocks * 8  # 32 blocks
    assert layers(lm) == tuple(range(0, 16, 2)) and layers(lm, dola_layers="high") == tuple(range(16, 32, 2))
    assert layers(lm, final_layer=20) == tuple(range(0, 10, 2))
    lm.blocks = lm.blocks * 2  # 64
    assert layers(lm) == tuple(range(0, 20, 2)) and layers(lm, dola_layers="high") == tuple(range(44, 64, 2))


def test_layers_by_depth() -> None:
    lm = toy.build("llama")
    assert edit_of(lm, "DeCo", early_exit_layers=[]).config()["layers"] == [2, 3]
    lm.blocks = lm.blocks * 8  # 32
    assert by_depth(lm) == tuple(range(20, 29))
    preset = DeCoHyperParams.from_hparams("hparams/DeCo/llama-7b")
    assert (preset.early_exit_layers, preset.alpha) == (list(range(20, 29)), 0.6)
    assert (preset.threshold_top_p, preset.threshold_top_k) == (0.9, 20)
    assert DoLaHyperParams.from_hparams("./hparams/DoLa/llama.yaml").final_layer == 32


def test_files_of_existing_scripts(write: Any) -> None:
    path = write("deco.yaml", 'alg_name: "deco"\nmodel_name: "x"\ndevice: 0\nalpha: 0.6\nthreshold_top_p: 0.9\n'
                 "threshold_top_k: 20\nearly_exit_layers: [2, 3]\nmodel_parallel: false\n")  # fmt: skip
    assert DeCoHyperParams.from_hparams(path).early_exit_layers == [2, 3]
    path = write("dola.yaml", 'alg_name: "dola"\nmodel_name: "x"\ndola_layers: "high"\nfinal_layer: 32\n')
    assert DoLaHyperParams.from_hparams(path).dola_layers == "high"


@pytest.mark.parametrize(
    ("name", "settings", "match"),
    [
        ("DoLa", {"dola_layers": "lower"}, "'lower'. Use 'low', 'high'"),
        ("DoLa", {"dola_layers": []}, "empty"),
        ("DoLa", {"relative_top": 3.0}, "between 0 and 1"),
        ("DoLa", {"dola_layers": [4]}, "after 4 blocks; of its 4.*0 to 3"),
        ("DoLa", {"final_layer": 32, "dola_layers": "low"}, "final_layer.*has 4 blocks"),
        ("DeCo", {"early_exit_layers": [20]}, "DeCo reads toy-llama after 20 blocks"),
        ("DeCo", {"threshold_top_k": 0}, "threshold_top_k = 0"),
    ],
)
def test_settings_that_make_no_sense(name: str, settings: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        edit_of(toy.build("llama"), name, **settings)


@pytest.mark.parametrize("name", METHODS)
def test_what_cannot_be_read_is_refused(name: str) -> None:
    with pytest.raises(NotEditable, match=f"{name} reads the blocks of a decoder-only model.*encoder-decoder"):
        edit_of(toy.build("t5"), name)
    lm = toy.build("llama")
    edit = edit_of(lm, name)
    shallow = toy.build("llama")
    shallow.blocks = shallow.blocks[:2]
    with pytest.raises(UsageError, match=f"{name}.*of its 2"):
        Ledger.of(shallow).apply(edit)
    odd = toy.build("llama")
    odd.model.register_forward_hook(_adds_the_embeddings)
    with pytest.raises(NotEditable, match="last block's output alone"):
        edit_of(odd, name)


def _adds_the_embeddings(model: Any, args: Any, kwargs_or_output: Any, output: Any = None) -> Any:
    out = kwargs_or_output if output is None else output
    out.logits = out.logits + 10 * torch.randn_like(out.logits)
    return out
