"""MEND: its network's equations, what a rehearsed edit says against the real one, archives, and what goes wrong."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

import toy
from easyeditor.core.archive import base_of, load_archive, read_archive, write_archive
from easyeditor.core.gradients import Factors, factors
from easyeditor.core.hypernetwork import Design, Hypernetwork
from easyeditor.core.likelihood import answer_logits, answers
from easyeditor.core.rehearsal import Before, Outcome, drawn, probes_of, rehearsed, together
from easyeditor.core.training import TOTAL, Visit
from easyeditor.edits.delta import LowRank, dense
from easyeditor.edits.edit import WeightEdit
from easyeditor.edits.ledger import applied
from easyeditor.errors import DamagedFile, UsageError, WrongBase
from easyeditor.hparams import complete
from easyeditor.lm.model import LM
from easyeditor.methods.mend import MENDHyperParams, MENDTraining, MENDTrainingHparams, mend, prepare
from easyeditor.requests import EditRequest, Probe

SHAPES = {"a.weight": (3, 5), "b.weight": (3, 5), "c.weight": (4, 3)}


def settings(lm: LM, **given: Any) -> dict[str, Any]:
    names = [lm.weight_name(i) for i in (-2 + len(lm.blocks), -1 + len(lm.blocks))]
    return {"inner_params": names, "rank": 4, "edit_lr": 1e-3, "max_iters": 4, **given}


def trained(lm: LM, folder: Path, **given: Any) -> str:
    """An archive whose network has seen the normalisation's data and nothing else."""
    editor = MENDTraining(lm, complete(MENDTrainingHparams(**settings(lm, **given)), lm))
    editor.prepare([Visit(toy.request(i), i, 0) for i in range(4)])
    own = {name: value for name, value in settings(lm, **given).items() if name != "archive"}
    write_archive(
        folder,
        {"method": "MEND", "model": lm.name, **editor.header(), "settings": own},
        editor.module.state_dict(),
    )
    return str(folder)


def some(seed: int = 0, tokens: int = 6) -> dict[str, Factors]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.zeros(tokens, dtype=torch.long)
    return {
        name: Factors(
            torch.randn(tokens, d_in, generator=generator), torch.randn(tokens, d_out, generator=generator), rows
        )
        for name, (d_out, d_in) in SHAPES.items()
    }


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "t5"])
def test_before_any_training_it_is_a_step_of_gradient_descent(family: str) -> None:
    lm, request = toy.build(family), toy.request()
    state = {"network": None, "sites": [lm.mlp_out(len(lm.blocks) - 1).name]}
    site = lm.site(state["sites"][0])
    shapes = {site.weight_name: (site.d_out, site.d_in)}
    state["network"] = Hypernetwork(shapes, Design(rank=4, norm=False, edit_lr=0.5))
    edit = mend(lm, [request], MENDHyperParams(), state, [])
    batch = answers(lm, [(request.prompt, request.target_new)])
    weight = site.weight.requires_grad_(True)
    logp = answer_logits(lm, batch).log_softmax(-1).gather(1, batch.labels[:, None])
    (gradient,) = torch.autograd.grad(-logp.mean(), [weight])
    assert torch.allclose(dense(edit.deltas[site.weight_name]), -0.5 * site.oriented(gradient), atol=1e-6)


def test_the_layers_are_those_of_the_paper() -> None:
    network = Hypernetwork({"a.weight": (2, 3)}, Design(rank=2, norm=False, edit_lr=0.1))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    u, v = torch.randn(4, 3, generator=generator), torch.randn(4, 2, generator=generator)
    z = torch.cat([u, v], dim=1)
    for layer in network.transforms["3x2"].chains["both"].layers:
        inner = z @ (layer.u @ layer.v).T + layer.bias
        z = z + torch.relu(layer.scale[0] * inner + layer.offset[0])
    found = network({"a.weight": Factors(u, v, torch.zeros(4))})["a.weight"]
    assert torch.allclose(found.weight(), -network.lrs[0] * z[:, 3:].T @ z[:, :3], atol=1e-5)


def test_projections_of_one_shape_share_a_network_and_have_a_step_each() -> None:
    shared = Hypernetwork(SHAPES, Design(rank=2))
    assert set(shared.transforms) == {"5x3", "3x4"} and len(shared.lrs) == 3
    assert shared.transforms["5x3"].chains["both"].layers[0].scale.shape == (2, 8)
    alone = Hypernetwork(SHAPES, Design(rank=2, shared=False))
    assert len(alone.transforms) == 3
    shared.observe(some())
    with torch.no_grad():
        shared.transforms["5x3"].chains["both"].layers[0].offset[1] += 1.0
    found = some(1)
    found["b.weight"] = found["a.weight"]
    changes = shared(found)
    assert not torch.equal(changes["a.weight"].inputs, changes["b.weight"].inputs), "only the second is shifted"


def test_normalised_numbers_have_mean_0_and_deviation_1_and_one_that_never_varies_is_0() -> None:
    network, found = Hypernetwork({"a.weight": (3, 5)}, Design(rank=2)), some(tokens=40)["a.weight"]
    found.inputs[:, 0] = 7.0
    whole = {"a.weight": found}
    for start in (0, 10, 25):
        stop = {0: 10, 10: 25, 25: 40}[start]
        part = Factors(found.inputs[start:stop], found.gradients[start:stop], found.rows[start:stop])
        network.observe({"a.weight": part})
    z = network.transforms["5x3"].normalised(found.inputs, found.gradients)
    assert torch.allclose(z.mean(0), torch.zeros(8), atol=1e-5)
    assert torch.allclose(z[:, 1:].std(0), torch.ones(7), atol=1e-4) and not z[:, 0].any()
    at_once = Hypernetwork({"a.weight": (3, 5)}, Design(rank=2))
    at_once.observe(whole)
    assert torch.allclose(at_once.transforms["5x3"].squares, network.transforms["5x3"].squares)
    with pytest.raises(UsageError, match="has seen nothing"):
        Hypernetwork({"a.weight": (3, 5)}, Design())(whole)


@pytest.mark.parametrize(
    ("given", "chains"),
    [
        ({}, {"both"}),
        ({"combine": False}, {"inputs", "gradients"}),
        ({"combine": False, "x_only": True}, {"inputs"}),
        ({"combine": False, "delta_only": True}, {"gradients"}),
        ({"combine": False, "one_sided": True}, {"gradients"}),
    ],
)
def test_the_variants_of_the_network(given: dict[str, Any], chains: set[str]) -> None:
    network = Hypernetwork({"a.weight": (3, 5)}, MENDHyperParams(**given).design())
    assert set(network.transforms["5x3"].chains) == chains
    network.observe(some())
    assert network(some())["a.weight"].inputs.shape == (6, 5)


def test_a_batch_is_the_sum_of_its_facts_in_any_order() -> None:
    lm = toy.build("llama")
    editor = MENDTraining(lm, MENDTrainingHparams(**settings(lm, norm=False)))
    state = {"network": editor.module, "sites": [site.name for site in editor.sites]}
    requests = [toy.request(0), toy.request(5), toy.request(10, "job")]

    def change(facts: list[EditRequest]) -> torch.Tensor:
        return dense(mend(lm, facts, MENDHyperParams(), state, []).deltas[lm.weight_name(3)])

    together_ = change(requests)
    assert torch.allclose(together_, change(requests[::-1]), atol=1e-7)
    assert torch.allclose(together_, sum(change([request]) for request in requests), atol=1e-7)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "opt", "falcon", "t5"])
def test_what_is_rehearsed_is_what_the_real_edit_does(family: str) -> None:
    """Two edits at once, from the kept states, against each edit applied to the weights."""
    lm = toy.build(family)
    editor = MENDTraining(lm, MENDTrainingHparams(**settings(lm, norm=False, edit_lr=5.0)))
    groups = [[(visit, editor.before(visit))] for visit in (Visit(toy.request(i), i, 0) for i in (0, 5))]
    changes = editor.module(together([[editor.before.gradient(visit) for visit, _ in group] for group in groups]))
    rows = drawn(groups, 0, 1, 2)
    with torch.no_grad():
        found = rehearsed(lm, editor.sites, rows, changes, 2)
    for edit, group in enumerate(groups):
        state = {"network": editor.module, "sites": [site.name for site in editor.sites]}
        real = mend(lm, [group[0][0].request], MENDHyperParams(), state, [])
        mine = [known.pairs[place] for known, place in zip(rows.known, rows.places, strict=True)]
        mine = [pair for pair, owner in zip(mine, rows.edits.tolist(), strict=True) if owner == edit]
        batch = answers(lm, mine, with_end=True)
        with torch.no_grad():
            old = answer_logits(lm, batch).log_softmax(-1)
            with applied(lm, real):
                new = answer_logits(lm, batch).log_softmax(-1)
        nll = -new.gather(1, batch.labels[:, None])[batch.rows == 0][:-1].mean()
        assert torch.allclose(found.loss[found.asked == edit][0], nll, atol=1e-4)
        each = (old.exp() * (old - new)).sum(1)
        kl = each[batch.rows == len(mine) - 1].mean(), each[batch.rows == 0][-1]  # of a probe, and of what follows
        assert kl[0] > 0 and torch.allclose(found.divergence[found.edits == edit][-1], kl[0], atol=1e-4)
        assert kl[1] > 0 and torch.allclose(found.divergence[found.edits == edit][0], kl[1], atol=1e-4)


def test_a_pass_may_take_any_number_of_edits() -> None:
    lm = toy.build("gpt2")
    editor = MENDTraining(lm, MENDTrainingHparams(**settings(lm, norm=False)))
    groups = [[Visit(toy.request(i), i, 0)] for i in range(3)]
    at_once = editor.losses(groups)
    one_by_one = [editor.losses([group]) for group in groups]
    for name, values in at_once.items():
        assert torch.allclose(values, torch.cat([each[name] for each in one_by_one]), atol=1e-5), name
    assert at_once[TOTAL].requires_grad and set(at_once) >= {"loss/edit", "loss/loc", "edit/acc", "loss/total_edit"}


def test_locality_is_that_of_the_probes() -> None:
    """Of the first edit half of its probe stays, and all that follows its answer; the second has no probe."""
    same, edits = torch.tensor([1.0, 0.5, 0.25]), torch.tensor([0, 0, 1])
    none, probes = torch.zeros(2), torch.tensor([False, True, False])
    outcome = Outcome(none, none, torch.zeros(3), same, edits[~probes], edits, probes)
    assert outcome.per_edit(2)["loc/acc"].tolist() == [0.5, 0.25]


def test_what_is_not_kept_is_computed_again_to_the_same_bits() -> None:
    lm = toy.build("llama")
    full = complete(MENDTrainingHparams(**settings(lm)), lm)
    site = [lm.site(path) for path in full.inner_params]
    visit = Visit(toy.request(), 0, 0)
    with_room, without = Before(lm, site, "mask", 1e9), Before(lm, site, "mask", 0.0)
    assert with_room(visit) is with_room(visit) and without(visit) is not without(visit)
    for one, other in zip(with_room(visit).states, without(visit).states, strict=True):
        assert torch.equal(one, other)
    assert with_room.gradient(visit) is with_room.gradient(visit)
    for name, again in without.gradient(visit).items():
        assert torch.equal(with_room.gradient(visit)[name].gradients, again.gradients)


def test_probes_come_from_the_record_or_from_another_one() -> None:
    other = EditRequest(prompt="b is", target_new="c", ground_truth="d")
    bare = EditRequest(prompt="a is", target_new="b")
    assert probes_of(Visit(bare, 0, 0, other), 0) == [Probe("b is", ("d",))]
    told = EditRequest(prompt="a is", target_new="b", loc_prompt="the sky is blue")
    assert probes_of(Visit(told, 0, 0, other), 0) == [Probe("the sky is", ("blue",))]
    with pytest.raises(UsageError, match="no locality probe"):
        probes_of(Visit(bare, 0, 0), 0)


def test_without_an_archive_it_says_how_to_train_one() -> None:
    lm = toy.build("llama")
    with pytest.raises(UsageError, match=r"easyedit train --method MEND --model toy-llama --data"):
        prepare(lm, MENDHyperParams())
    with pytest.raises(UsageError, match="There is no trained archive"):
        prepare(lm, MENDHyperParams(archive="nowhere"))


def test_an_archive_belongs_to_a_model_and_a_method(tmp_path: Path) -> None:
    lm = toy.build("llama")
    path = trained(lm, tmp_path / "archive")
    state = prepare(lm, MENDHyperParams(archive=path))
    assert not any(p.requires_grad for p in state["network"].parameters())
    with pytest.raises(WrongBase, match=r"trained on toy-llama: 'model.layers.2.*Load that model, or train"):
        prepare(toy.build("llama", seed=1), MENDHyperParams(archive=path))
    with pytest.raises((WrongBase, UsageError)):
        prepare(toy.build("gpt2"), MENDHyperParams(archive=path))
    for dtype in (torch.bfloat16, torch.float16):
        prepare(LM.wrap(toy.build("llama").model.to(dtype), lm.tokenizer, name="same"), MENDHyperParams(archive=path))
    header = json.loads((tmp_path / "archive" / "archive.json").read_text())
    (tmp_path / "archive" / "archive.json").write_text(json.dumps({**header, "method": "MALMEN"}))
    with pytest.raises(UsageError, match="trained for MALMEN, not for MEND"):
        prepare(lm, MENDHyperParams(archive=path))


def test_an_archive_brings_the_network_that_it_was_trained_with(tmp_path: Path) -> None:
    lm = toy.build("llama")
    path = trained(lm, tmp_path / "archive", rank=3, combine=False)
    found = prepare(lm, MENDHyperParams(archive=path))  # other settings, and no projections named
    assert found["sites"] == [lm.mlp_out(2).name, lm.mlp_out(3).name]
    assert found["network"].transforms["256x64"].chains["inputs"].layers[0].u.shape == (256, 3)


def test_damaged_archives_get_one_sentence(tmp_path: Path) -> None:
    lm = toy.build("llama")
    folder = Path(trained(lm, tmp_path / "archive"))
    (data,) = folder.glob("*.safetensors")
    whole, header = data.read_bytes(), (folder / "archive.json").read_text()
    for content in (whole[:-8], whole[:-1] + b"?", b""):
        data.write_bytes(content)
        with pytest.raises(DamagedFile, match="not the file that was saved with it"):
            read_archive(folder)
    data.write_bytes(whole)
    for content in (header[:-20], "[]", json.dumps({"format": "something"})):
        (folder / "archive.json").write_text(content)
        with pytest.raises(DamagedFile, match="its header is not"):
            read_archive(folder)
    (folder / "archive.json").write_text(json.dumps({**json.loads(header), "tensors": "/etc/passwd"}))
    with pytest.raises(DamagedFile, match="passwd: No such file"):
        read_archive(folder)
    (folder / "archive.json").write_text(json.dumps({**json.loads(header), "format_version": 9}))
    with pytest.raises(UsageError, match="pip install -U easyeditor"):
        read_archive(folder)


def test_an_archive_is_replaced_in_one_go(tmp_path: Path) -> None:
    for number in range(3):
        write_archive(tmp_path, {"method": "MEND", "step": number}, {"x": torch.full((2,), float(number))})
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]
    found, where = load_archive(tmp_path)
    assert found["step"] == 2 and found["model"]["x"].tolist() == [2.0, 2.0] and where.endswith("archive.json")


def easyedits(lm: LM, network: Hypernetwork) -> dict[str, Any]:
    """The network as EasyEdit's trainer saves it, for weights of one shape."""
    site = lm.mlp_out(3)
    old, own = f"mend.({site.d_in}, {site.d_out})", network.transforms[f"{site.d_in}x{site.d_out}"]
    state: dict[str, Any] = OrderedDict(edit_lrs=-network.lrs.detach())
    names = {"u": "u", "v": "v", "bias": "bias", "scale": "mode_scale.weight", "offset": "mode_shift.weight"}
    for i, layer in enumerate(own.chains["both"].layers):
        state |= {f"{old}.mlp.layers.{i}.{names[name]}": p.detach() for name, p in layer.named_parameters()}
    d = site.d_in
    state |= {f"{old}.k": own.count.float()[None], f"{old}.u_mean": own.mean[:d], f"{old}.v_mean": own.mean[d:]}
    state |= {f"{old}.u_s": own.squares[:d], f"{old}.v_s": own.squares[d:]}
    state |= {f"{old}.u_std": own.mean[:d], f"{old}.v_std": own.mean[d:], "model_config": lm.model.config}
    return state


def test_archives_of_easyedit_are_read_with_weights_only_loading(tmp_path: Path) -> None:
    lm = toy.build("gpt2")
    full = complete(MENDTrainingHparams(**settings(lm)), lm)
    editor = MENDTraining(lm, full)
    editor.prepare([Visit(toy.request(i), i, 0) for i in range(4)])
    state = easyedits(lm, editor.module)
    torch.save({"model": state, "opt": {"state": {}}, "step": 7, "val_stats": {"a": 1.0}}, tmp_path / "gpt2-xl")
    found = prepare(lm, MENDHyperParams(archive=str(tmp_path / "gpt2-xl"), **settings(lm)))["network"].state_dict()
    assert found.keys() == editor.module.state_dict().keys()
    for name, tensor in editor.module.state_dict().items():
        assert torch.allclose(found[name].double(), tensor.double(), atol=1e-6), name
    assert "edit_lrs" in load_archive(tmp_path / "gpt2-xl")[0]["model"]
    with pytest.raises(WrongBase, match="of shape"):
        prepare(lm, MENDHyperParams(archive=str(tmp_path / "gpt2-xl"), **settings(lm, rank=2)))
    torch.save({"model": state, "anything": Path("x")}, tmp_path / "odd")
    with pytest.raises(DamagedFile, match=r"only executing it would restore"):
        read_archive(tmp_path / "odd")
    (tmp_path / "cut").write_bytes((tmp_path / "gpt2-xl").read_bytes()[:200])
    with pytest.raises(DamagedFile, match="damaged"):
        read_archive(tmp_path / "cut")


def test_an_edit_is_one_pass_and_of_low_rank(tmp_path: Path) -> None:
    lm = toy.build("llama")
    full = complete(MENDHyperParams(archive=trained(lm, tmp_path / "a"), **settings(lm)), lm)
    state, runs = prepare(lm, full), []
    handle = lm.blocks[0].register_forward_hook(lambda *_: runs.append(1))
    edit = mend(lm, [toy.request()], full, state, [])
    handle.remove()
    assert len(runs) == 1 and isinstance(edit, WeightEdit)
    for delta in edit.deltas.values():
        assert isinstance(delta, LowRank) and 0 < delta.rank < 10
    twice = mend(lm, [toy.request()], complete(MENDHyperParams(**{**full.to_dict(), "lr_scale": 2.0}), lm), state, [])
    name = lm.weight_name(3)
    assert torch.allclose(dense(twice.deltas[name]), 2 * dense(edit.deltas[name]))


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"combine": True, "x_only": True}, "exclude each other"),
        ({"mlp_class": "MLP"}, "The paper's is 'IDMLP'"),
        ({"init": "xavier"}, "the only one"),
        ({"rank": 0}, "begin at 1"),
        ({"cloc": -1.0}, "0 or above"),
        ({"batch_size": 0}, "from 1 on"),
        ({"train_base": True}, "never trained"),
        ({"mixed_precision": "int8"}, "Choose no, bf16, fp16"),
        ({"inner_params": ["a.weight", "a.weight"]}, "twice"),
    ],
)
def test_settings_that_make_no_sense(given: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        MENDTrainingHparams(**given).check()


def test_files_of_existing_scripts(tmp_path: Path) -> None:
    text = "alg: MEND\nmodel_name: ./hugging_cache/gpt2-xl\nmodel_class: GPT2LMHeadModel\nlr: 1e-6\narchive: null\n"
    (tmp_path / "gpt2-xl.yaml").write_text(text + "hidden_dim: null\nhalf: False\ndevice: 0\nverbose: True\n")
    found = MENDTrainingHparams.from_hparams(tmp_path / "gpt2-xl")
    assert (found.lr, found.alg, found.alg_name, found.archive) == (1e-6, "MEND", "MEND", None)
    preset = MENDTrainingHparams.from_hparams("./hparams/TRAINING/MEND/llama3-8B")
    assert preset.early_stop_key == "edit/acc_val" and preset.rank == 1920 and len(preset.inner_params) == 9


def test_factors_of_a_fact_are_those_of_the_mean_over_its_answer() -> None:
    lm = toy.build("llama")
    site = lm.mlp_out(3)
    request = toy.request()
    found = Before(lm, [site], "mask", 0.0).factors(request)[site.weight_name]
    batch = answers(lm, [(request.prompt, request.target_new)])
    plain = factors(lm, [site], batch, "mask", lambda log_probs: -log_probs.mean())[site.name]
    assert torch.allclose(found.weight(), plain.weight(), atol=1e-7) and len(found.rows) <= len(plain.rows)


def test_the_base_is_named_by_the_untouched_weights() -> None:
    lm = toy.build("llama")
    names = [lm.weight_name(3)]
    before = base_of(lm, names)
    delta = LowRank(torch.ones(64, 1), torch.ones(256, 1))
    with applied(lm, WeightEdit(deltas={names[0]: delta})):
        assert base_of(lm, names) == before
