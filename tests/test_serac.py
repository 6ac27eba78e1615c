"""SERAC: the equations, one answer however a text is read, the memory, folders, archives, and what goes wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import toy
from easyeditor.core.archive import write_archive
from easyeditor.core.counterfactual import Question, asked, networks
from easyeditor.core.likelihood import answer_logits, answers
from easyeditor.core.passes import Unread
from easyeditor.core.scope_classifier import Measure, Scope, TokenReader, standing
from easyeditor.core.scope_texts import drawn
from easyeditor.core.training import TOTAL, Visit
from easyeditor.edits.edit import ModuleEdit
from easyeditor.edits.ledger import Ledger, applied
from easyeditor.edits.store import load_edits, save_edits
from easyeditor.errors import DamagedFile, UsageError, WrongBase
from easyeditor.hparams import complete
from easyeditor.lm.generate import continuations
from easyeditor.lm.model import LM, logits_of
from easyeditor.methods.serac import SERACHyperParams, SERACTraining, SERACTrainingHparams, prepare, serac

FAMILIES = ("gpt2", "llama", "gemma2", "falcon", "t5")
SMALL = {"width": 16, "n_blocks": 1, "max_iters": 4, "supervised": True}


def untrained(lm: LM, folder: Path, **given: Any) -> str:
    """An archive with drawn weights: a fact is about its own prompt, and what is said of it is anything."""
    editor = SERACTraining(lm, complete(SERACTrainingHparams(**{**SMALL, **given}), lm))
    header = {"method": "SERAC", "model": lm.name, **editor.header(), "settings": {}}
    state = editor.module.state_dict()
    if "scope.out.weight" in state and not given.get("cross_attend"):
        state["scope.out.weight"] *= 1000  # far from all else
    write_archive(folder, header, state)
    return str(folder)


def edits(lm: LM, folder: Path, *requests: Any, **given: Any) -> list[ModuleEdit]:
    hparams = complete(SERACHyperParams(archive=untrained(lm, folder, **given), **{**SMALL, **given}), lm)
    state = prepare(lm, hparams)
    return [replace(serac(lm, [request], hparams, state, []), method="SERAC") for request in requests]


def logits(lm: LM, prompt: str) -> Tensor:
    with torch.no_grad():
        return logits_of(lm.run(torch.tensor([lm.text.encode(prompt).ids])))[0].float()


def counterfactual(lm: LM, edit: ModuleEdit, prompt: str, target: str) -> Tensor:
    """What the small model says after a prompt that is a fact's own, (vocab,)."""
    (facts,) = edit.wrappers.values()
    own = networks(facts.spec)
    own.load_state_dict(facts.weights)
    read = asked(lm, [(prompt, target)])
    with torch.no_grad():
        question = Question(read.prompt(0), read.answers[0], read.texts[0], read.splits[0], [read.places(0)[0]])
        return own.counterfactual(lm, [question])[0]


def test_the_distances_are_those_of_the_settings() -> None:
    a, b = torch.tensor([0.3, 0.0, 1.0, 2.0]), torch.tensor([0.0, 0.4, 1.0, 1.0])
    far = (a - b).norm()
    assert torch.isclose(Measure().distance(a, b), far**2)
    assert torch.isclose(Measure(square=False).distance(a, b), far)
    assert torch.isclose(Measure(cos=True).distance(a, b), 1 - torch.cosine_similarity(a, b, dim=0))
    assert torch.isclose(Measure(bound_embeds=True).distance(a, b), (a.tanh() - b.tanh()).norm() ** 2)
    assert torch.isclose(Measure(dist_heads=2).distance(a, b), torch.tensor(0.25)), "the nearer half counts"
    same = a.clone().requires_grad_(True)
    Measure(square=False).distance(same, a).backward()
    assert torch.isfinite(same.grad).all()


def test_a_fact_stands_from_where_it_is_met_until_another_is() -> None:
    likeness = torch.tensor([[[0.1, 0.3], [0.2, 0.1], [0.9, 0.2], [0.1, 0.2], [0.2, 0.6], [0.3, 0.1]]])
    near, which = standing(likeness)
    assert near[0].tolist() == pytest.approx([0.3, 0.3, 0.9, 0.9, 0.6, 0.6])
    assert which[0].tolist() == [1, 1, 0, 0, 1, 1]


def test_what_is_said_of_a_text_depends_on_the_tokens_so_far() -> None:
    lm, reader = toy.build("llama"), TokenReader(64, 16, 2)
    scope, texts = Scope(reader, Measure(), 16).eval(), [[1, 5, 9, 4], [1, 5], [1, 5, 7, 3, 8, 2]]
    with torch.no_grad():
        whole, alone = scope.vectors(lm, texts), scope.vectors(lm, texts[1:2])
    assert torch.allclose(whole[0, :2], whole[2, :2], atol=1e-6) and torch.allclose(whole[1, :2], alone[0], atol=1e-6)
    assert not torch.allclose(whole[0, 2], whole[2, 2], atol=1e-3)
    together = Scope(reader, Measure(cross_attend=True), None).eval()
    with torch.no_grad():
        alike = together(lm, [[1, 4], [1, 6, 6]], texts)
    assert alike.shape == (3, 6, 2) and (alike <= 0).all()
    assert torch.allclose(alike[0, :2], alike[2, :2], atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_the_mixture_is_that_of_the_paper(family: str, soft: bool, tmp_path: Path) -> None:
    lm, request, other = toy.build(family), toy.request(), toy.request(5)
    (edit,) = edits(lm, tmp_path, request, soft_weighting=soft)
    before = logits(lm, request.prompt)[-1], logits(lm, other.prompt)[-1]
    said = counterfactual(lm, edit, request.prompt, request.target_new)
    with applied(lm, edit):
        own, elsewhere = logits(lm, request.prompt)[-1], logits(lm, other.prompt)[-1]
    assert torch.allclose(own.softmax(-1), said.exp(), atol=1e-4), "at its own prompt a fact is certain"
    assert float(said.exp().sum()) == pytest.approx(1, abs=1e-3)
    if not soft:
        assert torch.equal(elsewhere, before[1]), "nothing is touched, not even by rounding"
        return
    shares = (elsewhere.softmax(-1) - before[1].softmax(-1)) / (said.exp() - before[1].softmax(-1))
    assert torch.isfinite(shares).all()


def test_soft_weighting_mixes_probabilities_by_the_likeness(tmp_path: Path) -> None:
    lm, request, other = toy.build("llama"), toy.request(), toy.request(5)
    (edit,) = edits(lm, tmp_path, request, soft_weighting=True)
    (facts,) = edit.wrappers.values()
    own = networks(facts.spec)
    own.load_state_dict(facts.weights)
    read, text = asked(lm, [(request.prompt, request.target_new)]), list(lm.text.encode(other.prompt).ids)
    with torch.no_grad():
        share, _ = standing(own.scope(lm, [read.prompt(0)], [text]).exp())
        said = own.counterfactual(lm, [Question(read.prompt(0), read.answers[0], text, None, range(len(text)))])
    before = logits(lm, other.prompt).softmax(-1)
    expected = share[0, :, None] * said.exp() + (1 - share[0, :, None]) * before
    with applied(lm, edit):
        assert torch.allclose(logits(lm, other.prompt).softmax(-1), expected, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_says_the_same_with_a_cache_without_and_in_any_batch(family: str, tmp_path: Path) -> None:
    lm, request = toy.build(family), toy.request()
    (edit,) = edits(lm, tmp_path, request)
    prompts = [request.prompt, toy.request(3).prompt, f"{toy.request(2).prompt} {request.prompt}"]
    rows = [list(lm.text.encode(prompt).ids) for prompt in prompts]
    before = continuations(lm, rows, 6)
    with applied(lm, edit):
        together, alone = continuations(lm, rows, 6), continuations(lm, rows, 6, batch_size=1)
        generated = {
            cached: lm.model.generate(
                torch.tensor(rows[:1]), attention_mask=torch.ones(1, len(rows[0]), dtype=torch.long),
                max_new_tokens=6, do_sample=False, use_cache=cached,
            )[0]
            for cached in (True, False)
        }  # fmt: skip
    assert together == alone and together[0] != before[0] and together[1] == before[1]
    assert torch.equal(generated[True], generated[False])
    own = generated[True].tolist()[1 if lm.seq2seq else len(rows[0]) :]
    assert own[: len(together[0])] == together[0]


def test_beams_change_places_with_their_texts(tmp_path: Path) -> None:
    lm, request = toy.build("gpt2"), toy.request()
    (edit,) = edits(lm, tmp_path, request)
    ids = torch.tensor([lm.text.encode(request.prompt).ids])
    with applied(lm, edit):
        found = [
            lm.model.generate(ids, attention_mask=torch.ones_like(ids), num_beams=3, max_new_tokens=5, use_cache=cached)
            for cached in (True, False)
        ]
    assert torch.equal(*found)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "t5"])
def test_the_head_may_see_a_few_positions_only(family: str, tmp_path: Path) -> None:
    lm, request = toy.build(family), toy.request()
    (edit,) = edits(lm, tmp_path, request)
    pairs = [(toy.request(4).prompt, "rome"), (request.prompt, request.target_new)]
    batch = answers(lm, pairs, with_end=True)
    with torch.no_grad(), applied(lm, edit):
        some = answer_logits(lm, batch)
        every = logits_of(lm.run(batch.ids, batch.mask, decoder_input_ids=batch.decoder_ids))
    assert torch.allclose(some, every[batch.rows, batch.columns], atol=1e-5)


def test_the_memory_grows_and_of_two_facts_with_one_prompt_the_newer_holds(tmp_path: Path) -> None:
    lm = toy.build("llama")
    first, second = toy.request(0), toy.request(5)
    again = replace(first, target_new="lima")
    own = edits(lm, tmp_path, first, second, again)
    said = [counterfactual(lm, e, r.prompt, r.target_new) for e, r in zip(own, (first, second, again), strict=True)]
    ledger, base = Ledger.of(lm), logits(lm, first.prompt)
    for edit in own:
        ledger.apply(edit)
    assert torch.allclose(logits(lm, first.prompt)[-1].softmax(-1), said[2].exp(), atol=1e-4)
    assert torch.allclose(logits(lm, second.prompt)[-1].softmax(-1), said[1].exp(), atol=1e-4)
    ledger.undo(own[2].id)
    assert torch.allclose(logits(lm, first.prompt)[-1].softmax(-1), said[0].exp(), atol=1e-4)
    ledger.undo(own[0].id)
    assert torch.equal(logits(lm, first.prompt), base)
    assert torch.allclose(logits(lm, second.prompt)[-1].softmax(-1), said[1].exp(), atol=1e-4)
    ledger.undo(own[1].id)
    assert not lm.model._forward_hooks


def test_edits_that_share_networks_are_saved_with_one_copy(tmp_path: Path) -> None:
    lm, requests = toy.build("gpt2"), [toy.request(i) for i in (0, 3, 5)]
    own = edits(lm, tmp_path / "archive", *requests)
    one = (save_edits(own[0], tmp_path / "one") / "edit.safetensors").stat().st_size
    folder = save_edits(own, tmp_path / "all")
    assert (folder / "edit.safetensors").stat().st_size < 1.1 * one
    loaded = load_edits(folder)
    assert loaded == own and [edit.id for edit in loaded] == [edit.id for edit in own]
    fresh = toy.build("gpt2")
    for edit in loaded:
        Ledger.of(fresh).apply(edit)
    for edit in own:
        Ledger.of(lm).apply(edit)
    for request in requests:
        assert torch.equal(logits(fresh, request.prompt), logits(lm, request.prompt))


def test_what_nobody_knows_the_tokens_of_is_refused(tmp_path: Path) -> None:
    lm, request = toy.build("llama"), toy.request()
    (edit,) = edits(lm, tmp_path, request)
    ids = torch.tensor([lm.text.encode(request.prompt).ids])
    past = lm.run(ids, use_cache=True).past_key_values
    with applied(lm, edit):
        with pytest.raises(Unread, match="made before its edit was there"):
            lm.run(ids[:, -1:], torch.ones(1, ids.shape[1] + 1), past=past, use_cache=True)
        with pytest.raises(Unread, match="Pass input_ids"):
            lm.model(inputs_embeds=torch.zeros(1, 3, 64))


def test_a_loss_that_is_asked_for_is_that_of_the_mixture(tmp_path: Path) -> None:
    lm, request = toy.build("gpt2"), toy.request()
    (edit,) = edits(lm, tmp_path, request)
    ids = torch.tensor([lm.text.encode_pair(request.prompt, request.target_new)[0].ids])
    with torch.no_grad(), applied(lm, edit):
        out = lm.model(input_ids=ids, labels=ids)
    logp = out.logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
    assert torch.isclose(out.loss, -logp.mean(), atol=1e-4)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"supervised": False},
        {"supervised": False, "soft_weighting": True},
        {"cross_attend": True, "use_all_negatives": True},
        {"cos": True, "bound_embeds": True, "dist_heads": 4},
        {"square": False, "use_all_negatives": True, "freeze": 1},
    ],
    ids=lambda given: "-".join(given) or "plain",
)
@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_every_way_to_train_lowers_its_loss(family: str, given: dict[str, Any]) -> None:
    lm = toy.build(family)
    editor = SERACTraining(lm, complete(SERACTrainingHparams(**{**SMALL, "cedit": 1.0, **given}), lm))
    group = [Visit(toy.request(i), i, 0, toy.request(i + 5)) for i in (0, 3)]
    optimiser = torch.optim.Adam(editor.parameters(), lr=5e-3)
    losses = []
    for _ in range(8):
        found = editor.losses([group])
        optimiser.zero_grad()
        found[TOTAL].sum().backward()
        optimiser.step()
        losses.append(float(found[TOTAL].detach()))
    assert losses[-1] < losses[0]
    assert set(found) >= {"loss/edit", "loss/loc", "loss/total_edit", "edit/acc", "loc/acc"}
    assert all(p.grad is None for p in lm.model.parameters())


def test_which_texts_a_fact_is_about() -> None:
    lm = toy.build("llama")
    texts = drawn(lm, [Visit(toy.request(0), 0, 0, toy.request(5)), Visit(toy.request(5), 1, 0)], 0, 2, 2)
    about, (own, others) = texts.about(), texts.outside(True)
    assert about.sum(0).tolist() == [3, 3] and not (about & (own | others)).any()
    assert own.sum(0).tolist() == [3, 2], "two probes each, and the other request"
    borrowed = [prompt for prompt, _ in texts.pairs].index(toy.request(5).prompt)
    assert (own | others)[borrowed].tolist() == [True, False], "the prompt that the first borrows is the second's own"
    assert torch.equal(texts.outside(False)[0], own) and len(texts.outside(False)) == 1


def folders(tmp_path: Path, lm: LM) -> dict[str, str]:
    """A small model of the same tokens, and an encoder with tokens of its own."""
    small = toy.build("gpt2", seed=3)
    small.model.save_pretrained(tmp_path / "small")
    lm.tokenizer.save_pretrained(tmp_path / "small")
    tok = toy.tokenizer(bos=True)
    config = transformers.DistilBertConfig(
        vocab_size=len(tok), dim=16, n_layers=2, n_heads=2, hidden_dim=32, pad_token_id=0
    )
    transformers.DistilBertModel(config).save_pretrained(tmp_path / "encoder")
    tok.save_pretrained(tmp_path / "encoder")
    return {"small_name": str(tmp_path / "small"), "cls_name": str(tmp_path / "encoder")}


@pytest.mark.parametrize("given", [{}, {"cross_attend": True}, {"freeze": 1, "checkpoint_grad": True}])
def test_models_of_folders_serve_and_are_saved_with_the_edit(given: dict[str, Any], tmp_path: Path) -> None:
    lm, request = toy.build("gpt2"), toy.request()
    named = folders(tmp_path, lm)
    editor = SERACTraining(lm, complete(SERACTrainingHparams(**{**SMALL, **named, **given}), lm))
    found = editor.losses([[Visit(request, 0, 0)]])
    found[TOTAL].sum().backward()
    (edit,) = edits(lm, tmp_path / "archive", request, **named, **given)
    folder = save_edits(edit, tmp_path / "edit")
    for name in named.values():
        Path(name).rename(Path(name).with_suffix(".gone"))
    fresh = toy.build("gpt2")
    Ledger.of(fresh).apply(load_edits(folder)[0])
    with applied(lm, edit):
        assert torch.equal(logits(lm, request.prompt), logits(fresh, request.prompt))


def test_a_folder_that_is_not_there_or_speaks_otherwise_is_refused(tmp_path: Path) -> None:
    lm = toy.build("gpt2")
    with pytest.raises(UsageError, match=r"'small_name'.*no model is in such a folder.*--set small_name=null"):
        untrained(lm, tmp_path / "a", small_name="./hugging_cache/gpt2")
    with pytest.raises(UsageError, match=r"'cls_name'.*no model is in such a folder"):
        untrained(lm, tmp_path / "a", cls_name=str(tmp_path))
    named = folders(tmp_path, lm)
    tok = json.loads((tmp_path / "small" / "tokenizer.json").read_text())
    words = tok["model"]["vocab"]
    words["oslo"], words["rome"] = words["rome"], words["oslo"]
    (tmp_path / "small" / "tokenizer.json").write_text(json.dumps(tok))
    with pytest.raises(UsageError, match="whose tokens are not those of toy-gpt2"):
        untrained(lm, tmp_path / "a", small_name=named["small_name"])


def test_archives_belong_to_a_model_and_a_method(tmp_path: Path) -> None:
    lm = toy.build("llama")
    with pytest.raises(UsageError, match=r"easyedit train --method SERAC --model toy-llama"):
        prepare(lm, SERACHyperParams())
    path = untrained(lm, tmp_path / "archive")
    with pytest.raises(WrongBase, match="trained on toy-llama"):
        prepare(toy.build("llama", seed=1), SERACHyperParams(archive=path))
    header = json.loads((tmp_path / "archive" / "archive.json").read_text())
    (tmp_path / "archive" / "archive.json").write_text(json.dumps({**header, "method": "MEND"}))
    with pytest.raises(UsageError, match="trained for MEND, not for SERAC"):
        prepare(lm, SERACHyperParams(archive=path))
    header["spec"]["width"] = 32
    (tmp_path / "archive" / "archive.json").write_text(json.dumps(header))
    with pytest.raises(DamagedFile, match="does not fit its own description"):
        prepare(lm, SERACHyperParams(archive=path))


def test_archives_of_easyedit_are_read(tmp_path: Path) -> None:
    lm = toy.build("gpt2")
    named = folders(tmp_path, lm)
    editor = SERACTraining(lm, complete(SERACTrainingHparams(**SMALL, **named), lm))
    state = editor.module.state_dict()
    old = {"scale": torch.tensor(1.0), "model_config": lm.model.config}
    for name, tensor in state.items():
        moved = name.replace("scope.reader.model.", "classifier.").replace("counterfactual.model.", "replacement.")
        old |= {moved: tensor + 1} if tensor.is_floating_point() else {}
    torch.save({"model": old, "step": 3}, tmp_path / "gpt2-xl")
    found = prepare(lm, SERACHyperParams(archive=str(tmp_path / "gpt2-xl"), **SMALL, **named))["weights"]
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        expected = tensor + 1 if tensor.is_floating_point() else tensor
        assert torch.allclose(found[name].float(), expected.float()), name


def test_an_old_archive_of_other_networks_is_refused(tmp_path: Path) -> None:
    lm = toy.build("gpt2")
    torch.save({"model": {"mend.(8, 8).mlp.layers.0.u": torch.zeros(2), "edit_lrs": torch.zeros(1)}}, tmp_path / "mend")
    torch.save({"model": {"classifier.pre_classifier.weight": torch.zeros(2)}}, tmp_path / "cross")
    for name, named in (("mend", {}), ("mend", folders(tmp_path, lm)), ("cross", {})):
        with pytest.raises(DamagedFile, match=r"other networks than the settings name.*cls_name"):
            prepare(lm, SERACHyperParams(archive=str(tmp_path / name), **SMALL, **named))


def test_edits_of_two_archives_do_not_share_a_memory(tmp_path: Path) -> None:
    lm = toy.build("llama")
    (first,), (second,) = (edits(lm, tmp_path / str(s), toy.request(s), seed=s) for s in (0, 1))
    ledger = Ledger.of(lm)
    ledger.apply(first)
    before = logits(lm, toy.request(0).prompt)
    with pytest.raises(UsageError, match="different archives or settings"):
        ledger.apply(second)
    assert torch.equal(logits(lm, toy.request(0).prompt), before)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"freeze_cntr": True}, "method SCR"),
        ({"lora": 8}, "no published code reads it"),
        ({"dist_heads": 3, "width": 16}, "does not divide"),
        ({"width": 0}, "from 1 on"),
        ({"cedit": -1.0}, "0 or above"),
        ({"rephrases": -1}, "begin at 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        SERACHyperParams(**given).check()


def test_drawing_networks_leaves_the_generators_alone() -> None:
    before = torch.random.get_rng_state()
    spec = {"embedded": 8, "width": 8, "blocks": 1, "window": 4, "measure": {}}
    one, two = (networks(spec, seed=3).state_dict() for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(one[name], two[name]) for name in one)
