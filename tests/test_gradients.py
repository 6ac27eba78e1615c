"""Gradient factors against autograd, the lifelong normaliser, the push-through solve, UltraEdit and StableEdit."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import toy
from easyeditor.core.gradients import Factors, factors, factors_of, surprise
from easyeditor.core.lifelong import GRADIENT, Moments, facts_from, joined, of_history, ridge, shape_of
from easyeditor.core.likelihood import answers, token_log_probs
from easyeditor.editors.perform import make_edit, prepared, put_on
from easyeditor.edits.delta import Dense, LowRank, dense
from easyeditor.edits.edit import WeightEdit
from easyeditor.edits.ledger import Ledger
from easyeditor.edits.store import load_edits, save_edits
from easyeditor.errors import EditFailed, NonFinite, UsageError
from easyeditor.hparams import HyperParams, complete
from easyeditor.lm.hooks import hidden
from easyeditor.lm.model import LM
from easyeditor.lm.structure import Site
from easyeditor.registry import MethodSpec, get_method

PAIRS = [(prompt, answer) for prompt, _, answer in toy.prompts()[:7]] + [("the home of ada ra is", "oslo baker")]


def sites_of(lm: LM) -> list[Site]:
    """Projections at several depths, out of order, with what goes into an MLP and attention."""
    last = lm.mlp_out(len(lm.blocks) - 1)
    inner = [
        name
        for name, module in lm.blocks[1].named_modules()
        if isinstance(module, type(last.module)) and f"{lm.stack}.1.{name}" != lm.mlp_out(1).name
    ]
    return [last, lm.mlp_out(0), lm.attn_out(1), lm.site(f"{lm.stack}.1.{inner[-1]}")]


@pytest.mark.parametrize("family", toy.FAMILIES)
def test_factors_make_up_the_gradient_of_the_weight(family: str) -> None:
    lm = toy.build(family)
    sites, batch = sites_of(lm), answers(lm, PAIRS)
    found = factors(lm, sites, batch, "mask")
    surprise(token_log_probs(lm, batch)).backward()
    for site in sites:
        assert site.weight.grad is not None
        expected = site.oriented(site.weight.grad)
        assert (found[site.name].weight() - expected).norm() <= 1e-6 * expected.norm(), site.name


@pytest.mark.parametrize("family", ["gpt2", "falcon", "opt", "t5"])
def test_at_answer_tokens_they_are_those_rows(family: str) -> None:
    lm = toy.build(family)
    batch, sites = answers(lm, PAIRS), [lm.mlp_out(1)]
    some, every = (factors(lm, sites, batch, tokens)[sites[0].name] for tokens in ("ans", "mask"))
    assert len(some.inputs) == len(batch.labels) == len(PAIRS) + 1
    assert torch.equal(some.rows, batch.rows)
    for h, g in zip(some.inputs, some.gradients, strict=True):
        near = (every.inputs - h).abs().sum(1) + (every.gradients - g).abs().sum(1)
        assert float(near.min()) == 0


def test_in_an_encoder_they_are_those_of_all_tokens() -> None:
    lm = toy.build("t5")
    site = lm.site("encoder.block.1.layer.1.DenseReluDense.wo")
    batch = answers(lm, PAIRS)
    found = factors(lm, [site], batch)[site.name]
    assert len(found.inputs) == int(batch.mask.sum())
    surprise(token_log_probs(lm, batch)).backward()
    assert site.weight.grad is not None
    assert torch.allclose(found.weight(), site.weight.grad, atol=1e-6)


def test_nothing_below_is_in_the_graph_and_nothing_stays_behind() -> None:
    lm = toy.build("llama")
    below: list[bool] = []
    handle = lm.blocks[1].register_forward_hook(lambda _, __, out: below.append(hidden(out).requires_grad))
    factors(lm, [lm.mlp_out(2), lm.mlp_out(3)], answers(lm, PAIRS))
    handle.remove()
    assert below == [False]
    assert all(p.requires_grad and p.grad is None for p in lm.model.parameters())
    assert not any(module._forward_hooks for module in lm.model.modules())


def test_they_do_not_depend_on_how_many_go_in_one_pass() -> None:
    lm = toy.build("gpt2")
    site = lm.mlp_out(1)
    one, all_ = (factors_of(lm, [site], PAIRS, at_once=n)[site.name] for n in (1, 100))
    assert torch.equal(one.rows, all_.rows)
    assert torch.allclose(one.inputs, all_.inputs, atol=1e-6)
    assert torch.allclose(one.gradients, all_.gradients, atol=1e-6)


def test_tokens_and_projections_that_do_not_exist() -> None:
    lm = toy.build("gpt2")
    with pytest.raises(UsageError, match=r"at the tokens 'last'.*Choose ans or mask"):
        factors(lm, [lm.mlp_out(0)], answers(lm, PAIRS), "last")
    aside = Site("aside", torch.nn.Linear(2, 2))
    with pytest.raises(UsageError, match="'aside' takes no part"):
        factors(lm, [aside], answers(lm, PAIRS))


# The normaliser and the solve


def normal(n: int, width: int, seed: int, far: float = 0.0) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) + far


def test_running_moments_are_those_of_all_features() -> None:
    h, g = normal(30, 5, 0, far=100.0), normal(30, 3, 1)
    parts = [Moments.of(h[i:j], g[i:j], whole=True) for i, j in ((0, 1), (1, 12), (12, 30))]
    found = parts[0] + parts[1] + parts[2]
    z = torch.cat([h, g], 1).double()
    assert found.n == 30
    assert torch.allclose(found.mean, z.mean(0), atol=1e-12, rtol=0)
    assert torch.allclose(found.deviation, z.std(0), atol=1e-12, rtol=0)
    assert found.scatter is not None
    assert torch.allclose(found.scatter / 29, g.double().T.cov(), atol=1e-12, rtol=0)


def test_whitened_gradients_have_the_identity_as_covariance() -> None:
    mixed = normal(400, 6, 2) @ normal(6, 6, 3)
    found = Factors(normal(400, 4, 4), mixed, torch.zeros(400))
    moments = Moments.of(found.inputs, found.gradients, whole=True)
    h, g = moments.whitened(found, 1e-6)
    assert torch.allclose(h.std(0), torch.ones(4, dtype=h.dtype), atol=1e-5)
    assert torch.allclose(g.T.cov() * (399 / 393), torch.eye(6, dtype=g.dtype), atol=1e-8)
    few = Moments.of(found.inputs[:6], found.gradients[:6], whole=True)
    assert torch.equal(few.whitened(found, 1e-6)[1], few.normalised(found)[1]), "too few for a covariance"


@pytest.mark.parametrize(("n", "d_in", "d_out"), [(20, 96, 64), (60, 96, 64), (150, 96, 64)])
def test_the_solve_is_that_of_the_textbook(n: int, d_in: int, d_out: int) -> None:
    h, v = normal(n, d_in, 5).double(), normal(n, d_out, 6).double()
    textbook = torch.linalg.inv(h.T @ h + torch.eye(d_in, dtype=h.dtype)) @ h.T @ v
    small = h.T @ torch.linalg.inv(h @ h.T + torch.eye(n, dtype=h.dtype)) @ v
    assert (small - textbook).norm() <= 1e-8 * textbook.norm()
    found = ridge(h, v, 1.0)
    assert isinstance(found, LowRank if n == 20 else Dense)
    assert (dense(found).double() - textbook.T).norm() <= 1e-6 * textbook.norm(), "kept in fp32"


def test_a_system_that_cannot_be_solved() -> None:
    h, v = torch.ones(3, 5), torch.ones(3, 2)
    with pytest.raises(EditFailed, match=r"3 unknowns is singular with alpha = 1e-30. Raise alpha"):
        ridge(h, v, 1e-30)
    with pytest.raises(NonFinite, match="wider dtype"):
        ridge(h * float("inf"), v, 1.0)


def test_warm_up_facts_have_the_last_word_of_the_next_sentence() -> None:
    texts = ["The home of Ada is Oslo. The home of Bo is Rome! No.", "Where does Cy live? The home of Cy is Rome."]
    assert facts_from(texts, 9) == [
        ("The home of Ada is", "Rome"),
        ("The home of Bo is", "live"),
        ("Where does Cy", "Rome"),
        ("The home of Cy is", "Oslo"),
    ]
    assert len(facts_from(texts, 2)) == 2


# The methods

METHODS = ("UltraEdit", "StableEdit")


def setting(name: str, lm: LM, **more: object) -> tuple[MethodSpec, HyperParams]:
    spec = get_method(name)
    return spec, complete(spec.hparams(**{**toy.SETTINGS[name], **more}), lm)


def stream(lm: LM, spec: MethodSpec, hparams: HyperParams, indices: Sequence[int]) -> list[WeightEdit]:
    state = prepared(lm, spec, hparams, toy.corpus())
    out = []
    for index in indices:
        requests = [toy.request(index), toy.request(index, "job")]
        edit = make_edit(lm, spec, requests, hparams, state)
        put_on(lm, edit, requests)
        assert isinstance(edit, WeightEdit)
        out.append(edit)
    return out


@pytest.mark.parametrize("name", METHODS)
def test_an_edit_is_the_equation(name: str) -> None:
    lm = toy.build("gpt2")
    spec, hparams = setting(name, lm, warm_up=40)
    site = lm.site(hparams.to_dict()["inner_params"][0])
    requests = [toy.request(i) for i in range(4)]
    pairs = [(r.prompt, r.target_new) for r in requests]
    edit = make_edit(lm, spec, requests, hparams, prepared(lm, spec, hparams, toy.corpus()))
    assert isinstance(edit, WeightEdit)
    warm, now = (factors_of(lm, [site], p)[site.name] for p in (facts_from(toy.corpus(), 40), pairs))
    h, g = now.inputs.double(), now.gradients.double()
    z = torch.cat([torch.cat([warm.inputs, now.inputs]), torch.cat([warm.gradients, now.gradients])], 1).double()
    hat = (torch.cat([h, g], 1) - z.mean(0)) / (z.std(0) + torch.finfo(torch.float32).eps)
    v = -hparams.to_dict()["lr"] * hat[:, : site.d_in].square().sum(1, keepdim=True) * hat[:, site.d_in :]
    a = hparams.to_dict()["alpha"]
    textbook = torch.linalg.solve(h.T @ h + a * torch.eye(site.d_in, dtype=h.dtype), h.T @ v)
    found = dense(edit.deltas[site.weight_name]).double()
    assert (found - textbook.T).norm() <= 1e-5 * textbook.norm(), "too few facts for whitening: both are the same"


@pytest.mark.parametrize("name", METHODS)
def test_the_normaliser_is_that_of_the_edits_on_the_model(name: str) -> None:
    lm = toy.build("llama")
    spec, hparams = setting(name, lm)
    first, second, third = stream(lm, spec, hparams, [0, 3, 6])
    ledger = Ledger.of(lm)
    ledger.undo(third.id)
    assert stream(lm, spec, hparams, [6])[0] == third, "the last one taken back and made again is the very same"
    for edit in (second, third):
        ledger.undo(edit.id)
    assert stream(lm, spec, hparams, [3, 6]) == [second, third]
    ledger.undo(first.id)
    site = lm.site(hparams.to_dict()["inner_params"][0])
    left = of_history([site], ledger.active, False, {})[shape_of(site)]
    features = torch.cat([e.keys[site.weight_name + end].T for e in (second,) for end in ("",)])
    assert left.n == len(features) + len(third.keys[site.weight_name].T), "an earlier one leaves the statistics too"


@pytest.mark.parametrize("name", METHODS)
def test_edits_and_normaliser_are_saved_together(name: str, tmp_path: object) -> None:
    lm, other = toy.build("llama"), toy.build("llama")
    spec, hparams = setting(name, lm)
    edits = stream(lm, spec, hparams, [0, 3])
    for edit in load_edits(save_edits(edits, f"{tmp_path}/edits")):
        Ledger.of(other).apply(edit)
    assert stream(other, spec, hparams, [6]) == stream(lm, spec, hparams, [6])


def test_what_the_normaliser_leaves_out() -> None:
    lm = toy.build("gpt2")
    site = lm.mlp_out(1)
    plain = WeightEdit(deltas={site.weight_name: Dense(torch.zeros(site.d_out, site.d_in))})
    with_keys = WeightEdit(deltas=plain.deltas, keys={site.weight_name: torch.zeros(site.d_in, 2)})
    assert of_history([site], [plain, with_keys], False, {}) == {}
    assert GRADIENT not in site.weight_name


def test_projections_of_one_shape_share_their_statistics() -> None:
    lm = toy.build("llama")
    sites = [lm.mlp_out(1), lm.mlp_out(2), lm.attn_out(1)]
    found = factors_of(lm, sites, PAIRS)
    moments = joined(sites, found)
    assert set(moments) == {shape_of(sites[0]), shape_of(sites[2])}
    assert moments[shape_of(sites[0])].n == 2 * moments[shape_of(sites[2])].n


@pytest.mark.parametrize("name", METHODS)
def test_one_token_alone_has_no_statistics(name: str) -> None:
    lm = toy.build("gpt2")
    spec, hparams = setting(name, lm, warm_up=0)
    with pytest.raises(UsageError, match=r"single token.*batch_size 100.*warm_up to 1000"):
        make_edit(lm, spec, [toy.request()], hparams, prepared(lm, spec, hparams))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"token": "last"}, "Setting 'token' of UltraEdit is 'last'. Choose ans or mask"),
        ({"lr": 0.0}, "Setting 'lr' of UltraEdit is 0.0. It has to be a number above 0"),
        ({"alpha": float("nan")}, "Setting 'alpha'"),
        ({"batch_size_once": 0}, "from 1 on"),
        ({"warm_up": -1}, "from 0 on"),
        ({"inner_params": ["a.b", "a.b.weight"]}, "names a projection twice"),
    ],
)
def test_settings_that_make_no_sense(given: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        get_method("UltraEdit").hparams(**given).check()


def test_a_share_that_is_none() -> None:
    with pytest.raises(UsageError, match="Setting 'floor' of StableEdit is 0"):
        get_method("StableEdit").hparams(floor=0.0).check()


def test_a_projection_that_is_not_there() -> None:
    lm = toy.build("gpt2")
    spec, hparams = setting("UltraEdit", lm, inner_params=["transformer.h.1.mlp.gate"])
    with pytest.raises(UsageError, match=r"no module 'transformer.h.1.mlp.gate'"):
        prepared(lm, spec, hparams, toy.corpus())


# The benchmark


def test_the_benchmark_prints_its_tables(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    monkeypatch.setenv("COLUMNS", "150")
    script = importlib.import_module("gradients")
    sizes = "--facts 6 --step 3 --sample 2 --warm-up 8 --steps 2 --repeats 1 --sizes 48 32 10 --threads 1"
    script.main([*sizes.split(), "--methods", "UltraEdit"])
    printed = capsys.readouterr().out
    assert "6 facts in steps of 3" in printed and "60 at most" in printed and "one by one, s" in printed
    row = next(line for line in printed.splitlines() if "48 x 32, 10 tokens" in line)
    assert float(row.split("│")[5]) <= 1e-8
