"""MALMEN and RLEdit: the least squares, its gradients against plain autograd, sums in parts, and what goes wrong."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import toy
from easyeditor.core.archive import write_archive
from easyeditor.core.gradients import Factors
from easyeditor.core.hypernetwork import with_gradient
from easyeditor.core.lifelong import ridge
from easyeditor.core.massive import carried, changed, tokens_of
from easyeditor.core.rehearsal import Before, Rows, asked_again, drawn
from easyeditor.core.shifts import ShiftNetwork, Sums
from easyeditor.core.training import TOTAL, Visit
from easyeditor.edits.delta import Dense, LowRank, dense
from easyeditor.edits.ledger import applied
from easyeditor.errors import DamagedFile, NonFinite, UsageError, WrongBase
from easyeditor.hparams import complete
from easyeditor.lm.model import LM
from easyeditor.methods.malmen import MALMENHyperParams, MALMENTraining, MALMENTrainingHparams, malmen, prepare
from easyeditor.methods.rledit import RLEditTraining, RLEditTrainingHparams
from easyeditor.requests import EditRequest
from easyeditor.trainer import EditTrainer

SHAPES = {"a.weight": (3, 5), "b.weight": (3, 5), "c.weight": (4, 3)}
FACTS = [toy.request(i, relation) for i in range(4) for relation in ("home", "job")]


def settings(lm: LM, **given: Any) -> dict[str, Any]:
    names = [lm.weight_name(i) for i in (len(lm.blocks) - 2, len(lm.blocks) - 1)]
    quick = {"inner_params": names, "rank": 4, "lr": 1e-2, "meta_lr": 1e-3, "n_edits": 4, "max_iters": 4}
    return {**quick, "batch_size_once": 3, **given}


def visits(n: int = 4) -> list[Visit]:
    return [Visit(request, i, 0) for i, request in enumerate(FACTS[:n])]


def editor(lm: LM, **given: Any) -> MALMENTraining:
    made = MALMENTraining(lm, complete(MALMENTrainingHparams(**settings(lm, **given)), lm))
    made.prepare(visits(8))
    return made


def stirred(network: torch.nn.Module) -> None:
    """Weights away from where they begin, so that every gradient is there."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += (
                0.05 * torch.randn(parameter.shape, generator=generator) * max(float(parameter.abs().max()), 0.2)
            )


def some(seed: int = 0, tokens: int = 6) -> dict[str, Factors]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.zeros(tokens, dtype=torch.long)
    return {
        name: Factors(
            torch.randn(tokens, d_in, generator=generator), torch.randn(tokens, d_out, generator=generator), rows
        )
        for name, (d_out, d_in) in SHAPES.items()
    }


def network(**given: Any) -> ShiftNetwork:
    made = ShiftNetwork(SHAPES, **{"rank": 2, "n_blocks": 2, "lr": 0.3, **given})
    made.observe(some(7, tokens=40))
    stirred(made)
    return made


def plain(net: ShiftNetwork, name: str, found: Factors) -> torch.Tensor:
    """Delta as the equation has it, with everything in the graph."""
    d, k = net.moves(name, found.inputs, found.gradients).double(), found.inputs.double()
    system = k.T @ k + net.alpha(name) * torch.eye(k.shape[1], dtype=torch.double)
    return d.T @ k @ torch.linalg.inv(system)


@pytest.mark.parametrize("tokens", [3, 6, 30])
@pytest.mark.parametrize("at_once", [2, 100])
def test_the_change_and_its_gradients_are_those_of_plain_autograd(tokens: int, at_once: int) -> None:
    net, found = network(), some(tokens=tokens)
    generator = torch.Generator().manual_seed(3)
    for name, (d_out, d_in) in SHAPES.items():
        weight = torch.randn(d_out, d_in, generator=generator, dtype=torch.double)
        expected = plain(net, name, found[name])
        mine = net.change(name, found[name], at_once)
        assert torch.allclose(mine, expected, rtol=1e-6, atol=1e-6)
        wanted = torch.autograd.grad((expected * weight).sum(), list(net.parameters()), allow_unused=True)
        had = torch.autograd.grad((mine * weight).sum(), list(net.parameters()), allow_unused=True)
        for one, other in zip(had, wanted, strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.allclose(one, other, rtol=1e-6, atol=1e-6)
        assert had[0] is not None and had[1] is not None and bool(had[1].any()), "lr and lambda are learnt"


def test_a_token_moves_along_its_mapped_gradient() -> None:
    net, found = network(), some()["a.weight"]
    z = net.transforms["5x3"].normalised(found.inputs, found.gradients)
    for block in net.transforms["5x3"].blocks:
        z = z + block.scale[0] * torch.relu(z @ block.A @ block.B + block.bias) + block.shift[0]
    expected = -net.lrs[0] * (found.inputs * z[:, :5]).sum(1, keepdim=True) * z[:, 5:]
    assert torch.allclose(net.moves("a.weight", found.inputs, found.gradients), expected, atol=1e-6)
    fresh = ShiftNetwork(SHAPES, rank=2, n_blocks=2, lr=0.3)
    fresh.observe(some(7, tokens=40))
    k, g = fresh.transforms["5x3"](found.inputs, found.gradients, 0)
    assert torch.equal(torch.cat([k, g], 1), fresh.transforms["5x3"].normalised(found.inputs, found.gradients))


@pytest.mark.parametrize("tokens", [4, 12, 50])
def test_sums_of_parts_are_the_whole(tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    k, d = torch.randn(tokens, 12, generator=generator), torch.randn(tokens, 7, generator=generator)
    sums = Sums(12)
    for start in range(0, tokens, 5):
        sums.add(k[start : start + 5], d[start : start + 5])
        assert sum(len(held) for held, _ in sums._held) <= 12
    found = sums.change(0.5)
    assert torch.allclose(dense(found), dense(ridge(k, d, 0.5)), atol=1e-6)
    assert isinstance(found, LowRank if tokens == 4 else Dense)
    sums.add(torch.full((13, 12), torch.nan), torch.zeros(13, 7))
    with pytest.raises(NonFinite):
        sums.change(0.5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "t5"])
def test_two_stages_give_the_gradients_of_one(family: str) -> None:
    lm = toy.build(family)
    made = editor(lm)
    stirred(made.module)
    losses = made.losses([visits()])
    losses[TOTAL].sum().backward()
    had = {name: p.grad.clone() for name, p in made.module.named_parameters() if p.grad is not None}
    made.module.zero_grad()
    tokens = made.tokens(visits())
    changes = {name: plain(made.module, name, tokens[name]) for name in tokens}
    rows = drawn([[(visit, made.before(visit))] for visit in visits()], made.hparams.seed, 1, 1)
    with changed(made.sites, {name: change.float() for name, change in changes.items()}):
        found = asked_again(lm, made.sites, rows).per_edit(4)
    total = (found["loss/edit"] + found["loss/loc"]).mean()
    total.backward()
    assert torch.allclose(losses[TOTAL], total.detach(), atol=1e-6)
    for name, parameter in made.module.named_parameters():
        assert torch.allclose(had[name], parameter.grad, rtol=1e-4, atol=1e-5), name
    assert all(p.grad is None for p in lm.model.parameters())


def test_neither_passes_nor_parts_change_the_losses() -> None:
    lm = toy.build("llama")
    whole, parts = editor(lm, batch_size_once=32), editor(lm, batch_size_once=1, editor_batch_size=3)
    for one, other in zip(whole.losses([visits()]).values(), parts.losses([visits()]).values(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    two = whole.losses([visits(3), visits(4)])
    assert two[TOTAL].shape == (2,) and {"loss/edit", "loss/loc", "edit/acc", "ES", "loss/total_edit"} <= set(two)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "falcon", "t5"])
@pytest.mark.parametrize("token", ["ans", "mask"])
def test_what_is_learnt_on_is_what_the_edit_does(family: str, token: str, tmp_path: Path) -> None:
    lm = toy.build(family)
    made = editor(lm, token=token)
    stirred(made.module)
    path = kept(lm, made, tmp_path)
    found = made.losses([visits()])
    full = complete(MALMENHyperParams(archive=path, **settings(lm)), lm)
    edit = malmen(lm, FACTS[:4], full, prepare(lm, full), [])
    tokens = made.tokens(visits())
    for site in made.sites:
        name = site.weight_name
        expected = made.module.change(name, tokens[name], 1024).detach().float()
        assert torch.allclose(dense(edit.deltas[name]), expected, atol=1e-5)
    rows = drawn([[(visit, made.before(visit))] for visit in visits()], made.hparams.seed, 1, 1)
    with torch.no_grad(), applied(lm, edit):
        real = asked_again(lm, made.sites, rows).per_edit(4)
    for name in ("loss/edit", "loss/loc", "edit/acc"):
        assert torch.allclose(found[name], real[name].mean(), atol=1e-4), name


def kept(lm: LM, made: MALMENTraining, folder: Path, method: str = "MALMEN") -> str:
    own = {name: value for name, value in made.hparams.to_dict().items() if name not in ("archive", "model_name")}
    header = {"method": method, "model": lm.name, **made.header(), "settings": own}
    write_archive(folder, header, made.module.state_dict())
    return str(folder)


def test_tokens_of_many_facts_are_those_of_each() -> None:
    lm = toy.build("llama")
    sites = [lm.mlp_out(3)]
    name = sites[0].weight_name
    found = [found[name] for found in tokens_of(lm, sites, FACTS[:5], "ans", 2)]
    before = Before(lm, sites, "ans", 0.0)
    each = [before.factors(request)[name] for request in FACTS[:5]]
    for side in ("inputs", "gradients"):
        mine = torch.cat([getattr(part, side) for part in found])
        assert torch.allclose(mine, torch.cat([getattr(part, side) for part in each]), atol=1e-6)
    assert len(with_gradient(found[0]).rows) == len(found[0].rows)


def test_one_edit_holds_no_more_the_more_facts_it_has(tmp_path: Path) -> None:
    lm = toy.build("llama")
    made = editor(lm)
    full = complete(MALMENHyperParams(archive=kept(lm, made, tmp_path), **settings(lm)), lm)
    state = prepare(lm, full)
    one, many = (malmen(lm, facts, full, state, []) for facts in (FACTS[:1], FACTS * 40))
    name = made.sites[-1].weight_name
    assert isinstance(one.deltas[name], LowRank) and one.deltas[name].rank <= 2
    assert isinstance(many.deltas[name], Dense)
    assert not one.keys and not many.keys


def test_rledit_rewards_what_holds_after_the_steps() -> None:
    lm = toy.build("llama")
    given = {"num_seq": 2, "n_edits": 2, "back_depth": 2, "time_decay": 0.5, "reg_coef": 0.1, "loc_coef": 0.6}
    quick = {name: value for name, value in settings(lm).items() if name != "n_edits"}
    made = RLEditTraining(lm, complete(RLEditTrainingHparams(**quick, **given), lm))
    assert made.hparams.per_batch == 4
    made.prepare(visits(8))
    stirred(made.module)
    losses = made.losses([visits()])
    losses[TOTAL].sum().backward()
    had = {name: p.grad.clone() for name, p in made.module.named_parameters()}
    made.module.zero_grad()
    total, so_far = torch.zeros(()), {site.weight_name: torch.zeros(64, 256) for site in made.sites}
    first, second = visits()[:2], visits()[2:]
    for recent in ([first], [second, first]):
        with changed(made.sites, so_far):
            parts = list(tokens_of(lm, made.sites, [v.request for v in recent[0]], "ans", 2))
        changes = {name: plain(made.module, name, parts[0][name]) for name in parts[0]}
        now: Mapping[str, torch.Tensor] = {name: so_far[name] + change.float() for name, change in changes.items()}
        for i, each in enumerate(recent):
            rows = drawn([[(visit, made.before(visit))] for visit in each], made.hparams.seed, 1, 1)
            with changed(made.sites, now):
                found = asked_again(lm, made.sites, rows).per_edit(2)
            total = total + 0.5**i * (found["loss/edit"] + 0.6 * found["loss/loc"]).mean() / 2
        total = total + 0.1 * sum(change.square().sum() for change in changes.values()) / 2
        so_far = {name: each.detach() for name, each in now.items()}
    total.backward()
    assert torch.allclose(losses[TOTAL], total.detach().float(), rtol=1e-5)
    for name, parameter in made.module.named_parameters():
        assert torch.allclose(had[name], parameter.grad, rtol=1e-4, atol=1e-5), name


def test_a_sequence_of_one_is_malmen() -> None:
    lm = toy.build("llama")
    quick = settings(lm, n_edits=4)
    one = RLEditTraining(
        lm, complete(RLEditTrainingHparams(**quick, num_seq=1, reg_coef=0.0, loc_coef=1.0, n_blocks=2), lm)
    )
    one.prepare(visits(8))
    assert torch.allclose(one.losses([visits()])[TOTAL], editor(lm).losses([visits()])[TOTAL], atol=1e-5)


def test_it_is_trained(tmp_path: Path) -> None:
    lm = toy.taught("llama")
    config = MALMENTrainingHparams(
        model_name="toy", **settings(lm, max_iters=30, val_interval=10, meta_lr=3e-3, early_stop_key="ES_val")
    )
    run = EditTrainer(config, FACTS, FACTS, out=tmp_path / "out", lm=lm)
    found = run.run()
    assert run.history[-1]["loss/total_val"] < 0.9 * run.history[0]["loss/total_val"]
    state = prepare(lm, MALMENHyperParams(archive=str(tmp_path / "out")))
    assert state["sites"] == [lm.mlp_out(i).name for i in (2, 3)] and state["token"] == "ans"
    again = MALMENTrainingHparams(model_name="toy", **settings(lm, archive=str(tmp_path / "out"), eval_only=True))
    scored = EditTrainer(again, FACTS, FACTS, out=tmp_path / "again", lm=lm).run()
    assert scored["loss/total_val"] == pytest.approx(found["loss/total_val"], rel=1e-5)


def test_archives_that_do_not_fit(tmp_path: Path) -> None:
    lm = toy.build("llama")
    with pytest.raises(UsageError, match=r"easyedit train --method MALMEN --model toy-llama --data"):
        prepare(lm, MALMENHyperParams())
    path = kept(lm, editor(lm), tmp_path / "one")
    with pytest.raises(WrongBase, match="Load that model, or train"):
        prepare(toy.build("llama", seed=1), MALMENHyperParams(archive=path))
    with pytest.raises(UsageError, match="trained for MEND, not for MALMEN"):
        prepare(lm, MALMENHyperParams(archive=kept(lm, editor(lm), tmp_path / "two", "MEND")))
    with pytest.raises(DamagedFile, match="is in one of them only"):
        MALMENTraining(lm, complete(MALMENTrainingHparams(**settings(lm, n_blocks=1, archive=path)), lm))
    with pytest.raises(WrongBase, match="of shape"):
        MALMENTraining(lm, complete(MALMENTrainingHparams(**settings(lm, rank=2, archive=path)), lm))


def test_archives_of_easyedit(tmp_path: Path) -> None:
    lm = toy.build("gpt2")
    made = editor(lm)
    stirred(made.module)
    own, old = made.module, "net.(256, 64)."
    transform = own.transforms["256x64"]
    state = {f"{old}normalizer.n": transform.count.float()[None], f"{old}normalizer.mean": transform.mean.float()}
    state |= {f"{old}normalizer.var": transform.squares.float(), f"{old}normalizer.std": transform.mean.float()}
    state |= {f"{old}lr.weight": own.lrs.detach()[:, None], f"{old}lamda.weight": own.lamda.detach()[:, None]}
    for i, block in enumerate(transform.blocks):
        ends = {"A": "A", "B": "B", "bias": "bias", "scale": "scale.weight", "shift": "shift.weight"}
        state |= {f"{old}blocks.{i}.{ends[name]}": p.detach() for name, p in block.named_parameters()}
    state["model.transformer.wte.weight"] = torch.zeros(2, 2)
    torch.save({"model": state}, tmp_path / "gpt2-xl")
    found = prepare(lm, MALMENHyperParams(archive=str(tmp_path / "gpt2-xl"), **settings(lm)))["network"]
    for name, tensor in own.state_dict().items():
        assert torch.allclose(found.state_dict()[name].float(), tensor.float(), rtol=1e-5), name


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"token": "all"}, "Choose ans or mask"),
        ({"rank": 0}, "from 1 on"),
        ({"n_edits": 0}, "from 1 on"),
        ({"n_asked": 0}, "from 1 on"),
        ({"meta_lr": 0.0}, "above 0"),
        ({"max_grad_norm": -1.0}, "above 0"),
        ({"loc_coef": -1.0}, "Both begin at 0"),
        ({"inner_params": ["a.weight", "a.weight"]}, "twice"),
    ],
)
def test_settings_that_make_no_sense(given: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        MALMENTrainingHparams(**given).check()


@pytest.mark.parametrize(
    ("given", "match"),
    [({"num_seq": 0}, "Both begin at 1"), ({"time_decay": 1.5}, "at most 1"), ({"reg_coef": -1.0}, "begins at 0")],
)
def test_settings_of_rledit_that_make_no_sense(given: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        RLEditTrainingHparams(**given).check()


def test_files_of_existing_scripts(tmp_path: Path) -> None:
    text = "alg: MALMEN\nmodel_name: ./hugging_cache/gpt2-xl\nmodel_class: GPT2LMHeadModel\nlr: 1e-6\nmeta_lr: 1e-5\n"
    text += "n_edits: 1\nbatch_size: 1\neditor_batch_size: 1024\ntoken: mask\nearly_stop_key: ES_val\nloc_coef: 1\n"
    (tmp_path / "gpt2-xl.yaml").write_text(text + "rank: 1920\nn_blocks: 2\nmax_grad_norm: 1\nhalf: False\n")
    found = MALMENTrainingHparams.from_hparams(tmp_path / "gpt2-xl")
    assert (found.lr, found.meta_lr, found.token, found.per_batch, found.largest_norm) == (1e-6, 1e-5, "mask", 1, 1.0)
    preset = MALMENTrainingHparams.from_hparams("./hparams/TRAINING/MALMEN/gpt2-xl")
    assert preset.token == "mask" and len(preset.inner_params) == 6 and preset.early_stop_key == "ES_val"


def test_nothing_to_learn_has_no_gradient() -> None:
    zero = {"a.weight": torch.zeros(2, 3)}
    change = {"a.weight": torch.ones(2, 3, requires_grad=True)}
    assert carried(change, zero).detach() == 0.0


def test_a_step_may_look_at_some_of_the_facts() -> None:
    lm = toy.build("llama")
    made = editor(lm, n_asked=2)
    group = visits()
    asked = made._asked(group)
    assert len(asked) == 2 and all(visit in group for visit in asked) and list(made._asked(group)) == list(asked)
    assert made._asked([Visit(visit.request, visit.place, None) for visit in group]) != asked, "validation asks all"
    later = [Visit(visit.request, visit.place, epoch) for epoch in range(1, 9) for visit in group[:1]]
    drawn_ = {tuple(v.place for v in made._asked([first, *group[1:]])) for first in later}
    assert len(drawn_) > 1, "others are drawn another time"


def test_what_is_edited_together_is_no_probe() -> None:
    lm = toy.build("llama")
    made, one = editor(lm), toy.request(0)
    probe = next(probe for group in one.locality.values() for probe in group)
    other = EditRequest(prompt=probe.prompt, target_new=one.target_new, locality=one.locality)
    group = [(visit, made.before(visit)) for visit in (Visit(one, 0, 0), Visit(other, 1, 0))]

    def probes(rows: Rows) -> set[str]:
        pairs = [known.pairs[place] for known, place in zip(rows.known, rows.places, strict=True)]
        return {pair[0] for pair, asked in zip(pairs, rows.asked.tolist(), strict=True) if not asked}

    assert probe.prompt in probes(drawn([group[:1]], 0, 0, 9)) and probe.prompt not in probes(drawn([group], 0, 0, 9))
    assert probe.prompt in probes(made.before.anew([group[0][0]], set(), 0, 9))
    assert probe.prompt not in probes(made.before.anew([group[0][0]], {probe.prompt}, 0, 9))
