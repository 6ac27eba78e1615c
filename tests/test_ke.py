"""KE: the equations of its network, what is trained against the real edit, the constraint, archives, and mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import toy
from easyeditor.core.gates import Editor
from easyeditor.core.gradients import Factors
from easyeditor.core.likelihood import answer_logits, answers
from easyeditor.core.rehearsal import drawn
from easyeditor.core.training import TOTAL, Visit
from easyeditor.edits.delta import dense
from easyeditor.edits.ledger import applied
from easyeditor.errors import UsageError, WrongBase
from easyeditor.hparams import complete
from easyeditor.lm.generate import answer
from easyeditor.lm.model import LM
from easyeditor.methods.ke import KEHyperParams, KETraining, KETrainingHparams, Request, ke, prepare
from easyeditor.requests import EditRequest
from easyeditor.trainer import EditTrainer

SHAPES = {"a.weight": (3, 5), "b.weight": (4, 3)}


def network(edit_lr: float = 0.1) -> Editor:
    """One whose weights are all drawn, so that nothing is zero."""
    made, generator = Editor(6, SHAPES, (4, 8, 7), edit_lr, 0), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return made


def some(requests: int = 2, seed: int = 0) -> tuple[dict[str, Factors], list[torch.Tensor]]:
    """Factors of some requests, and their texts as embeddings."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(requests).repeat_interleave(3)
    factors = {
        name: Factors(*(torch.randn(len(rows), size, generator=generator) for size in (d_in, d_out)), rows)
        for name, (d_out, d_in) in SHAPES.items()
    }
    return factors, [torch.randn(5 + i, 6, generator=generator) for i in range(requests)]


def settings(lm: LM, **given: Any) -> dict[str, Any]:
    names = [lm.weight_name(i) for i in (-2 + len(lm.blocks), -1 + len(lm.blocks))]
    sizes = {"lstm_dim": 8, "condition_dim": 16, "hidden_dim": 12}
    return {"model_name": "toy", "inner_params": names, "edit_lr": 1e-2, **sizes, **given}


def training(lm: LM, **given: Any) -> KETraining:
    return KETraining(lm, complete(KETrainingHparams(**settings(lm, **given)), lm))


def stirred(editor: KETraining) -> KETraining:
    """An editor that has learnt something, whatever it is."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for shift in editor.module.shifts:
            shift.outer.weight.copy_(torch.randn(shift.outer.weight.shape, generator=generator) / 20)
    return editor


def test_the_change_is_the_papers_equation() -> None:
    editor, (factors, texts) = network(), some()
    changes = editor(factors, texts)
    condition = editor.reader(texts)
    for name, shift, lr in zip(SHAPES, editor.shifts, editor.lrs, strict=True):
        raw = shift.outer(torch.tanh(shift.inner(condition)))
        d_out, d_in = SHAPES[name]
        for row in range(2):
            alpha, beta, gamma, delta, eta = raw[row].split((d_out, d_in, d_out, d_in, 1))
            beta, delta = 2 * d_out * (beta - 1), 2 * d_out * delta
            at = factors[name].rows == row
            gradient = factors[name].gradients[at].T @ factors[name].inputs[at]
            masked = torch.outer(alpha.softmax(0), beta) * gradient
            expected = lr * eta.sigmoid() * (masked + torch.outer(gamma.softmax(0), delta))
            mine = changes[name].rows == row
            found = changes[name].gradients[mine].T @ changes[name].inputs[mine]
            assert torch.allclose(found, expected, atol=1e-4)
            assert int(mine.sum()) == int(at.sum()) + 1, "one rank more than the gradient"


def test_the_reading_is_that_of_an_lstm_in_both_directions_and_of_each_text_alone() -> None:
    editor, (factors, texts) = network(), some(3)
    lstm = editor.reader.lstm
    for i, text in enumerate(texts):
        states, _ = lstm(text[None])
        last = torch.cat([states[0, -1, :4], states[0, 0, 4:]])
        assert torch.allclose(editor.reader(texts)[i], torch.tanh(editor.reader.out(last)), atol=1e-6)
    whole = editor(factors, texts)["a.weight"]
    alone = {name: Factors(f.inputs[3:6], f.gradients[3:6], f.rows[:3]) for name, f in factors.items()}
    second = editor(alone, texts[1:2])["a.weight"]
    assert torch.allclose(whole.gradients[whole.rows == 1], second.gradients, atol=1e-6)
    assert whole.rows.tolist() == sorted(whole.rows.tolist())


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "t5"])
def test_before_any_training_it_is_a_step_of_gradient_descent(family: str) -> None:
    lm, request = toy.build(family), toy.request()
    editor = training(lm, edit_lr=0.5)
    state = {"network": editor.module, "sites": [site.name for site in editor.sites]}
    edit = ke(lm, [request], KEHyperParams(), state, [])
    batch = answers(lm, [(request.prompt, request.target_new)])
    site = editor.sites[-1]
    weight = site.weight.requires_grad_(True)
    logp = answer_logits(lm, batch).log_softmax(-1).gather(1, batch.labels[:, None])
    (gradient,) = torch.autograd.grad(-logp.mean(), [weight])
    assert torch.allclose(dense(edit.deltas[site.weight_name]), -0.5 * site.oriented(gradient), atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_what_is_trained_is_what_the_real_edit_does(family: str) -> None:
    """Two batches, one of two facts: the losses are those of the edit applied to the weights."""
    lm = toy.build(family)
    editor = stirred(training(lm, edit_lr=2.0, probes=2))
    visits = [Visit(toy.request(i), i, 0) for i in (0, 5, 9)]
    groups = [visits[:1], visits[1:]]
    found = editor.losses(groups)
    state = {"network": editor.module, "sites": [site.name for site in editor.sites]}
    for place, group in enumerate(groups):
        real = ke(lm, [visit.request for visit in group], KEHyperParams(), state, [])
        rows = drawn([[(visit, editor.before(visit)) for visit in group]], editor.hparams.seed, 1, 2)
        chosen = zip(rows.known, rows.places, rows.asked.tolist(), strict=True)
        pairs = [known.pairs[at] for known, at, asked in chosen if asked]
        with torch.no_grad(), applied(lm, real):
            batch = answers(lm, pairs, with_end=True)
            logp = answer_logits(lm, batch).log_softmax(-1).gather(1, batch.labels[:, None]).squeeze(1)
        told = [logp[batch.rows == row][:-1].mean() for row in range(len(pairs))]
        assert torch.allclose(found["loss/edit"][place], -torch.stack(told).mean(), atol=1e-4)
    assert (found["loss/loc"] > 0).all() and found[TOTAL].requires_grad


def test_a_batch_is_the_sum_of_its_facts_in_any_order() -> None:
    lm = toy.build("llama")
    editor = stirred(training(lm))
    state = {"network": editor.module, "sites": [site.name for site in editor.sites]}
    requests = [toy.request(0), toy.request(5), toy.request(10, "job")]

    def change(facts: list[EditRequest]) -> torch.Tensor:
        return dense(ke(lm, facts, KEHyperParams(), state, []).deltas[lm.weight_name(3)])

    together = change(requests)
    assert torch.allclose(together, change(requests[::-1]), atol=1e-6)
    assert torch.allclose(together, sum(change([request]) for request in requests), atol=1e-6)


def test_the_multiplier_ascends_while_more_moves_than_may_and_is_never_negative(tmp_path: Path) -> None:
    lm, facts = toy.build("llama"), [toy.request(i) for i in range(4)]
    common = {"max_iters": 6, "accumulate_bs": 1, "val_interval": 6, "final_eval": False, "edit_lr": 1.0, "lr": 1e-4}
    for margin, low, high in ((0.0, 1.2, 2.3), (1e6, 0.0, 0.5)):
        config = KETrainingHparams(**settings(lm, **common, margin=margin, lr_alpha=0.2))
        trainer = EditTrainer(config, facts, facts, out=tmp_path / str(margin), lm=lm)
        trainer.run()
        found = training(lm, archive=str(tmp_path / str(margin)))
        assert low <= float(found.module.multiplier.detach()) <= high
        assert trainer.history[-1]["multiplier_val"] >= 0
    losses = training(lm, margin=0.25).losses([[Visit(facts[0], 0, 0)]])
    assert torch.allclose(losses[TOTAL], losses["loss/edit"] + losses["loss/loc"] - 0.25)
    assert torch.allclose(losses["loss/total_edit"], 0.1 * losses["loss/edit"] + losses["loss/loc"])


def test_the_old_answer_is_the_records_or_the_models_own() -> None:
    lm = toy.taught("llama")
    request, text = toy.request(), Request(lm)
    assert answer(lm, [request.prompt], 4) == [request.ground_truth]
    bare = EditRequest(prompt=request.prompt, target_new=request.target_new)
    assert torch.equal(text(bare), text(request))
    ids = lm.text.encode(f"{request.ground_truth} >> {request.target_new} || {request.prompt}").ids
    assert text(request).shape == (len(ids), toy.WIDTH)
    assert text.name == "model.embed_tokens.weight"


def test_building_it_leaves_the_global_generator_alone() -> None:
    state = torch.random.get_rng_state()
    first, second = training(toy.build("gpt2")), training(toy.build("gpt2"))
    toy_state = torch.random.get_rng_state()
    torch.random.set_rng_state(state)
    toy.build("gpt2"), toy.build("gpt2")
    assert torch.equal(toy_state, torch.random.get_rng_state())
    for one, other in zip(first.module.parameters(), second.module.parameters(), strict=True):
        assert torch.equal(one, other)


def test_an_archive_knows_its_projections_sizes_and_embeddings(tmp_path: Path) -> None:
    lm = toy.build("llama")
    config = KETrainingHparams(**settings(lm, max_iters=2, accumulate_bs=1, val_interval=2))
    facts = [toy.request(i) for i in range(3)]
    EditTrainer(config, facts, facts, out=tmp_path / "a", lm=lm).run()
    hparams = KEHyperParams(archive=str(tmp_path / "a"))  # other sizes, and no projections named
    state = prepare(lm, hparams)
    assert state["sites"] == [lm.mlp_out(2).name, lm.mlp_out(3).name]
    assert state["network"].reader.lstm.hidden_size == 8
    assert set(ke(lm, facts, hparams, state, []).deltas) == {lm.weight_name(2), lm.weight_name(3)}
    other = toy.build("llama")
    with torch.no_grad():
        other.model.get_input_embeddings().weight.mul_(2.0)  # type: ignore[operator]
    with pytest.raises(WrongBase, match=r"'model.embed_tokens.weight' had the fingerprint"):
        prepare(other, hparams)


def test_what_goes_wrong_gets_a_sentence() -> None:
    lm = toy.build("llama")
    with pytest.raises(UsageError, match=r"easyedit train --method KE --model toy-llama --data"):
        prepare(lm, KEHyperParams())
    for given, match in (
        ({"margin": -1.0}, "Setting 'margin' of KE is -1.0"),
        ({"lstm_dim": 0}, "Setting 'lstm_dim' of KE is 0"),
        ({"rephrases": -1}, "Setting 'rephrases' of KE is -1"),
        ({"inner_params": ["a", "a"]}, "names a projection twice"),
    ):
        with pytest.raises(UsageError, match=match):
            KEHyperParams(**given).check()


def test_existing_files_are_read(write: Any) -> None:
    """The fields of EasyEdit's files of KE."""
    text = (
        "model_name: ./hugging_cache/gpt2-xl\nmodel_class: GPT2LMHeadModel\ntokenizer_class: GPT2Tokenizer\n"
        "tokenizer_name: ./hugging_cache/gpt2-xl\ninner_params:\n- transformer.h.45.mlp.c_proj.weight\narchive: null\n"
        "alg: KE\nlr: 1e-5\nedit_lr: 1e-2\nlr_lr: 1e-3\nseed: 42\ncedit: 0.1\ncloc: 1.0\ncbase: 1.0\ndropout: 0.0\n"
        "train_base: False\nno_grad_layers: null\ndevice: 0\nbatch_size: 1\nmodel_save_pt: 5000\nsilent: False\n"
        "max_iters: 100000\nlog_interval: 10\neval_log_interval: 100\nfinal_eval: True\nval_interval: 10\n"
        'early_stop_patience: 20000\nearly_stop_key: "loss/total_edit_val"\neval_only: False\nhalf: False\n'
        "debug: False\nsave: False\nverbose: True\nval_batch_size: 5\naccumulate_bs: 10\nval_steps: 500\nopt: Adam\n"
        "grad_clip: 100.\nresults_dir: ./results\n"
    )
    hparams = KETrainingHparams.from_hparams(write("gpt2-xl.yaml", text))
    assert (hparams.lr, hparams.edit_lr, hparams.lr_lr, hparams.alg_name) == (1e-5, 1e-2, 1e-3, "KE")
    edit = KEHyperParams.from_hparams(write("edit.yaml", f"{text}alg_name: KE\nlr_scale: 1.0\n"))
    assert edit.lr_scale == 1.0 and edit.inner_params == hparams.inner_params
