"""Memories beside one projection: WISE's side memories and how they merge, MEMOIR's masks, T-Patcher's neurons."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest
import torch

import toy
from easyeditor.core.likelihood import answers, token_log_probs
from easyeditor.core.merging import ALGORITHMS, merged
from easyeditor.core.patches import Patch
from easyeditor.core.residual_memory import Residual, ResidualMemory, difference, top_hash
from easyeditor.core.side_memory import Difference, Memory, SideMemories, activations, mask_of
from easyeditor.core.tail import descended, inputs_of, returned, tail_of
from easyeditor.editors.base import BaseEditor
from easyeditor.editors.perform import make_edit, prepared, put_on
from easyeditor.edits.ledger import Ledger
from easyeditor.edits.store import load_edits
from easyeditor.errors import EditDidNothing, NonFinite, UsageError
from easyeditor.hparams import complete
from easyeditor.lm.generate import answer, continuations
from easyeditor.lm.hooks import by_row, replace
from easyeditor.lm.model import LM
from easyeditor.methods.memoir import MEMOIRHyperParams
from easyeditor.methods.t_patcher import TPatcherHyperParams
from easyeditor.methods.wise import WISEHyperParams, margins
from easyeditor.registry import get_method

D_IN, D_OUT = 6, 4


def side(memory: int = 0, seed: int = 0, **more: object) -> Difference:
    """A difference with random tensors."""
    g = torch.Generator().manual_seed(seed)
    draw = [torch.randn(shape, generator=g) for shape in ((3, D_IN), (3, D_OUT), (1, D_IN))]
    given: dict[str, object] = {
        "activation": 1.0, "memory": memory, "mask_ratio": 0.5, "act_ratio": 0.8, "norm_constraint": None,
        "save_freq": 2, "merge_freq": 4, "merge_alg": "ties", "weights": 1.0, "densities": 0.6, "retrieve": True,
        "per_length": False, "seed": 0,
    }  # fmt: skip
    return Difference(inputs=draw[0], steps=draw[1], keys=draw[2], **{**given, **more})  # type: ignore[arg-type]


def stream(count: int, **more: object) -> list[Difference]:
    return [side(memory=i // 2, seed=i, **more) for i in range(count)]


def hparams_of(name: str, lm: LM, **more: object) -> object:
    spec = get_method(name)
    layer = lm.weight_name(len(lm.blocks) // 2)
    return complete(spec.hparams(**{"inner_params": [layer], **toy.SETTINGS[name], **more}), lm)


def edited(lm: LM, name: str, *requests: object, **more: object) -> list[str]:
    spec, hparams = get_method(name), hparams_of(name, lm, **more)
    state = prepared(lm, spec, hparams, toy.corpus())
    return [put_on(lm, make_edit(lm, spec, [r], hparams, state), [r]) for r in requests]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "opt", "t5"])
def test_the_tail_gives_what_the_whole_model_gives(family: str) -> None:
    lm, request = toy.build(family), toy.request()
    site = lm.mlp_out(len(lm.blocks) // 2)
    pairs = [(request.prompt, "oslo rome"), (f"the new fact . {request.prompt}", "lima")]
    tail = tail_of(lm, site, pairs)
    assert (tail.start > 0) == (family != "t5"), "the prompt's tokens before the last are not run again"
    batch = answers(lm, pairs)
    added = torch.randn(len(batch.rows), site.d_out, generator=torch.Generator().manual_seed(0))

    def put(states: torch.Tensor) -> torch.Tensor:
        changed = states.clone()
        by_row(changed, len(batch.ids), lm.sequence_first)[batch.rows, batch.columns] += added
        return changed

    with torch.no_grad(), replace(site.module, put):
        expected = token_log_probs(lm, batch)
    with torch.no_grad():
        assert torch.allclose(tail.log_probs(lambda states: states + added), expected, atol=1e-4)
    assert tail.order().tolist() == [0, 1, 0]


def test_what_is_kept_of_gradient_descent_is_what_it_did_to_the_weight() -> None:
    g = torch.Generator().manual_seed(0)
    a, w = torch.randn(5, D_IN, generator=g), torch.zeros(D_OUT, D_IN)
    mask = mask_of(0, 0, (D_OUT, D_IN), 0.5)
    target = torch.randn(5, D_OUT, generator=g)
    plain = torch.zeros(D_OUT, D_IN, requires_grad=True)
    for _ in range(7):
        (gradient,) = torch.autograd.grad((a @ plain.T - target).square().mean(), [plain])
        plain = (plain - 0.3 * mask * gradient).detach().requires_grad_()
    total, losses = descended(
        lambda: a @ w.T, lambda z: (z - target).square().mean(), lambda s: w.add_(mask * (s.T @ a)),
        lr=0.3, steps=7, stop_at=0.0,
    )  # fmt: skip
    assert torch.allclose(w, plain.detach(), atol=1e-6)
    assert torch.allclose(mask * (total.T @ a), w, atol=1e-6)
    assert len(losses) == 7 and losses[-1] < losses[0]


def test_the_three_margins_are_those_of_the_paper() -> None:
    edit, unrelated = torch.tensor([3.0, 30.0]), torch.tensor([6.0, 1.0])
    # (6 - 5) + (20 - 3) + the mean of 10 + 6 - 3 and 10 + 1 - 3
    assert margins(edit, unrelated, 5.0, torch.tensor([20.0]), 10.0).item() == pytest.approx(1 + 17 + (13 + 8) / 2)
    assert margins(torch.tensor([30.0]), torch.tensor([1.0]), 5.0, torch.tensor([20.0]), 10.0).item() == 0.0


def test_a_token_goes_to_the_memory_it_activates_most_if_that_is_enough() -> None:
    wrappers = [side(0, 1, norm_constraint=0.5), side(1, 2, norm_constraint=0.5)]
    memories = SideMemories(wrappers)
    found = [Memory.beside(w) for w in wrappers]
    for memory, wrapper in zip(found, wrappers, strict=True):
        memory.add(wrapper)
        assert memory.difference.abs().max() <= 0.5
        assert not memory.difference[~mask_of(0, wrapper.memory, (D_OUT, D_IN), 0.5)].any()
    states, output = torch.randn(2, 7, D_IN, generator=torch.Generator().manual_seed(3)), torch.zeros(2, 7, D_OUT)
    given = torch.stack([states @ memory.difference.T for memory in found])  # (memories, rows, length, d_out)
    active = given.norm(dim=-1)
    best = given.gather(0, active.argmax(0)[None, ..., None].expand(1, 2, 7, D_OUT))[0]
    expected = torch.where((active.max(0).values > 0.8)[..., None], best, 0.0)
    assert torch.allclose(memories(states, output), expected, atol=1e-6)
    assert torch.allclose(memories(states[:, 3:4], output[:, 3:4]), expected[:, 3:4], atol=1e-6), "each by itself"


def test_activations_per_length_do_not_grow_with_the_input() -> None:
    given, inputs = torch.randn(3, D_OUT), torch.randn(3, D_IN)
    assert torch.allclose(activations(given, inputs, True), activations(3 * given, 3 * inputs, True))
    assert torch.allclose(activations(given, inputs, False), given.norm(dim=1))


@pytest.mark.parametrize("retrieve", [True, False])
def test_memories_are_a_function_of_the_edits_whatever_came_before(retrieve: bool) -> None:
    wrappers = stream(9, retrieve=retrieve)
    states, output = torch.randn(1, 30, D_IN), torch.zeros(1, 30, D_OUT)
    grown = SideMemories(wrappers[:1])
    for n in range(2, 10):
        grown.become(wrappers[:n])
        assert torch.equal(grown(states, output), SideMemories(wrappers[:n])(states, output))
    for gone in (3, 0, 5):  # out of the middle, one after another
        del wrappers[gone]
        grown.become(wrappers)
        assert torch.equal(grown(states, output), SideMemories(wrappers)(states, output))


def test_memories_are_merged_after_merge_freq_edits() -> None:
    assert len(SideMemories(stream(3))._routes) == 2
    closed = SideMemories(stream(4))
    assert len(closed._routes) == 1
    parts = [closed.memories[i].difference for i in (0, 1)]
    assert torch.equal(closed._routes[0].difference, merged(parts, "ties", 1.0, 0.6, 0))
    assert len(SideMemories(stream(9))._routes) == 3, "two merged ones and the newest"
    assert len(SideMemories(stream(9, retrieve=False))._routes) == 2, "all merged ones are one"


def test_merging_agrees_with_the_library_that_has_it() -> None:
    peft = pytest.importorskip("peft.utils.merge_utils")
    tensors = [torch.randn(8, 5, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    ones = torch.ones(3)
    assert torch.allclose(merged(tensors, "ties", 3.0, 0.5), peft.ties(tensors, ones, 0.5), atol=1e-6)
    assert torch.allclose(merged(tensors, "magnitude", 3.0, 0.5), peft.magnitude_prune(tensors, ones, 0.5), atol=1e-6)
    assert torch.allclose(merged(tensors, "linear"), peft.task_arithmetic(tensors, ones / 3), atol=1e-6)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_merging_one_with_itself_gives_it_back(algorithm: str) -> None:
    tensor = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    state = torch.random.get_rng_state()
    assert torch.allclose(merged([tensor, tensor], algorithm), tensor, atol=1e-5)
    thin = merged([tensor] * 64, algorithm, 1.0, 0.5, seed=1)
    assert torch.equal(thin, merged([tensor] * 64, algorithm, 1.0, 0.5, seed=1)), "drawn from the seed"
    if algorithm.startswith("dare"):
        assert (thin - tensor).norm() < 0.3 * tensor.norm(), "on average DARE keeps what it thins out"
    assert torch.equal(state, torch.random.get_rng_state())


def test_slerp_keeps_the_length_on_the_arc() -> None:
    a, b = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    assert torch.allclose(merged([a, b], "slerp"), torch.full((1, 2), 2**0.5))


def test_an_unknown_way_of_merging_is_refused() -> None:
    with pytest.raises(UsageError, match=r"called 'tie'.*slerp or ties"):
        merged([torch.zeros(2, 2)], "tie")


def test_edits_with_other_settings_do_not_share_a_memory() -> None:
    with pytest.raises(UsageError, match=r"act_ratio '0.8' and one with '0.5'"):
        SideMemories([side(0, 0), side(0, 1, act_ratio=0.5)])


def test_wise_keeps_all_edits_over_several_memories_and_generates_alike_without_a_cache() -> None:
    lm = toy.taught("llama")
    requests = [toy.request(i) for i in (0, 5, 10)]
    ids = edited(lm, "WISE", *requests, save_freq=2)
    wrappers = [next(iter(e.wrappers.values())) for e in Ledger.of(lm).active]  # type: ignore[attr-defined]
    assert [w.memory for w in wrappers] == [0, 0, 1]
    assert answer(lm, [r.prompt for r in requests], 4) == [r.target_new for r in requests]
    row = list(lm.text.encode(requests[0].prompt).ids)
    cached = continuations(lm, [row], 6)[0]
    for _ in range(6):
        with torch.no_grad():
            row.append(int(lm.model(torch.tensor([row]), use_cache=False).logits[0, -1].argmax()))
    assert row[-6:][: len(cached)] == cached
    Ledger.of(lm).undo(ids[1])
    assert answer(lm, [requests[0].prompt, requests[2].prompt], 4) == [requests[0].target_new, requests[2].target_new]


def test_replay_looks_at_earlier_edits() -> None:
    lm = toy.taught("llama")
    requests = [toy.request(i) for i in (0, 5, 10)]
    edited(lm, "WISE", *requests, save_freq=2, replay=True)
    assert answer(lm, [r.prompt for r in requests], 4) == [r.target_new for r in requests]


def test_wise_without_an_unrelated_text_says_what_to_do() -> None:
    bare = dataclasses.replace(toy.request(), loc_prompt=None, record="Record 0")
    with pytest.raises(UsageError, match=r"Record 0, field 'loc_prompt': WISE needs it and it is missing. Add"):
        bare.require(get_method("WISE").needs, "WISE")


def test_act_margin_of_existing_files_is_read(tmp_path: Path) -> None:
    file = tmp_path / "wise.yaml"
    file.write_text(
        "alg_name: WISE\nmodel_name: x\nact_margin: [2.0, 20.0, 10.0]\nhidden_act: silu\nmerge_freq: 1000\n"
    )
    found = WISEHyperParams.from_hparams(file)
    assert (found.alpha, found.beta, found.gamma) == (2.0, 20.0, 10.0)
    found.act_margin = [1.0, 2.0, 3.0]
    assert (found.alpha, found.beta, found.gamma) == (1.0, 2.0, 3.0)
    assert {"alpha", "beta", "gamma"} <= complete(found, toy.build("llama")).given
    with pytest.raises(UsageError, match=r"expected \[alpha, beta, gamma\]"):
        WISEHyperParams(act_margin=[1.0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"merge_alg": "tie"}, "'merge_alg' of WISE is 'tie'. Choose slerp or ties"),
        ({"mask_ratio": 0.0001, "densities": 2.0}, "'densities' of WISE is a share"),
        ({"save_freq": 3, "merge_freq": 10}, "merge_freq is a multiple of save_freq"),
        ({"inner_params": ["a", "b"]}, "names several weights"),
        ({"objective_optimization": "all"}, "'only_label'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        WISEHyperParams(**settings).check()


def test_a_step_that_is_too_long_is_said_and_leaves_the_model() -> None:
    lm = toy.taught("llama")
    with pytest.raises(NonFinite, match="Lower the learning rate 'edit_lr'"):
        edited(lm, "WISE", toy.request(), edit_lr=1e30, norm_constraint=None)
    assert not Ledger.of(lm).active and answer(lm, [toy.request().prompt], 4) == [toy.request().ground_truth]


def test_edits_are_saved_to_save_path_and_found_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lm, folder = toy.taught("llama"), tmp_path / "kept"
    settings = {**toy.SETTINGS["WISE"], "inner_params": [lm.weight_name(2)]}
    first = WISEHyperParams(model_name=(lm.model, lm.tokenizer), save_path=str(folder), **settings)
    requests = [toy.request(0), toy.request(5)]
    BaseEditor.from_hparams(first).edit_requests(requests, sequential_edit=True, verbose=False)
    assert [e.requests[0]["prompt"] for e in load_edits(folder)] == [r.prompt for r in requests]
    again = toy.taught("llama")
    second = WISEHyperParams(model_name=(again.model, again.tokenizer), load_path=str(folder), **settings)
    assert BaseEditor.from_hparams(second).ask([r.prompt for r in requests]) == [r.target_new for r in requests]
    second.load_path = str(tmp_path / "nothing")
    with pytest.raises(UsageError, match="There is no saved edit in"):
        BaseEditor.from_hparams(second)
    (tmp_path / "other").mkdir()
    with pytest.raises(UsageError, match=r"'save_path'.*holds no saved edits"):
        BaseEditor.from_hparams(WISEHyperParams(model_name=(lm.model, lm.tokenizer), save_path=str(tmp_path / "other")))
    with caplog.at_level(logging.WARNING):
        blocked = WISEHyperParams(model_name=(lm.model, lm.tokenizer), save_path="/proc/nowhere/kept", **settings)
        BaseEditor.from_hparams(blocked).apply([toy.request(10)])
    assert "could not be written" in caplog.text and "still on the model" in caplog.text


def test_a_mask_marks_the_largest_inputs_through_a_fixed_permutation() -> None:
    inputs = torch.eye(D_IN) * 5 + 1
    background = torch.ones(D_IN)
    found = top_hash(inputs, background, 1, seed=0)[:, 0]
    assert sorted(found.tolist()) == list(range(D_IN)), "a permutation"
    assert torch.equal(found, top_hash(2 * inputs - 1, background, 1, seed=0)[:, 0]), "what stands out says which"


def test_a_residual_acts_where_the_masks_share_enough() -> None:
    g = torch.Generator().manual_seed(0)
    key, background = torch.randn(1, 12, generator=g), torch.zeros(12)
    mask = top_hash(key, background, 3, seed=0)
    wrapper = Residual(mask.int(), key.gather(1, mask), torch.randn(1, D_OUT, generator=g), torch.zeros(1).int(),
                       background, 3, 0.9, 0)  # fmt: skip
    memory = ResidualMemory([wrapper])
    marked = torch.zeros(1, 12).scatter_(1, mask, 1.0)
    expected = (key * marked) @ difference(wrapper).T
    assert torch.allclose(memory(key, torch.zeros(1, D_OUT)), expected, atol=1e-6)
    assert not memory(-key.flip(1), torch.zeros(1, D_OUT)).any() or torch.equal(
        top_hash(-key.flip(1), background, 3, 0), mask
    )


def test_memoir_undone_out_of_the_middle_is_as_if_it_had_never_been() -> None:
    lm = toy.taught("llama")
    ids = edited(lm, "MEMOIR", toy.request(0), toy.request(5), toy.request(10))
    edits = Ledger.of(lm).active
    Ledger.of(lm).undo(ids[1])
    name = next(iter(edits[0].wrappers))  # type: ignore[attr-defined]
    alone = ResidualMemory([edits[0].wrappers[name], edits[2].wrappers[name]])  # type: ignore[attr-defined]
    assert torch.equal(Ledger.of(lm)._changes[name].weight, alone.weight)


def test_settings_of_memoir_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    lm = toy.taught("llama")
    with pytest.raises(UsageError, match=r"'top_k' of MEMOIR is 4096.*Leave it out"):
        edited(lm, "MEMOIR", toy.request(), top_k=4096)
    with pytest.raises(UsageError, match="there is no file"):
        edited(lm, "MEMOIR", toy.request(), dir_background_features=str(tmp_path / "no.pt"))
    torch.save(torch.zeros(4, 7), tmp_path / "odd.pt")
    with pytest.raises(UsageError, match="have width 7"):
        edited(lm, "MEMOIR", toy.request(), dir_background_features=str(tmp_path / "odd.pt"))
    with pytest.raises(UsageError, match="'prompt_feature_agg'"):
        MEMOIRHyperParams(prompt_feature_agg="max").check()


def test_a_patch_is_neurons_that_fire_at_their_mistake() -> None:
    patch = Patch(torch.tensor([[1.0, 0.0]]), torch.tensor([-0.5]), torch.tensor([[2.0, 4.0]]), torch.zeros(1, 2))
    found = Patch.combined([patch])(torch.tensor([[1.0, 7.0], [0.0, 7.0]]), torch.zeros(2, 2))
    assert found.tolist() == [[1.0, 2.0], [0.0, 0.0]]


def test_t_patcher_adds_a_neuron_per_mistake_and_none_where_there_is_none() -> None:
    lm, request = toy.taught("llama"), toy.request()
    edited(lm, "T-Patcher", request)
    (edit,) = Ledger.of(lm).active
    (patch,) = edit.wrappers.values()  # type: ignore[attr-defined]
    assert len(patch.bias) == 1
    site = lm.site(next(iter(edit.wrappers)))  # type: ignore[attr-defined]
    others = inputs_of(lm, site, [p for p, _ in toy.other_facts(request)])
    assert ((others @ patch.keys.T + patch.bias) > 0).float().mean() < 0.05
    known = dataclasses.replace(request, target_new=request.ground_truth)
    with pytest.raises(EditDidNothing, match="the model makes none"):
        edited(toy.taught("llama"), "T-Patcher", known)
    with pytest.raises(UsageError, match="count from 1 on"):
        TPatcherHyperParams(max_edit_step=0).check()


def test_what_a_projection_returns_is_read_without_what_is_around_it() -> None:
    lm = toy.taught("gpt2")
    site = lm.mlp_out(1)
    x = torch.randn(3, site.d_in)
    expected = site.module(x)
    edited(lm, "MEMOIR", toy.request(), inner_params=[site.weight_name])
    assert torch.allclose(returned(site, x), expected, atol=1e-5)
