"""Taking one fact out of an edit of many, and what an edit says of its own health: against plain computations."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import toy
from easyeditor import BaseEditor
from easyeditor.core.solve import System, solve
from easyeditor.core.stats import second_moments
from easyeditor.core.take_back import without_facts
from easyeditor.editors.perform import make_edit, prepared, put_on
from easyeditor.edits.delta import Delta, Dense, LowRank, Rows, dense
from easyeditor.edits.edit import Edit, WeightEdit
from easyeditor.edits.health import health
from easyeditor.edits.ledger import Ledger, summed
from easyeditor.edits.store import load_edits, save_edits
from easyeditor.errors import UsageError
from easyeditor.hparams import complete
from easyeditor.lm.model import LM
from easyeditor.registry import get_method
from easyeditor.requests import EditRequest

CORPUS = toy.corpus()
FACTS = [
    EditRequest("the home of ada ra is", "rome", subject="ada ra", ground_truth="oslo"),
    EditRequest("bo su works as", "clown", subject="bo su", ground_truth="judge"),
    EditRequest("cy vi lives in", "lima", subject="cy vi", ground_truth="cairo"),
    EditRequest("the home of bo to is", "rome", subject="bo to", ground_truth="paris"),
]
EARLIER = EditRequest("the job of cy ra is", "nurse", subject="cy ra", ground_truth="pilot")
LATER = EditRequest("ada vi works as", "baker", subject="ada vi", ground_truth="judge")
QUICK: dict[str, Any] = {
    "layers": [0, 1], "v_num_grad_steps": 5, "v_lr": 0.3, "v_weight_decay": 0.1, "clamp_norm_factor": 1.5,
    "context_template_length_params": [[2, 2]], "mom2_update_weight": 10.0, "mom2_dtype": "float64",
    "nullspace_threshold": 2e-2, "L2": 0.05,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "PMET": {"rewrite_module_tmps": ["mlp", "attn"]},
    "CORE": {"context": "all", "ctx_num": 1, "ctx_len": 3, "reg_lambda": 0.01, "layer_range": 1},
    "EMMET": {"emmet_lambda": 0.3},
    "FT": {"layers": [1], "lr": 1e-2, "num_steps": 3, "batch_size": 8},
    "SimIE": {"lamHyper": 1.0, "base_method": "MEMIT", "base_settings": {"layers": [0, 1], "mom2_update_weight": 1.0}},
}
METHODS = ("MEMIT", "EMMET", "AlphaEdit", "SPHERE", "PMET", "NAMET", "CORE", "EAMET", "MEMIT-FE")
SAID = "cannot be taken apart"


def settings(lm: LM, name: str, **more: Any) -> Any:
    spec = get_method(name)
    known = {f.name for f in dataclasses.fields(spec.hparams)}
    given = {k: v for k, v in {**QUICK, **OWN.get(name, {}), **more}.items() if k in known}
    return complete(spec.hparams(**given, model_name=(lm.model, lm.tokenizer)), lm)


def made(lm: LM, name: str, requests: list[EditRequest], **more: Any) -> WeightEdit:
    """An edit, put on the model."""
    hparams, spec = settings(lm, name, **more), get_method(name)
    edit = make_edit(lm, spec, requests, hparams, prepared(lm, spec, hparams, CORPUS))
    assert isinstance(edit, WeightEdit)
    put_on(lm, edit, requests)
    return edit


def editor(lm: LM, name: str = "MEMIT", **more: Any) -> BaseEditor:
    return BaseEditor.from_hparams(settings(lm, name, **{"mom2_adjustment": False, **more}))


def active(lm: LM) -> list[Edit]:
    return Ledger.of(lm).active


def bits(lm: LM) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}


def same_bits(lm: LM, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in lm.model.state_dict().items())


def close(a: Tensor, b: Tensor, tolerance: float = 1e-6) -> bool:
    assert float(b.norm()) > 0
    return float((a.double() - b.double()).norm() / b.double().norm()) <= tolerance


def moments_of(lm: LM, edit: WeightEdit) -> dict[str, Tensor]:
    """C of each weight that an edit changes; taken on the model without edits."""
    with Ledger.of(lm).suspended():
        sites = [lm.site(name) for name in edit.deltas]
        return {n: m.matrix for n, m in second_moments(lm, sites, CORPUS, dtype="float64").items()}


def solved_anew(lm: LM, edit: WeightEdit, keep: list[int], earlier: WeightEdit | None = None) -> dict[str, Tensor]:
    """The change of each weight, solved densely from the keys and residuals that are kept."""
    s, out, c = edit.settings, {}, moments_of(lm, edit)
    for name in edit.deltas:
        k, r = edit.keys[name].double()[:, keep], edit.residuals[name].double()[:, keep]
        eye = torch.eye(len(k)).double()
        if "L2" in s:
            found, vectors = torch.linalg.eigh(c[name])
            u = vectors[:, found < s["nullspace_threshold"]]
            past = earlier.keys[name].double() if earlier is not None else k[:, :0]
            k, a = u @ (u.T @ k), s["L2"] * eye + u @ u.T @ past @ past.T @ u @ u.T
        else:
            a = s["mom2_update_weight"] * c[name]
        inside = k.T @ torch.linalg.solve(a, k) + s.get("emmet_lambda", 1.0) * torch.eye(k.shape[1]).double()
        out[name] = r @ torch.linalg.solve(inside, torch.linalg.solve(a, k).T)
        if "suppression_strength" in s:
            ledger = Ledger.of(lm)
            base = ledger.base(name)
            weight = summed(base, [earlier.deltas[name]] if earlier else [], ledger.transposed(name)).double()
            weight = weight.T if ledger.transposed(name) else weight
            rows = weight / weight.norm(dim=1, keepdim=True)
            found, vectors = torch.linalg.eigh(rows.T @ rows)
            share = found.flip(0).cumsum(0) / found.sum()
            u = vectors.flip(1)[:, : int((share <= s["cumulative_ratio"]).sum()) + 1]
            out[name] = out[name] @ (eye - s["suppression_strength"] * u @ u.T)
    return out


def wide(delta: Delta) -> Tensor:
    """A change of low rank as a matrix, multiplied in fp64."""
    assert isinstance(delta, LowRank)
    return delta.left.double() @ delta.right.double().T


# ---- one fact of a batch


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("name", METHODS)
def test_a_fact_that_was_taken_out_was_never_solved_for(name: str, family: str) -> None:
    """Between an edit before and one after; these stay as they are, and so does the order."""
    lm = toy.build(family)
    pristine = bits(lm)
    earlier = made(lm, name, [EARLIER])
    batch = made(lm, name, FACTS)
    later = made(lm, name, [LATER])
    one = editor(lm, name)
    assert one.rollback(FACTS[1]) == [batch]
    before, smaller, after = active(lm)
    assert before is earlier and after is later and isinstance(smaller, WeightEdit)
    assert smaller.facts == [fact for i, fact in enumerate(batch.facts) if i != 1]
    assert smaller.method == name and smaller.settings == batch.settings and smaller.id != batch.id
    assert list(smaller.notes["losses"]) == [t for i, t in enumerate(batch.notes["losses"]) if i != 1]
    keep = [0, 2, 3]
    plain = solved_anew(lm, batch, keep, earlier)
    ledger = Ledger.of(lm)
    for weight, change in plain.items():
        assert torch.equal(smaller.keys[weight], batch.keys[weight][:, keep])
        assert torch.equal(smaller.residuals[weight], batch.residuals[weight][:, keep])
        assert close(dense(smaller.deltas[weight]), change, 5e-6)
        deltas: list[Delta] = [earlier.deltas[weight], Dense(change.float()), later.deltas[weight]]
        expected = summed(ledger.base(weight), deltas, ledger.transposed(weight))
        assert close(lm.model.get_parameter(weight).detach(), expected, 1e-6)
        assert not close(dense(smaller.deltas[weight]), dense(batch.deltas[weight]), 1e-3)
    touched = set(batch.deltas)
    assert all(torch.equal(t, pristine[n]) for n, t in lm.model.state_dict().items() if n not in touched)
    one.rollback(smaller.id)
    for weight in touched:
        alone = summed(ledger.base(weight), [earlier.deltas[weight], later.deltas[weight]], ledger.transposed(weight))
        assert torch.equal(lm.model.get_parameter(weight).detach(), alone), "bit for bit"
    one.rollback(earlier)
    one.rollback(later)
    assert same_bits(lm, pristine) and not active(lm)


KEYS: dict[str, tuple[Any, list[int]]] = {
    "request": (FACTS[2], [2]),
    "equal request": (dataclasses.replace(FACTS[2], ground_truth=None), [2]),
    "prompt": ("cy vi lives in", [2]),
    "prompt and answer": ("cy vi lives in -> lima", [2]),
    "answer of one": ("lima", [2]),
    "answer of two": ("rome", [0, 3]),
}


@pytest.mark.parametrize("key", KEYS)
def test_what_names_a_fact(key: str) -> None:
    lm, (named, gone) = toy.build("gpt2"), KEYS[key]
    batch, other = made(lm, "MEMIT", FACTS), made(lm, "MEMIT", [LATER])
    assert editor(lm).rollback(named) == [batch]
    smaller, untouched = active(lm)
    keep = [i for i in range(4) if i not in gone]
    assert smaller.facts == [batch.facts[i] for i in keep] and untouched is other
    for weight, change in solved_anew(lm, batch, keep).items():
        assert close(dense(smaller.deltas[weight]), change, 5e-6)


def test_an_answer_names_all_facts_that_have_it() -> None:
    """Also in several edits: of one of many it takes a part, one of this fact alone goes."""
    lm = toy.build("llama")
    batch = made(lm, "MEMIT", FACTS)
    alone = made(lm, "MEMIT", [dataclasses.replace(LATER, target_new="rome")])
    last = made(lm, "MEMIT", [EARLIER])
    one = editor(lm)
    assert one.rollback("rome") == [batch, alone]
    smaller, kept = active(lm)
    assert smaller.facts == [batch.facts[1], batch.facts[2]] and kept is last
    assert one.rollback("bo su works as") == [smaller]
    assert [e.facts for e in active(lm)] == [[batch.facts[2]], last.facts]
    with pytest.raises(UsageError, match=r"No edit on the model has the id or the fact 'rome'.*cy vi lives in -> lima"):
        one.rollback("rome")
    one.rollback("lima")
    assert active(lm) == [last]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_taken_out_one_by_one_the_model_is_as_before(dtype: torch.dtype) -> None:
    lm = toy.build("llama")
    lm = LM.wrap(lm.model.to(dtype), lm.tokenizer, name=lm.name)
    pristine, one = bits(lm), editor(lm)
    one.apply(FACTS)
    for i in (2, 0, 3, 1):
        assert not same_bits(lm, pristine)
        one.rollback(FACTS[i])
    assert same_bits(lm, pristine) and not active(lm)


def test_the_order_in_which_facts_leave_does_not_matter() -> None:
    found = []
    for order in ((0, 2), (2, 0)):
        lm = toy.build("llama")
        made(lm, "MEMIT", FACTS)
        for i in order:
            editor(lm).rollback(FACTS[i])
        found.append(lm.model.get_parameter(lm.weight_name(1)).detach())
    assert close(found[0], found[1])


def test_a_later_call_takes_back_what_is_left_of_an_earlier_one() -> None:
    lm = toy.build("llama")
    pristine, one = bits(lm), editor(lm)
    one.normal_edit([r.prompt for r in FACTS], [r.target_new for r in FACTS], subject=[r.subject for r in FACTS])
    one.rollback(FACTS[1])
    assert len(active(lm)) == 1
    one.normal_edit([LATER.prompt], [LATER.target_new], subject=[LATER.subject])
    assert [e.facts for e in active(lm)] == [["ada vi works as -> baker"]]
    one.rollback("baker")
    assert same_bits(lm, pristine)


def test_the_history_that_follows_has_no_keys_of_what_was_taken_out() -> None:
    lm = toy.build("gpt2")
    batch = made(lm, "AlphaEdit", FACTS)
    editor(lm, "AlphaEdit").rollback(FACTS[1])
    assert all(e.keys[n].shape[1] == 3 for e in active(lm) for n in batch.keys)
    after = made(lm, "AlphaEdit", [LATER])
    name = lm.weight_name(0)
    kept = dataclasses.replace(batch, keys={n: k[:, [0, 2, 3]] for n, k in batch.keys.items()})
    assert close(dense(after.deltas[name]), solved_anew(lm, after, [0], kept)[name], 1e-4)
    assert not close(dense(after.deltas[name]), solved_anew(lm, after, [0], batch)[name], 1e-3)


@pytest.mark.parametrize("gamma", [1.0, 0.1])
def test_a_thousand_facts_five_times(gamma: float) -> None:
    """No model: random keys; five facts taken out one after the other and all at once are a solve without them."""
    draw = torch.Generator().manual_seed(0)
    k, r, a = (torch.randn(*shape, generator=draw) for shape in ((96, 1000), (32, 1000), (96, 400)))
    system = System(a.double() @ a.T.double() / 400, 50.0)
    whole = solve(system, k, r, gamma)
    assert whole.factor is not None
    edit = WeightEdit(
        deltas={"w": whole.delta}, keys={"w": k}, residuals={"w": r}, factors={"w": whole.factor}, method="MEMIT",
        requests=tuple({"prompt": f"{i}", "target_new": "a"} for i in range(1000)),
    )  # fmt: skip
    gone, step = [3, 999, 500, 0, 640], edit
    for n, i in enumerate(gone):
        place = [int(request["prompt"]) for request in step.requests].index(i)
        step = without_facts(step, {place})
        assert len(step.requests) == 999 - n
    keep = [i for i in range(1000) if i not in gone]
    fresh = solve(system, k[:, keep], r[:, keep], gamma)
    for found in (step, without_facts(edit, set(gone))):
        assert [int(request["prompt"]) for request in found.requests] == keep
        assert found.deltas["w"].rank == 995
        assert close(wide(found.deltas["w"]), wide(fresh.delta))
        assert close(found.factors["w"], fresh.factor, 1e-9)


# ---- what cannot be taken apart


SHARED = [
    EditRequest("the home of ada ra is", "rome", subject="ada ra"),
    FACTS[1],
    EditRequest("ada ra works as", "nurse", subject="ada ra"),
]


def refused(lm: LM, key: Any) -> str:
    before, there = bits(lm), active(lm)
    with pytest.raises(UsageError) as caught:
        editor(lm).rollback(key)
    assert same_bits(lm, before) and len(active(lm)) == len(there)
    assert all(a is b for a, b in zip(active(lm), there, strict=True))
    return str(caught.value)


def test_facts_that_share_a_value_are_taken_back_together() -> None:
    lm = toy.build("llama")
    batch = made(lm, "MEMIT", SHARED, merge_same_subject=True)
    for key, partner in ((SHARED[0], "ada ra works as -> nurse"), ("nurse", "the home of ada ra is -> rome")):
        said = refused(lm, key)
        assert f"'{partner}' shares its value" in said and "merge_same_subject" in said and "Take back all" in said
    assert editor(lm).rollback(SHARED[1]) == [batch], "whose own value it is, although it stands in the second place"
    (smaller,) = active(lm)
    assert smaller.facts == [batch.facts[0], batch.facts[2]] and list(smaller.notes["shared"]) == [0, 0]
    for weight, change in solved_anew(lm, batch, [0]).items():
        assert close(dense(smaller.deltas[weight]), change, 5e-6)
    assert "'ada ra works as -> nurse' shares its value" in refused(lm, SHARED[0])


def test_facts_of_one_subject_and_one_answer_leave_together() -> None:
    lm = toy.build("gpt2")
    same = [dataclasses.replace(SHARED[2], target_new="rome"), SHARED[1], SHARED[0]]
    batch = made(lm, "MEMIT", same, merge_same_subject=True)
    editor(lm).rollback("rome")
    (smaller,) = active(lm)
    assert smaller.facts == [batch.facts[1]]
    for weight, change in solved_anew(lm, batch, [1]).items():
        assert close(dense(smaller.deltas[weight]), change, 5e-6)


def test_two_facts_of_one_subject_alone_name_each_other() -> None:
    lm = toy.build("llama")
    made(lm, "MEMIT", [SHARED[0], SHARED[2]], merge_same_subject=True)
    assert "'ada ra works as -> nurse' shares its value" in refused(lm, SHARED[0])


def test_the_same_fact_twice_is_taken_out_as_one() -> None:
    lm = toy.build("llama")
    batch = made(lm, "MEMIT", [FACTS[0], FACTS[1], FACTS[0]])
    editor(lm).rollback(FACTS[0])
    (smaller,) = active(lm)
    assert smaller.facts == [batch.facts[1]]
    for weight, change in solved_anew(lm, batch, [1]).items():
        assert close(dense(smaller.deltas[weight]), change, 5e-6)


@pytest.mark.parametrize("name", ["FT", "SimIE"])
def test_what_cannot_be_taken_apart_says_so(name: str) -> None:
    lm = toy.build("llama")
    pristine = bits(lm)
    batch = made(lm, name, FACTS[:3], **({} if name == "FT" else {"mom2_adjustment": True}))
    said = refused(lm, FACTS[1])
    assert SAID in said and f"({name}) changes 3 facts together" in said and f"rollback('{batch.id}')" in said
    assert editor(lm).rollback(batch.id) == [batch]
    assert same_bits(lm, pristine)


def test_a_sum_of_edits_cannot_be_taken_apart() -> None:
    lm = toy.build("llama")
    first, second = made(lm, "MEMIT", FACTS[:2]), made(lm, "MEMIT", FACTS[2:])
    ledger = Ledger.of(lm)
    ledger.reset()
    ledger.apply(first + second)
    assert SAID in refused(lm, FACTS[1])


def test_an_emmet_edit_of_contradictions_says_so() -> None:
    lm = toy.build("llama")
    twice = [FACTS[0], dataclasses.replace(FACTS[0], target_new="cairo"), FACTS[1]]
    made(lm, "EMMET", twice, layers=[1], emmet_lambda=0.0)
    assert SAID in refused(lm, "cairo")


def test_all_of_an_answer_or_nothing() -> None:
    """One of the edits that have the answer cannot be taken apart: then the others stay as well."""
    lm = toy.build("llama")
    made(lm, "MEMIT", FACTS)
    made(lm, "FT", [dataclasses.replace(LATER, target_new="rome"), EARLIER])
    assert SAID in refused(lm, "rome")


# ---- saved and loaded


@pytest.mark.parametrize("name", ["MEMIT", "AlphaEdit", "PMET"])
def test_a_loaded_edit_can_still_be_taken_apart(name: str, tmp_path: Path) -> None:
    lm, other = toy.build("gpt2"), toy.build("gpt2")
    batch = made(lm, name, FACTS)
    (loaded,) = load_edits(save_edits(batch, tmp_path / "edit"))
    assert loaded == batch and loaded.id == batch.id
    Ledger.of(other).apply(loaded)
    for one in (lm, other):
        editor(one, name).rollback(FACTS[1])
    assert active(lm)[0] == active(other)[0] and same_bits(lm, bits(other))
    (again,) = load_edits(save_edits(active(other)[0], tmp_path / "smaller"))
    third = toy.build("gpt2")
    Ledger.of(third).apply(again)
    assert same_bits(third, bits(lm))
    editor(third, name).rollback("rome")
    editor(lm, name).rollback("rome")
    assert same_bits(third, bits(lm)) and active(third)[0].facts == ["cy vi lives in -> lima"]


def test_a_loaded_edit_knows_who_shares_a_value(tmp_path: Path) -> None:
    lm, other = toy.build("llama"), toy.build("llama")
    (loaded,) = load_edits(save_edits(made(lm, "MEMIT", SHARED, merge_same_subject=True), tmp_path / "edit"))
    Ledger.of(other).apply(loaded)
    assert "'ada ra works as -> nurse' shares its value" in refused(other, SHARED[0])
    for one in (lm, other):
        editor(one).rollback(SHARED[1])
    assert same_bits(other, bits(lm))


# ---- health


def draw(*shape: int, seed: int = 0) -> Tensor:
    return 0.05 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain_health(lm: LM, base: Tensor, now: Tensor, d: Tensor) -> dict[str, float]:
    """With singular values; ``now`` is the weight with all edits, this one among them."""
    s = torch.linalg.svdvals(d.double())
    return {
        "update": float(s.pow(2).sum().sqrt() / base.double().norm()),
        "drift": float(now.double().norm() / base.double().norm()) - 1,
        "effective_rank": float(s.pow(2).sum() ** 2 / s.pow(4).sum()),
    }


def changes_of(d_out: int, d_in: int) -> dict[str, Delta]:
    return {
        "low rank": LowRank(draw(d_out, 3), draw(d_in, 3, seed=1)),
        "rank one": LowRank(draw(d_out, 1), draw(d_in, 1, seed=1)),
        "as many ranks as rows": LowRank(draw(d_out, d_out + 5), draw(d_in, d_out + 5, seed=1)),
        "dense": Dense(draw(d_out, d_in, seed=2)),
        "rows": Rows(torch.tensor([3, 0, 7]), draw(3, d_in, seed=3), d_out),
        "a row twice": Rows(torch.tensor([3, 0, 3]), draw(3, d_in, seed=4), d_out),
    }


@pytest.mark.parametrize("kind", changes_of(8, 8))
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_health_is_that_of_the_singular_values(family: str, kind: str) -> None:
    """With an earlier edit on the model: update and drift are against the weight without any."""
    lm = toy.build(family)
    site = lm.mlp_out(1)
    name, base = site.weight_name, site.matrix().clone()
    earlier = Dense(draw(site.d_out, site.d_in, seed=9))
    Ledger.of(lm).apply(WeightEdit(deltas={name: earlier}))
    edit = WeightEdit(deltas={name: changes_of(site.d_out, site.d_in)[kind]})
    d = dense(edit.deltas[name])
    plain = plain_health(lm, base, base + dense(earlier) + d, d)
    before = health(lm, edit)[name]
    Ledger.of(lm).apply(edit)
    after = health(lm, edit, applied=True)[name]
    for found in (before, after):
        assert found == pytest.approx(plain, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", ["MEMIT", "EMMET", "AlphaEdit", "SPHERE", "NAMET"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_edit_says_how_well_it_was_determined(family: str, name: str) -> None:
    lm = toy.build(family)
    bases = {layer: lm.mlp_out(layer).matrix().clone() for layer in (0, 1)}
    earlier = made(lm, name, [EARLIER])
    edit = made(lm, name, FACTS)
    c = moments_of(lm, edit)
    for layer, base in bases.items():
        site = lm.mlp_out(layer)
        weight, d = site.weight_name, dense(edit.deltas[site.weight_name])
        found, plain = edit.health[weight], plain_health(lm, base, site.matrix(), d)
        assert {key: found[key] for key in plain} == pytest.approx(plain, rel=1e-4, abs=1e-6)
        k, r, s = edit.keys[weight].double(), edit.residuals[weight].double(), edit.settings
        assert found["residual"] == pytest.approx(float((r - d.double() @ k).norm() / r.norm()), rel=1e-2)
        a = s.get("mom2_update_weight", 0.0) * c[weight]
        if "L2" in s:
            values, vectors = torch.linalg.eigh(c[weight])
            u = vectors[:, values < s["nullspace_threshold"]]
            k, past = u @ u.T @ k, u @ u.T @ earlier.keys[weight].double()
            a = s["L2"] * torch.eye(len(k)).double() + past @ past.T
        system = k.T @ torch.linalg.solve(a, k) + s.get("emmet_lambda", 1.0) * torch.eye(4).double()
        assert found["condition"] == pytest.approx(float(torch.linalg.cond(system)), rel=0.1), "an estimate"


def test_the_health_of_what_is_left_is_its_own() -> None:
    lm = toy.build("llama")
    base = {layer: lm.mlp_out(layer).matrix().clone() for layer in (0, 1)}
    made(lm, "MEMIT", [EARLIER])
    batch = made(lm, "MEMIT", FACTS)
    made(lm, "MEMIT", [LATER])
    editor(lm).rollback(FACTS[1])
    smaller = active(lm)[1]
    assert isinstance(smaller, WeightEdit)
    for layer, weight in ((layer, lm.weight_name(layer)) for layer in (0, 1)):
        d = dense(smaller.deltas[weight])
        plain = plain_health(lm, base[layer], lm.mlp_out(layer).matrix(), d)
        found = smaller.health[weight]
        assert {key: found[key] for key in plain} == pytest.approx(plain, rel=1e-4, abs=1e-6)
        assert found["update"] != batch.health[weight]["update"]
        left, factor = [0, 2, 3], smaller.factors[weight].double()
        keys, residuals = batch.keys[weight][:, left].float(), batch.residuals[weight][:, left].float()
        missed = (residuals - d @ keys).norm() / residuals.norm()
        assert found["residual"] == pytest.approx(float(missed), rel=1e-3, abs=1e-5)
        assert found["condition"] == pytest.approx(float(torch.linalg.cond(factor @ factor.T)), rel=0.02)
    assert "solved" not in smaller.notes
