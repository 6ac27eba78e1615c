"""The closed-form methods against plain computations: one text at a time, hooks of torch, dense matrices, fp64."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import normalizers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import toy
from easyeditor import BaseEditor
from easyeditor.core import spread as spread_module
from easyeditor.core import values as values_module
from easyeditor.core.closed_form import find, value_norm, value_settings
from easyeditor.core.losses import alignment
from easyeditor.core.prompts import facts_of
from easyeditor.core.spread import Reader
from easyeditor.core.stats import second_moments
from easyeditor.core.values import Value, optimise, values
from easyeditor.editors.perform import make_edit, prepared, put_on
from easyeditor.edits.delta import dense
from easyeditor.edits.edit import WeightEdit
from easyeditor.edits.ledger import Ledger
from easyeditor.errors import EasyEditError, NonFinite, UsageError
from easyeditor.hparams import complete
from easyeditor.lm.model import LM
from easyeditor.lm.structure import Site
from easyeditor.methods.core import _distracting
from easyeditor.registry import get_method
from easyeditor.requests import EditRequest

CORPUS = toy.corpus()
LAYERS = [0, 1, 2]
QUICK: dict[str, Any] = {
    "layers": LAYERS, "v_num_grad_steps": 3, "v_lr": 0.3, "v_weight_decay": 0.1, "clamp_norm_factor": 1.5,
    "context_template_length_params": [[2, 2], [3, 1]], "mom2_update_weight": 10.0, "mom2_dtype": "float64",
}  # fmt: skip
FACTS = [
    EditRequest("the home of ada ra is", "rome and then lima", subject="ada ra", ground_truth="oslo"),
    EditRequest("bo su works as", "clown", subject="bo su", ground_truth="judge"),
    EditRequest("what does cy vi do ?", "pilot .", subject="cy vi", ground_truth="nurse"),
]
FAMILIES = ("gpt2", "llama")
Solve = Callable[[int, Tensor, Tensor], Tensor]  # block, K (d_in, n), R (d_out, n), fp64 -> D (d_out, d_in)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    assert float(b.norm()) > 0
    return float((a.double() - b.double()).norm() / b.double().norm()) <= tolerance


def settings(lm: LM, name: str, **more: Any) -> Any:
    spec = get_method(name)
    known = {f.name for f in dataclasses.fields(spec.hparams)}
    given = {"ctx_num": 1, "ctx_len": 2, **QUICK, **more}
    return complete(spec.hparams(**{name: value for name, value in given.items() if name in known}), lm)


def edit_of(lm: LM, name: str, requests: Sequence[EditRequest] = FACTS, **more: Any) -> tuple[WeightEdit, Any, Any]:
    """The library's edit with its settings and its contexts."""
    hparams, spec = settings(lm, name, **more), get_method(name)
    state = prepared(lm, spec, hparams, CORPUS)
    edit = make_edit(lm, spec, requests, hparams, state)
    assert isinstance(edit, WeightEdit)
    return edit, hparams, state.get("contexts")


def moment(lm: LM, layer: int) -> Tensor:
    site = lm.mlp_out(layer)
    return second_moments(lm, [site], CORPUS, dtype="float64")[site.weight_name].matrix


def bits(lm: LM) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}


def same_bits(lm: LM, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in lm.model.state_dict().items())


# ---- the plain computation


Writes = Sequence[tuple[nn.Module, int, Tensor]]


def run(lm: LM, ids: Sequence[int], looks: Sequence[tuple[nn.Module, str]], writes: Writes = ()) -> tuple[Tensor, ...]:
    """Logits (length, vocab) and what modules take or return (length, width), with vectors added at positions."""
    seen: dict[int, Tensor] = {}

    def add(_: Any, __: Any, output: Any, position: int, vector: Tensor) -> Any:
        states = (output[0] if isinstance(output, tuple) else output).clone()
        states[0, position] = states[0, position] + vector
        return (states, *output[1:]) if isinstance(output, tuple) else states

    def note(_: Any, inputs: Any, output: Any, which: int, kind: str) -> None:
        value = inputs[0] if kind == "input" else output[0] if isinstance(output, tuple) else output
        seen[which] = value[0]

    handles = [m.register_forward_hook(lambda *a, p=p, v=v: add(*a, p, v)) for m, p, v in writes]
    handles += [m.register_forward_hook(lambda *a, i=i, k=k: note(*a, i, k)) for i, (m, k) in enumerate(looks)]
    logits = lm.model(torch.tensor([list(ids)])).logits[0]
    for handle in handles:
        handle.remove()
    return (logits, *(seen[i] for i in range(len(looks))))


def tokens(lm: LM, text: str) -> list[int]:
    return list(lm.tokenizer(text)["input_ids"])


def last_of(lm: LM, ids: Sequence[int], subject: str) -> int:
    """Where the last word of a subject stands, at its last occurrence; in the toy world a word is a token."""
    word = lm.tokenizer.convert_tokens_to_ids(subject.split()[-1])
    return max(i for i, token in enumerate(ids) if token == word)


@torch.no_grad()
def look(
    lm: LM, request: EditRequest, context: str, module: nn.Module, kind: str = "output", writes: Any = ()
) -> Tensor:
    """What a module takes or returns at the subject's last token, (width,)."""
    ids = tokens(lm, context.replace("{}", request.prompt))
    at = last_of(lm, ids, request.subject or "")
    return run(lm, ids, [(module, kind)], [(m, at, d) for m, d in writes])[1][at]


def key(lm: LM, request: EditRequest, module: nn.Module, contexts: Sequence[str]) -> Tensor:
    """Half that of the bare prompt, half the mean over the texts in front."""
    bare, *others = (look(lm, request, context, module, "input") for context in contexts)
    return bare / 2 + torch.stack(others).mean(0) / 2 if others else bare


def change(site: Site, matrix: Tensor) -> None:
    """Really put a change on a weight."""
    weight = site.module.weight
    weight.data += (matrix.T if isinstance(site.module, Conv1D) else matrix).to(weight.dtype)


@dataclasses.dataclass
class Plain:
    """One value, found by torch's Adam; with what the terms of a method need."""

    deltas: list[Tensor]
    losses: list[float]


At = Sequence[tuple[nn.Module, Tensor]]  # what is added to which module's output, at the subject


def answered(lm: LM, request: EditRequest, context: str, put: At, watch: Any = ()) -> tuple[Tensor, bool, list[Tensor]]:
    """-log p of the answer per token, whether it leads, and what the watched modules return at the subject."""
    text = context.replace("{}", request.prompt)
    start, whole = tokens(lm, text), tokens(lm, f"{text} {request.target_new}")
    at, labels = last_of(lm, start, request.subject or ""), torch.tensor(whole[len(start) :])
    logits, *seen = run(lm, whole, [(m, "output") for m in watch], [(m, at, d) for m, d in put])
    logp = logits[len(start) - 1 : -1].log_softmax(-1)
    leads = bool((logp.argmax(1) == labels).all())
    return -logp.gather(1, labels[:, None]).mean(), leads, [states[at] for states in seen]


def essence_kl(lm: LM, request: EditRequest, put: At) -> Tensor:
    """KL(p_now || p_before) after the subject in '{subject} is a'."""
    ids = tokens(lm, f"{request.subject} is a")
    at = last_of(lm, ids, request.subject or "")
    before = run(lm, ids, [])[0][at].log_softmax(-1).detach()
    now = run(lm, ids, [], [(m, at, d) for m, d in put])[0][at].log_softmax(-1)
    return (now.exp() * (now - before)).sum()


def plain_value(
    lm: LM,
    requests: Sequence[EditRequest],
    layer: int,
    contexts: Sequence[str],
    hp: Any,
    modules: Sequence[nn.Module] = (),
    *,
    decay: Callable[[Tensor, Tensor], Tensor] = lambda d, v: d.norm() / v.norm() ** 2,
    stop: float = 5e-2,
    clamp: float | None = None,
    extra: Callable[[Tensor, list[Tensor]], Tensor] | None = None,
    watch: Sequence[nn.Module] = (),
    rule: Callable[[list[float], list[bool]], bool] = lambda _, __: False,
) -> Plain:
    """ROME's loss, written out: each text by itself, the whole model in every step.

    ``extra`` takes the value and what the watched modules return at the subject, (contexts, width) each; ``rule`` takes
    the probability of the answer and whether it leads, by context, and says whether to end.
    """
    places = list(modules) or [lm.blocks[layer]]
    before = [torch.stack([look(lm, r, "{}", m) for r in requests]).mean(0) for m in places]
    for parameter in lm.model.parameters():
        parameter.requires_grad_(False)
    deltas = [torch.zeros_like(v).requires_grad_(True) for v in before]
    adam = torch.optim.Adam(deltas, lr=hp.v_lr)
    losses: list[float] = []
    led: list[bool] = []
    for step in range(hp.v_num_grad_steps):
        put = list(zip(places, deltas, strict=True))
        found = [answered(lm, r, c, put, watch) for r in requests for c in contexts]
        nlls, leads, states = (list(column) for column in zip(*found, strict=True))
        loss = getattr(hp, "nll_loss_factor", 1.0) * torch.stack(nlls).mean()
        loss = loss + hp.kl_factor * essence_kl(lm, requests[0], put)
        loss = loss + hp.v_weight_decay * sum(decay(d, v) for d, v in zip(deltas, before, strict=True))
        if extra is not None:
            loss = loss + extra(deltas[0], [torch.stack(s) for s in zip(*states, strict=True)])
        losses.append(float(loss.detach()))
        led.append(all(leads))
        probabilities = [math.exp(-float(n.detach())) for n in nlls]
        if losses[-1] < stop or rule(probabilities, led) or step == hp.v_num_grad_steps - 1:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            for d, v in zip(deltas, before, strict=True):
                largest = (hp.clamp_norm_factor if clamp is None else clamp) * v.norm()
                if d.norm() > largest:
                    d *= largest / d.norm()
    return Plain([d.detach() for d in deltas], losses)


def plain_spread(
    lm: LM,
    requests: Sequence[EditRequest],
    contexts: Sequence[str],
    layers: Sequence[int],
    targets: Tensor,
    solve: Solve,
) -> dict[str, dict[str, Tensor]]:
    """MEMIT's algorithm 1 with the deltas really on the weights; targets are d, (width, n)."""
    top = lm.blocks[layers[-1]]

    def states() -> Tensor:
        return torch.stack([look(lm, r, "{}", top) for r in requests], dim=1).double()

    z, out = states() + targets, {}
    for j, layer in enumerate(layers):
        site = lm.mlp_out(layer)
        k = torch.stack([key(lm, r, site.module, contexts) for r in requests], dim=1).double()
        r = (z - states()) / (len(layers) - j)
        d = solve(layer, k, r)
        change(site, d)
        out[site.weight_name] = {"key": k, "residual": r, "delta": d}
    return out


def targets_of(found: Sequence[Plain], kind: int = 0) -> Tensor:
    return torch.stack([value.deltas[kind] for value in found], dim=1).double()


def agree(edit: WeightEdit, plain: dict[str, dict[str, Tensor]], tolerance: float = 1e-4) -> None:
    assert edit.deltas.keys() == plain.keys()
    for name, of in plain.items():
        assert close(edit.keys[name], of["key"], tolerance), f"keys of {name}"
        assert close(edit.residuals[name], of["residual"], tolerance), f"residuals of {name}"
        assert close(dense(edit.deltas[name]), of["delta"], tolerance), f"change of {name}"


def least_squares(lm: LM, weight: float, ridge: float = 0.0) -> Solve:
    c = {layer: moment(lm, layer) for layer in LAYERS}

    def solve(layer: int, k: Tensor, r: Tensor) -> Tensor:
        a = weight * c[layer] + ridge * torch.eye(len(k)).double() + k @ k.T
        return torch.linalg.solve(a, k @ r.T).T

    return solve


# ---- 1. the family


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_are_half_the_bare_prompt_and_half_the_texts_in_front(family: str) -> None:
    """With what is written below on the model: the keys and residuals of every block."""
    lm, other = toy.build(family), toy.build(family)
    edit, hp, contexts = edit_of(lm, "MEMIT")
    assert contexts[0] == "{}" and len(contexts) == 4 and len(set(contexts)) > 1
    start = torch.stack([look(other, r, "{}", other.blocks[2]) for r in FACTS], dim=1)
    found = find(lm, FACTS, hp, {"contexts": contexts}, 2).targets()
    for j, layer in enumerate(LAYERS):
        site = other.mlp_out(layer)
        name = site.weight_name
        for i, request in enumerate(FACTS):
            bare = look(other, request, "{}", site.module, "input")
            front = [look(other, request, c, site.module, "input") for c in contexts[1:]]
            assert close(edit.keys[name][:, i], (bare + sum(front) / 3) / 2, 1e-5)
        now = torch.stack([look(other, r, "{}", other.blocks[2]) for r in FACTS], dim=1)
        assert close(edit.residuals[name], (start + found - now) / (3 - j), 1e-4)
        change(site, dense(edit.deltas[name]))


@pytest.mark.parametrize("layers", [[1], [0, 1], [0, 1, 2]])
@pytest.mark.parametrize("family", FAMILIES)
def test_memit_is_the_plain_loop(family: str, layers: list[int]) -> None:
    lm, other = toy.build(family), toy.build(family)
    before = bits(lm)
    edit, hp, contexts = edit_of(lm, "MEMIT", layers=layers)
    assert same_bits(lm, before)
    solve = least_squares(other, hp.mom2_update_weight)
    found = [plain_value(other, [r], layers[-1], contexts, hp) for r in FACTS]
    for trace, value in zip(edit.notes["losses"], found, strict=True):
        assert trace == pytest.approx(value.losses, abs=1e-4)
    agree(edit, plain_spread(other, FACTS, contexts, layers, targets_of(found), solve))


@pytest.mark.parametrize("family", FAMILIES)
def test_encores_norm_constraint_is_the_plain_loop(family: str) -> None:
    lm, other = toy.build(family), toy.build(family)
    edit, hp, contexts = edit_of(lm, "MEMIT", layers=[1], update_norm_lambda=20.0)
    solve = least_squares(other, hp.mom2_update_weight, 20.0)
    found = [plain_value(other, [r], 1, contexts, hp) for r in FACTS]
    agree(edit, plain_spread(other, FACTS, contexts, [1], targets_of(found), solve))


@pytest.mark.parametrize("layers", [[1], [1, 2]])
@pytest.mark.parametrize("alpha", [0.0, 0.1])
@pytest.mark.parametrize("family", FAMILIES)
def test_emmet_is_its_formula(family: str, alpha: float, layers: list[int]) -> None:
    lm, other = toy.build(family), toy.build(family)
    edit, hp, contexts = edit_of(lm, "EMMET", layers=layers, emmet_lambda=alpha)
    c = {layer: hp.mom2_update_weight * moment(other, layer) for layer in layers}

    def solve(layer: int, k: Tensor, r: Tensor) -> Tensor:
        u = torch.linalg.solve(c[layer], k)
        return r @ torch.linalg.solve(k.T @ u + alpha * torch.eye(k.shape[1]).double(), u.T)

    found = [plain_value(other, [r], layers[-1], contexts, hp) for r in FACTS]
    plain = plain_spread(other, FACTS, contexts, layers, targets_of(found), solve)
    agree(edit, plain)
    if alpha == 0:
        for of in plain.values():
            assert close(of["delta"] @ of["key"], of["residual"], 1e-6), "the residuals are added exactly"


def authors_null_space(c: Tensor, threshold: float) -> Tensor:
    u, s, _ = torch.linalg.svd(c)
    small = u[:, s < threshold]
    assert 0 < small.shape[1] < len(c)
    return small @ small.T


@pytest.mark.parametrize("threshold", [2e-3, 2e-2])
@pytest.mark.parametrize("family", FAMILIES)
def test_alphaedit_is_the_authors_formula_with_a_cache(family: str, threshold: float) -> None:
    """Two edits in sequence; the authors compute the keys of the cache anew on the edited model."""
    lm, other, layers, ridge = toy.build(family), toy.build(family), [0, 1], 0.05
    hp = settings(lm, "AlphaEdit", layers=layers, nullspace_threshold=threshold, L2=ridge)
    spec = get_method("AlphaEdit")
    state = prepared(lm, spec, hp, CORPUS)
    p = {layer: authors_null_space(moment(other, layer), threshold) for layer in layers}
    cache = {layer: torch.zeros(256, 256).double() for layer in layers}

    def solve(layer: int, k: Tensor, r: Tensor) -> Tensor:
        a = p[layer] @ (k @ k.T + cache[layer]) + ridge * torch.eye(256).double()
        return torch.linalg.solve(a, p[layer] @ k @ r.T).T

    for requests in (FACTS[:2], FACTS[2:]):
        edit = make_edit(lm, spec, requests, hp, state)
        put_on(lm, edit, requests)
        found = [plain_value(other, [r], 1, state["contexts"], hp) for r in requests]
        agree(edit, plain_spread(other, requests, state["contexts"], layers, targets_of(found), solve), 1e-3)
        for layer in layers:
            module = other.mlp_out(layer).module
            k = torch.stack([key(other, r, module, state["contexts"]) for r in requests], dim=1).double()
            cache[layer] += k @ k.T
    for layer in layers:
        left = edit.keys[lm.weight_name(layer)].double()
        assert not close(p[layer] @ left, left, 0.1), "the projection takes something away"


@pytest.mark.parametrize("family", FAMILIES)
def test_alphaedit_reads_the_projection_of_a_file(family: str, tmp_path: Path) -> None:
    lm, layers = toy.build(family), [0, 1]
    more = {"layers": layers, "nullspace_threshold": 2e-2, "L2": 0.05}
    p = torch.stack([authors_null_space(moment(lm, layer), 2e-2) for layer in layers])
    torch.save(p, tmp_path / "p.pt")
    plain, _, _ = edit_of(lm, "AlphaEdit", **more)
    read, _, _ = edit_of(lm, "AlphaEdit", **more, P_loc=str(tmp_path / "p.pt"))
    for name, delta in plain.deltas.items():
        assert close(dense(read.deltas[name]), dense(delta), 1e-4)


@pytest.mark.parametrize(("ratio", "strength"), [(0.5, 0.5), (0.9, 1.0), (0.0, 0.3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_sphere_is_alphaedit_off_the_crowded_directions(family: str, ratio: float, strength: float) -> None:
    lm, other, layers, ridge = toy.build(family), toy.build(family), [0, 1], 0.05
    edit, hp, contexts = edit_of(lm, "SPHERE", layers=layers, nullspace_threshold=2e-2, L2=ridge,
                                 cumulative_ratio=ratio, suppression_strength=strength)  # fmt: skip
    p = {layer: authors_null_space(moment(other, layer), 2e-2) for layer in layers}

    def solve(layer: int, k: Tensor, r: Tensor) -> Tensor:
        d = torch.linalg.solve(p[layer] @ k @ k.T + ridge * torch.eye(256).double(), p[layer] @ k @ r.T).T
        weight = other.mlp_out(layer).matrix().double()
        rows = weight / weight.norm(dim=1, keepdim=True)
        found, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))  # (d_in, d_in), as the authors do
        found, vectors = found.flip(0), vectors.flip(1)
        r_top = int((found.cumsum(0) / found.sum() <= ratio).sum()) + 1
        u = vectors[:, :r_top]
        return d @ (torch.eye(256).double() - strength * u @ u.T).T

    found = [plain_value(other, [r], 1, contexts, hp) for r in FACTS]
    agree(edit, plain_spread(other, FACTS, contexts, layers, targets_of(found), solve), 1e-3)


@pytest.mark.parametrize("written", [[], ["mlp", "attn"]], ids=["MLP", "both"])
@pytest.mark.parametrize("family", FAMILIES)
def test_pmet_spreads_by_the_root(family: str, written: list[str]) -> None:
    lm, other, layers = toy.build(family), toy.build(family), [0, 1]
    edit, hp, contexts = edit_of(lm, "PMET", layers=layers, rewrite_module_tmps=written, nll_loss_factor=0.7)
    sites_of = {"attn": other.attn_out, "mlp": other.mlp_out}
    modules = [sites_of[kind](1).module for kind in ("attn", "mlp")]
    found = [plain_value(other, [r], 1, contexts, hp, modules) for r in FACTS]
    assert all((d.norm() > 0.1) for value in found for d in value.deltas)
    kinds = {"attn": 0, "mlp": 1} if written else {"mlp": 1}

    def states(kind: str) -> Tensor:
        return torch.stack([look(other, r, "{}", sites_of[kind](1).module) for r in FACTS], dim=1).double()

    z = {kind: states(kind) + targets_of(found, i) for kind, i in kinds.items()}
    sites = [sites_of[kind](layer) for layer in layers for kind in kinds]
    c = second_moments(other, sites, CORPUS, dtype="float64")
    plain = {}
    for j, layer in enumerate(layers):
        for kind in kinds:  # read both, then write both
            site = sites_of[kind](layer)
            k = torch.stack([key(other, r, site.module, contexts) for r in FACTS], dim=1).double()
            r = (z[kind] - states(kind)) / math.sqrt(2 - j)
            a = hp.mom2_update_weight * c[site.weight_name].matrix + k @ k.T
            plain[site.weight_name] = {"key": k, "residual": r, "delta": torch.linalg.solve(a, k @ r.T).T}
        for kind in kinds:
            change(sites_of[kind](layer), plain[sites_of[kind](layer).weight_name]["delta"])
    agree(edit, plain)


@pytest.mark.parametrize("layers", [[1], [0, 1, 2]])
@pytest.mark.parametrize("family", FAMILIES)
def test_memit_fe_gives_each_block_what_the_model_itself_says(family: str, layers: list[int]) -> None:
    lm, other = toy.build(family), toy.build(family)
    edit, hp, contexts = edit_of(lm, "MEMIT-FE", layers=layers)
    solve = least_squares(other, hp.mom2_update_weight)
    first = other.blocks[layers[0]]
    found = [plain_value(other, [r], layers[0], contexts, hp) for r in FACTS]
    wanted = {
        layer: [look(other, r, "{}", other.blocks[layer], writes=[(first, v.deltas[0])])
                for r, v in zip(FACTS, found, strict=True)]
        for layer in layers
    }  # fmt: skip
    plain = {}
    for layer in layers:
        site = other.mlp_out(layer)
        k = torch.stack([key(other, r, site.module, contexts) for r in FACTS], dim=1).double()
        now = torch.stack([look(other, r, "{}", other.blocks[layer]) for r in FACTS], dim=1)
        r = (torch.stack(wanted[layer], dim=1) - now).double()
        plain[site.weight_name] = {"key": k, "residual": r, "delta": solve(layer, k, r)}
        change(site, plain[site.weight_name]["delta"])
    agree(edit, plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_namet_reads_what_is_missing_behind_texts(family: str) -> None:
    lm, other, layers = toy.build(family), toy.build(family), [0, 1]
    edit, hp, contexts = edit_of(lm, "NAMET", layers=layers, mom2_update_weight=[10.0, 5.0], clamp_norm_factor=0.4)
    found = [
        plain_value(other, [r], 1, contexts, hp, decay=lambda d, v: d.norm() / v.norm(), stop=1e-2,
                    clamp=0.4 * math.sqrt(len(contexts) + 1))
        for r in FACTS
    ]  # fmt: skip

    def states() -> Tensor:  # (width, texts in front, n)
        rows = [torch.stack([look(other, r, c, other.blocks[1]) for c in contexts[1:]]) for r in FACTS]
        return torch.stack(rows, dim=2).permute(1, 0, 2).double()

    z, plain = states() + targets_of(found)[:, None], {}
    solves = [least_squares(other, weight) for weight in (10.0, 5.0)]
    for j, (layer, solve) in enumerate(zip(layers, solves, strict=True)):
        site = other.mlp_out(layer)
        k = torch.stack([key(other, r, site.module, contexts) for r in FACTS], dim=1).double()
        r = (z - states()).mean(1) / (2 - j)
        plain[site.weight_name] = {"key": k, "residual": r, "delta": solve(layer, k, r)}
        change(site, plain[site.weight_name]["delta"])
    agree(edit, plain)


# ---- SimIE


ROME = {"layers": [1], "v_num_grad_steps": 5, "v_lr": 0.3, "context_template_length_params": [[2, 2]]}
BASES = {"ROME": {**ROME, "mom2_adjustment": True, "mom2_dtype": "float64"}, "MEMIT": {**QUICK, "layers": [0, 1]}}


@pytest.mark.parametrize("init_model", [True, False])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_simie_is_the_recursion(family: str, base: str, init_model: bool) -> None:
    """W_t = W_(t-1) + (W' - W_(t-1)) K K^T P^-1 with a dense P, over three edits in sequence."""
    lm, other, first, spec = toy.build(family), toy.build(family), toy.build(family), get_method("SimIE")
    hp = settings(lm, "SimIE", lamHyper=0.5, base_method=base, base_settings=BASES[base], init_model=init_model)
    state, inner = prepared(lm, spec, hp, CORPUS), get_method(base)
    base_hp = complete(inner.hparams(**BASES[base]), first)
    base_state = prepared(first, inner, base_hp, CORPUS)
    sites = [other.mlp_out(layer) for layer in base_hp.layers]
    p = {site.weight_name: 0.5 * torch.eye(site.d_in).double() for site in sites}
    for request in FACTS:
        put_on(lm, make_edit(lm, spec, [request], hp, state), [request])
        seen = first if init_model else other  # the model that the base method sees
        wanted = inner.run(seen, [request], base_hp, base_state, [])
        read = tokens(seen, f"{request.prompt} {request.target_new}")[:-1]
        keys = [run(seen, read, [(seen.site(s.name).module, "input")])[1].detach().T.double() for s in sites]
        for site, k in zip(sites, keys, strict=True):
            name = site.weight_name
            aim = seen.site(site.name).matrix().double() + dense(wanted.deltas[name]).double()
            p[name] += k @ k.T
            step = (aim - site.matrix().double()) @ k @ k.T @ torch.linalg.inv(p[name])
            change(site, step)
    for site in sites:
        start = first.site(site.name).matrix()
        assert close(lm.site(site.name).matrix() - start, site.matrix() - start, 1e-4)


# ---- R-ROME


@pytest.mark.parametrize(
    ("mode", "u_over", "divided_by"),
    [({}, "contexts", "contexts"),
     ({"enable_prompt_keys": True, "enable_random_prefix_keys": False}, "bare", "bare"),
     ({"original_implementation": True}, "contexts", "bare")],
    ids=["prefixes", "prompt", "original"],
)  # fmt: skip
@pytest.mark.parametrize("family", FAMILIES)
def test_r_rome_takes_the_key_that_the_setting_names(
    family: str, mode: dict[str, bool], u_over: str, divided_by: str
) -> None:
    lm, other, request = toy.build(family), toy.build(family), FACTS[0]
    edit, hp, contexts = edit_of(lm, "R-ROME", [request], layers=[1], mom2_adjustment=True, **mode)
    site, name = other.mlp_out(1), other.weight_name(1)
    over = torch.stack([look(other, request, c, site.module, "input") for c in contexts]).mean(0).double()
    k = {"contexts": over, "bare": look(other, request, "{}", site.module, "input").double()}
    u = torch.linalg.solve(moment(other, 1), k[u_over])
    value = plain_value(other, [request], 1, contexts, hp, [site.module]).deltas[0].double()
    assert close(dense(edit.deltas[name]), torch.outer(value, u) / (u @ k[divided_by]))
    if u_over == divided_by:
        assert close(dense(edit.deltas[name]).double() @ k[u_over], value), "W' k = v*"


# ---- EAMET and CoRE


def plain_alignment(
    cos_k: Tensor, deltas: Tensor, found: Tensor, i: int, tau: float, most: int
) -> tuple[Tensor, Tensor]:
    """KL(p || q) and the weighted squares of fact i, by sums over the facts before it."""
    if i == 0:
        return torch.tensor(0.0), torch.tensor(0.0)
    cos_d = [torch.cosine_similarity(deltas[i], found[j], dim=0) for j in range(i)]
    p = torch.softmax(torch.stack([cos_k[i, j] for j in range(i)]) / tau, 0)
    q = torch.softmax(torch.stack(cos_d) / tau, 0)
    divergence = sum(p[j] * (p[j] / q[j]).log() for j in range(i))
    near = sorted(range(i), key=lambda j: -float(cos_k[i, j]))[:most]
    share = torch.softmax(torch.stack([cos_k[i, j] for j in near]) / tau, 0)
    error = sum(share[n] * (cos_k[i, j] - cos_d[j]) ** 2 for n, j in enumerate(near))
    return torch.as_tensor(divergence), torch.as_tensor(error)


@pytest.mark.parametrize(("facts", "most"), [(1, 50), (6, 50), (60, 50), (9, 3)])
def test_alignment_is_the_sum_over_earlier_facts(facts: int, most: int) -> None:
    generator = torch.Generator().manual_seed(facts)
    keys, found = (torch.randn(facts, 16, generator=generator).double() for _ in range(2))
    cos_k = torch.nn.functional.cosine_similarity(keys[:, None], keys[None], dim=-1)
    index = torch.randperm(facts, generator=generator)  # the order in a group is not that of the facts
    step = SimpleNamespace(delta=found[index][:, None], found=found[:, None], index=index)
    divergence, error = alignment(step, cos_k, 0.3, most)  # type: ignore[arg-type]
    for row, i in enumerate(index.tolist()):
        plain = plain_alignment(cos_k, found, found, i, 0.3, most)
        assert (float(divergence[row]), float(error[row])) == pytest.approx(tuple(map(float, plain)), abs=1e-9)


EAMET_WAYS = [
    {"delta_init": "target_init", "weight_decay_method": "fix_ks"},
    {"delta_init": "zero", "weight_decay_method": "norm"},
    {"delta_init": "target_init", "weight_decay_method": "norm", "clamp_norm_factor": 0.5},
]


@pytest.mark.parametrize("way", EAMET_WAYS, ids=["authors", "memit", "mixed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_eamet_moves_all_facts_together(family: str, way: dict[str, Any]) -> None:
    """Losses and values of a batch: each fact aligned with where those before it stand at that step."""
    lm, other = toy.build(family), toy.build(family)
    facts = [*FACTS, EditRequest("bo ra lives in", "lima", subject="bo ra")]
    edit, hp, contexts = edit_of(lm, "EAMET", facts, layers=[1], v_num_grad_steps=4, v_lr=0.1, tau=0.5, **way)
    keys = torch.stack([key(other, r, other.mlp_out(1).module, contexts) for r in facts])
    cos_k = torch.nn.functional.cosine_similarity(keys[:, None], keys[None], dim=-1)
    before = torch.stack([look(other, r, "{}", other.blocks[1]) for r in facts])
    fixed, begun = way["weight_decay_method"] == "fix_ks", way["delta_init"] == "target_init"
    longest = hp.clamp_ks_factor * keys.norm(dim=1) if fixed else hp.clamp_norm_factor * before.norm(dim=1)
    start = before / before.norm(dim=1, keepdim=True) * keys.norm(dim=1, keepdim=True) if begun else 0 * before
    deltas = start.clone()
    problems = [d.clone().requires_grad_(True) for d in deltas]
    adams = [torch.optim.Adam([d], lr=hp.v_lr) for d in problems]
    traces: list[list[float]] = [[] for _ in facts]
    for step in range(hp.v_num_grad_steps):
        stand = torch.stack(problems).detach()
        for i, (request, d) in enumerate(zip(facts, problems, strict=True)):
            divergence, error = plain_alignment(cos_k, torch.stack(problems), stand, i, hp.tau, 50)
            size = (d.norm() - longest[i]) ** 2 * hp.norm_factor if fixed else (
                hp.v_weight_decay * d.norm() / before[i].norm())  # fmt: skip
            put = [(other.blocks[1], d)]
            loss = torch.stack([answered(other, request, c, put)[0] for c in contexts]).mean() + size
            loss = loss + hp.kl_factor * essence_kl(other, request, put)
            loss = loss + hp.cs_factor * divergence + hp.mse_factor * error
            traces[i].append(float(loss.detach()))
            if step == hp.v_num_grad_steps - 1:
                continue
            adams[i].zero_grad()
            loss.backward()
            adams[i].step()
            with torch.no_grad():
                if d.norm() > longest[i]:
                    d *= longest[i] / d.norm()
    name = lm.weight_name(1)
    for trace, plain in zip(edit.notes["losses"], traces, strict=True):
        assert trace == pytest.approx(plain, rel=1e-4)
    assert close(edit.residuals[name], torch.stack(problems, dim=1).detach())


@pytest.mark.parametrize("family", FAMILIES)
def test_core_asks_contexts_to_agree(family: str) -> None:
    """The sum over pairs of contexts, block by block, and MEMIT for the rest."""
    lm, other = toy.build(family), toy.build(family)
    more = {"layers": [1], "context": "subject", "ctx_num": 2, "ctx_len": 3, "reg_lambda": 0.05, "layer_range": 2}
    requests = FACTS[:2]
    edit, hp, _ = edit_of(lm, "CORE", requests, **more)
    solve = least_squares(other, hp.mom2_update_weight)
    texts = [_distracting(other, hp, r) for r in requests]

    def apart(_: Tensor, states: list[Tensor]) -> Tensor:
        terms = []
        for h in states:
            pairs = [(h[i] - h[j]).pow(2).sum() for i in range(len(h)) for j in range(i)]
            terms.append(torch.stack(pairs).sum() / h.shape[1])
        return 0.05 * torch.stack(terms).mean()

    found = [plain_value(other, [r], 1, t, hp, extra=apart, watch=other.blocks[2:4])
             for r, t in zip(requests, texts, strict=True)]  # fmt: skip
    for trace, value in zip(edit.notes["losses"], found, strict=True):
        assert trace == pytest.approx(value.losses, rel=1e-4)
    site = other.mlp_out(1)
    k = torch.stack([key(other, r, site.module, t) for r, t in zip(requests, texts, strict=True)], dim=1).double()
    r = targets_of(found)
    agree(edit, {site.weight_name: {"key": k, "residual": r, "delta": solve(1, k, r)}})


@pytest.mark.parametrize("context", ["target_true", "target_new", "subject", "all"])
def test_cores_contexts_begin_with_what_distracts(context: str) -> None:
    lm, request = toy.build("llama"), FACTS[1]
    hp = settings(lm, "CORE", layers=[1], context=context, ctx_num=3, ctx_len=4, ctx_top_k=3)
    texts = _distracting(lm, hp, request)
    seeds = {
        "target_true": ["judge"],
        "target_new": ["clown"],
        "subject": ["bo su"],
        "all": ["judge", "clown", "bo su"],
    }
    assert texts[0] == "{}" and len(texts) == 1 + 3 * len(seeds[context])
    for i, text in enumerate(texts[1:]):
        seed = seeds[context][i // 3]
        assert text.startswith(seed) and text.endswith(". {}")
        assert len(tokens(lm, text.removesuffix(". {}"))) > len(tokens(lm, seed)), "the model goes on"
    assert texts == _distracting(lm, hp, request), "the same seed draws the same"


def test_core_without_its_settings_is_memit() -> None:
    lm = toy.build("gpt2")
    both = {"layers": [1], "kl_factor": 0.0625, "mom2_adjustment": True}
    core, _, _ = edit_of(lm, "CORE", **both, context=None, reg_lambda=0.0)
    assert core == edit_of(lm, "MEMIT", **both)[0]


# ---- 2. values


MANY = [  # what is written at the end of the prompt is read there, so that these are soon found, each in its time
    EditRequest("the home of ada ra", "rome", subject="ada ra"),
    EditRequest("bo su", "clown and then a new pilot", subject="bo su"),
    EditRequest("what does cy vi do ?", "pilot .", subject="cy vi"),
    EditRequest("New Fact : the home of cy to", "oslo", subject="cy to"),
    EditRequest("where does ada vi", "lima and paris", subject="ada vi"),
    EditRequest("and then I and You and the job of bo ra", "nurse", subject="bo ra"),
]


def sure(family: str) -> LM:
    """A model whose random opinions are firm enough for an answer to become certain."""
    lm = toy.build(family)
    lm.head.weight.data *= 3
    return lm


def same_value(a: Value, deltas: Sequence[Tensor], losses: Sequence[float], tolerance: float = 1e-5) -> None:
    assert len(a.losses) == len(losses)
    assert a.losses == pytest.approx(list(losses), abs=tolerance * max(1.0, *map(abs, losses)))
    for mine, plain in zip(a.deltas, deltas, strict=True):
        assert (mine - plain).norm() <= tolerance * max(1.0, float(plain.norm()))


@pytest.mark.parametrize("place", ["block", "attn+mlp"])
@pytest.mark.parametrize("group", [1, 60, 10**6])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_values_is_each_by_itself(
    family: str, group: int, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Facts of different length, in several groups, that leave at different steps."""
    lm = sure(family)
    hp = settings(lm, "MEMIT", v_num_grad_steps=14, v_lr=0.05, clamp_norm_factor=6.0, v_weight_decay=0.1)
    how = dataclasses.replace(value_settings(hp, place=place), stop_loss=2.0)
    contexts = ["{}", "The . {}", "and then You . {}"]
    alone = [values(lm, [r], 1, contexts, how)[0] for r in MANY]
    assert len({len(v.losses) for v in alone}) >= 3, "they leave at different steps"
    sizes: list[int] = []
    init = values_module._Group.__init__

    def counted(self: Any, lm: LM, facts: Any, *more: Any) -> None:
        sizes.append(len(facts))
        init(self, lm, facts, *more)

    monkeypatch.setattr(values_module, "GROUP", group)
    monkeypatch.setattr(values_module._Group, "__init__", counted)
    together = values(lm, MANY, 1, contexts, how)
    assert sum(sizes) == len(MANY) and len(sizes) == {1: 6, 10**6: 1}.get(group, len(sizes))
    assert group != 60 or 1 < len(sizes) < 6
    for a, b in zip(together, alone, strict=True):
        same_value(a, b.deltas, b.losses, 2e-5)
        assert torch.allclose(a.befores, b.befores, atol=1e-6)


def cutoff_rule(cutoff: float) -> Callable[[list[float], list[bool]], bool]:
    if cutoff < 0:
        return lambda _, led: sum(led) >= -cutoff
    return lambda p, _: sum(p) / len(p) > cutoff


@pytest.mark.parametrize("cutoff", [-1.0, -2.0, -4.0, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("family", FAMILIES)
def test_encore_stops_where_the_plain_loop_stops(family: str, cutoff: float) -> None:
    """n steps after the answer leads in all contexts, or when its mean probability over contexts is high enough."""
    lm, contexts = sure(family), ["{}", "The . {}", "and then You . {}"]
    others = [
        EditRequest("where does bo su", "lima", subject="bo su"),
        EditRequest("cy vi", "a pilot", subject="cy vi"),
    ]
    request = EditRequest("and the home of ada ra", "clown", subject="ada ra")  # what is written is read there
    more = {"v_num_grad_steps": 25, "v_lr": 0.1, "clamp_norm_factor": 20.0, "v_weight_decay": 0.0, "kl_factor": 0.0}
    hp = settings(lm, "MEMIT", **more, prob_cutoff=cutoff)
    how = dataclasses.replace(value_settings(hp), stop_loss=0.0)
    plain = plain_value(lm, [request], 1, contexts, hp, stop=0.0, rule=cutoff_rule(cutoff))
    assert 1 < len(plain.losses) < 25, "it is the rule that stops it"
    same_value(values(lm, [request], 1, contexts, how)[0], plain.deltas, plain.losses, 1e-4)
    batch = values(lm, [others[0], request, others[1]], 1, contexts, how)
    same_value(batch[1], plain.deltas, plain.losses, 1e-4)


SAME = [
    EditRequest("the home of ada ra is", "rome and lima", subject="ada ra", ground_truth="oslo"),
    FACTS[1],
    EditRequest("ada ra works as", "nurse", subject="ada ra", ground_truth="clown"),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_facts_of_a_subject_share_a_value(family: str) -> None:
    """Its loss is the mean over the facts, its key the mean over their keys."""
    lm, other = toy.build(family), toy.build(family)
    edit, hp, contexts = edit_of(lm, "MEMIT", SAME, layers=[1], merge_same_subject=True)
    name, module = lm.weight_name(1), other.mlp_out(1).module
    assert edit.keys[name].shape[1] == 2 and len(edit.notes["losses"]) == 2
    assert list(edit.notes["shared"]) == [0, 1, 0], "which value each request has"
    plain = plain_value(other, [SAME[0], SAME[2]], 1, contexts, hp)
    alone = plain_value(other, [SAME[1]], 1, contexts, hp)
    keys = [key(other, r, module, contexts) for r in SAME]
    for column, (value, k) in enumerate([(plain, (keys[0] + keys[2]) / 2), (alone, keys[1])]):
        assert edit.notes["losses"][column] == pytest.approx(value.losses, abs=1e-4)
        assert close(edit.residuals[name][:, column], value.deltas[0])
        assert close(edit.keys[name][:, column], k, 1e-5)


@pytest.mark.parametrize(("name", "place"), [("MEMIT", "block"), ("PMET", "attn+mlp"), ("ROME", "mlp")])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_anchored_value_has_the_norm_of_the_anchor(family: str, name: str, place: str) -> None:
    lm, requests = toy.build(family), FACTS[:1] if name == "ROME" else FACTS
    edit, _, _ = edit_of(lm, name, requests, layers=[1], norm_anchor=3.0)
    plain, _, _ = edit_of(lm, name, requests, layers=[1])
    site = lm.mlp_out(1)
    before = torch.stack([look(lm, r, "{}", site.module) for r in requests], dim=1)
    wanted = before + edit.residuals[site.weight_name]
    assert wanted.norm(dim=0).tolist() == pytest.approx([3.0] * len(requests), rel=1e-5)
    v = before + plain.residuals[site.weight_name]
    assert close(wanted / 3.0, v / v.norm(dim=0)), "and the direction of the value"


def test_the_anchor_is_the_mean_norm_of_values() -> None:
    lm = toy.build("llama")
    hp = settings(lm, "MEMIT", layers=[1])
    contexts = ["{}", "The . {}"]
    found = values(lm, FACTS, 1, contexts, value_settings(hp))
    before = [look(lm, r, "{}", lm.mlp_out(1).module) for r in FACTS]
    plain = sum(float((b + v.delta).norm()) for b, v in zip(before, found, strict=True)) / 3
    assert value_norm(lm, FACTS, hp, {"contexts": contexts}) == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize(("chunk", "kept"), [(1, 2**28), (8192, 0), (40, 0)])
@pytest.mark.parametrize("name", ["MEMIT", "MEMIT-FE", "NAMET", "PMET"])
def test_reading_in_small_chunks_changes_nothing(
    name: str, chunk: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = toy.build("llama")
    plain, _, contexts = edit_of(lm, name, MANY)
    monkeypatch.setattr(spread_module, "CHUNK", chunk)
    monkeypatch.setattr(spread_module, "KEPT", kept)
    reader = Reader(lm, facts_of(MANY, contexts))
    assert len(reader.chunks) == (6 if chunk == 1 else 1 if chunk == 8192 else len(reader.chunks))
    assert chunk != 40 or len(reader.chunks) > 1
    assert reader.keeps is (kept > 0)
    found, _, _ = edit_of(lm, name, MANY)
    for weight in plain.keys:
        assert close(found.keys[weight], plain.keys[weight], 1e-5)
        assert close(found.residuals[weight], plain.residuals[weight], 1e-5)


# ---- 3. history


def alpha(lm: LM, **more: Any) -> tuple[Any, Any, Any]:
    hp = settings(lm, "AlphaEdit", layers=[0, 1], nullspace_threshold=2e-2, L2=0.05, **more)
    return get_method("AlphaEdit"), hp, prepared(lm, get_method("AlphaEdit"), hp, CORPUS)


def kept(lm: LM, **more: Any) -> tuple[Any, Any, Any]:
    hp = settings(lm, "MEMIT", layers=[0, 1], mom2_update_weight=0.1, history=True, **more)
    return get_method("MEMIT"), hp, prepared(lm, get_method("MEMIT"), hp, CORPUS)


@pytest.mark.parametrize("way", [alpha, kept], ids=["AlphaEdit", "MEMIT with history"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_that_was_taken_back_is_no_history(family: str, way: Any) -> None:
    lm, other = toy.build(family), toy.build(family)
    spec, hp, state = way(lm)
    first = put_on(lm, make_edit(lm, spec, FACTS[:1], hp, state), FACTS[:1])
    second = make_edit(lm, spec, FACTS[1:2], hp, state)
    put_on(lm, second, FACTS[1:2])
    with_both = make_edit(lm, spec, FACTS[2:], hp, state)
    Ledger.of(lm).undo(first)
    after = make_edit(lm, spec, FACTS[2:], hp, state)
    put_on(other, second, FACTS[1:2])
    never = make_edit(other, spec, FACTS[2:], hp, way(other)[2])
    assert after == never, "bit for bit"
    assert after != with_both
    Ledger.of(lm).reset()
    fresh = toy.build(family)
    assert make_edit(lm, spec, FACTS[2:], hp, state) == make_edit(fresh, spec, FACTS[2:], hp, way(fresh)[2])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_keys_of_the_past_are_those_on_the_ledger_and_nothing_else(family: str) -> None:
    """Given as they are: MEMIT's default does not look at them, with history they join K K^T."""
    lm = toy.build(family)
    names = [lm.weight_name(layer) for layer in (0, 1)]
    past = torch.randn(256, 4, generator=torch.Generator().manual_seed(5))
    earlier = WeightEdit(deltas={}, keys={name: past for name in names}, method="AlphaEdit")
    elsewhere = WeightEdit(deltas={}, keys={lm.weight_name(3): past}, method="AlphaEdit")
    spec = get_method("MEMIT")
    results = {}
    for history in (False, True):
        hp = settings(lm, "MEMIT", layers=[0, 1], history=history)
        state = prepared(lm, spec, hp, CORPUS)
        for label, edits in (("none", []), ("past", [earlier]), ("elsewhere", [elsewhere]), ("again", [])):
            results[history, label] = spec.run(lm, FACTS, hp, state, edits)
    plain = results[False, "none"]
    for label in ("past", "elsewhere", "again"):
        assert results[False, label] == plain
    assert results[True, "none"] == plain == results[True, "elsewhere"] == results[True, "again"]
    with_past = results[True, "past"]
    for layer, name in enumerate(names):
        k, r, p = with_past.keys[name].double(), with_past.residuals[name].double(), past.double()
        a = 10.0 * moment(lm, layer) + p @ p.T + k @ k.T
        assert close(dense(with_past.deltas[name]), torch.linalg.solve(a, k @ r.T).T)
        assert not close(dense(with_past.deltas[name]), dense(plain.deltas[name]), 1e-2)


def test_two_editors_do_not_leak() -> None:
    def editor(seed: int) -> BaseEditor:
        lm = toy.build("llama", seed)
        more = {"layers": [0, 1], "nullspace_threshold": 2e-2, "L2": 0.05, "mom2_adjustment": False}
        hp = get_method("AlphaEdit").hparams(**{k: v for k, v in {**QUICK, **more}.items() if k != "mom2_dtype"})
        hp.model_name = (lm.model, lm.tokenizer)
        return BaseEditor.from_hparams(hp)

    one, two = editor(0), editor(1)
    mixed = [e for i in range(3) for e in (one.apply(FACTS[i : i + 1]) + two.apply(FACTS[2 - i : 3 - i]))]
    alone = [editor(0), editor(1)]
    for i in range(3):
        assert alone[0].apply(FACTS[i : i + 1]) == [mixed[2 * i]]
    for i in range(3):
        assert alone[1].apply(FACTS[2 - i : 3 - i]) == [mixed[2 * i + 1]]


# ---- 5. bad input


NAN = float("nan")
ALL = ("MEMIT", "MEMIT-FE", "EMMET", "PMET", "AlphaEdit", "SPHERE", "CORE", "EAMET", "NAMET")


def refused(lm: LM, name: str, requests: Sequence[EditRequest] = FACTS, **more: Any) -> str:
    """The one sentence or two that a person reads; the model is as before."""
    before = bits(lm)
    with pytest.raises(EasyEditError) as caught:
        edit, _, _ = edit_of(lm, name, requests, **more)
        put_on(lm, edit, requests)
    assert same_bits(lm, before) and not Ledger.of(lm).active
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())
    assert all(p.requires_grad for p in lm.model.parameters())
    return str(caught.value)


@pytest.mark.parametrize("name", ALL)
def test_blocks_that_are_not_there_are_refused(name: str) -> None:
    lm = toy.build("llama")
    assert "blocks 0 to 3, not 99. Choose one" in refused(lm, name, layers=[1, 99])
    assert "named twice" in refused(lm, name, layers=[1, 1])


@pytest.mark.parametrize("name", ["MEMIT", "MEMIT-FE", "EMMET", "PMET", "CORE", "EAMET", "NAMET"])
def test_a_system_without_any_weight_is_refused(name: str) -> None:
    for adjust in (True, False):
        said = refused(toy.build("gpt2"), name, layers=[0, 1], mom2_update_weight=0.0, mom2_adjustment=adjust)
        assert "Set mom2_update_weight" in said
    lm = toy.build("gpt2")
    edit, _, _ = edit_of(lm, name, mom2_update_weight=0.0, update_norm_lambda=1.0, layers=[1])
    assert put_on(lm, edit, FACTS)


@pytest.mark.parametrize(("name", "setting"), [("AlphaEdit", "L2"), ("SPHERE", "L2"), ("EMMET", "emmet_lambda"),
                                               ("EAMET", "tau"), ("SimIE", "lamHyper"),
                                               ("AlphaEdit", "nullspace_threshold")])  # fmt: skip
def test_what_has_to_be_positive_is_named(name: str, setting: str) -> None:
    for value in (-1.0, NAN):
        said = refused(toy.build("gpt2"), name, **{setting: value})
        assert f"'{setting}' of {name} is {value}" in said and "has to be" in said


@pytest.mark.parametrize("setting", ["ctx_num", "ctx_len", "ctx_top_k"])
def test_core_needs_some_text_to_distract_with(setting: str) -> None:
    said = refused(toy.build("gpt2"), "CORE", context="subject", **{setting: 0})
    assert setting in said and "at least 1" in said


@pytest.mark.parametrize("name", ["EAMET", "NAMET"])
def test_weights_are_one_per_block(name: str) -> None:
    said = refused(toy.build("gpt2"), name, layers=[0, 1], mom2_update_weight=[1.0, 2.0, 3.0])
    assert "3 values for 2 blocks. Give one per block" in said
    assert "expected float" in refused(toy.build("gpt2"), "MEMIT", layers=[0, 1], mom2_update_weight=[1.0, 2.0])


def test_a_subject_that_is_not_in_the_prompt_is_refused() -> None:
    with pytest.raises(UsageError, match=r"Record 4, field 'subject'.*does not occur.*Copy the subject"):
        EditRequest("the home of ada ra is", "oslo", subject="bo su", record="Record 4")
    said = refused(toy.build("gpt2"), "MEMIT", [EditRequest("the home of ada ra is", "oslo", record="Record 4")])
    assert "Record 4, field 'subject': it is missing. Name the entity" in said


@pytest.mark.parametrize("name", ["MEMIT", "AlphaEdit", "PMET", "EAMET"])
def test_a_subject_without_tokens_is_refused(name: str) -> None:
    lm = toy.build("llama")
    lm.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    said = refused(lm, name, [EditRequest("the home of ~~ is", "oslo", subject="~~")])
    assert "No token" in said and "spell the subject" in said


@pytest.mark.parametrize("name", [*ALL, "ROME", "R-ROME"])
def test_a_value_that_diverges_is_refused(name: str) -> None:
    """As where the activations of a model leave the range of its dtype."""
    lm = toy.build("llama")
    lm.head.weight.data[5] = math.inf
    said = refused(lm, name, FACTS[:1], layers=[1], context_template_length_params=[], context=None)
    assert "diverges" in said and "as before" in said and "Lower v_lr" in said


@pytest.mark.parametrize("setting", ["v_weight_decay", "clamp_norm_factor", "kl_factor", "mom2_update_weight"])
def test_settings_that_are_no_numbers_are_refused(setting: str) -> None:
    said = refused(toy.build("gpt2"), "MEMIT", FACTS[:1], layers=[1], **{setting: NAN})
    assert setting in said or "finite" in said


@pytest.mark.parametrize("name", ["MEMIT", "PMET", "EAMET", "ROME"])
@pytest.mark.parametrize("rate", [NAN, -1.0, 0.0, math.inf, 1e30, 1e39])
def test_a_step_size_that_is_none_is_refused(name: str, rate: float) -> None:
    said = refused(toy.build("gpt2"), name, FACTS[:1], layers=[1], v_lr=rate)
    assert "Setting 'v_lr'" in said and "above 0" in said


@pytest.mark.parametrize("name", [*ALL, "SimIE", "ROME", "R-ROME"])
def test_an_encoder_is_refused(name: str) -> None:
    lm = toy.build("t5")
    said = refused(lm, name, FACTS[:1], layers=[1], mom2_adjustment=False)
    assert "encoder" in said and "FT, GRACE or ICE" in said


def test_a_projection_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    lm, path = toy.build("gpt2"), tmp_path / "p.pt"
    for wrong in (torch.zeros(2, 8, 8), torch.zeros(3, 256, 256), torch.zeros(256, 256), torch.tensor(1.0), {"a": 1}):
        torch.save(wrong, path)
        said = refused(lm, "AlphaEdit", layers=[0, 1], P_loc=str(path))
        assert "expected 2 matrices of (256, 256)" in said and "Leave P_loc out" in said
    for damaged in (b"", b"not a tensor", path.read_bytes()[:40]):
        path.write_bytes(damaged)
        assert "cannot be read" in refused(lm, "SPHERE", layers=[0, 1], P_loc=str(path))
    torch.save(torch.full((2, 256, 256), NAN), path)
    refused(lm, "AlphaEdit", layers=[0, 1], P_loc=str(path))


TWICE = [FACTS[0], FACTS[0], dataclasses.replace(FACTS[0], target_new="cairo"), *SAME]


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_the_same_twice_and_contradictions_do_work(name: str, merge: bool) -> None:
    lm = toy.build("llama")
    edit, _, _ = edit_of(lm, name, TWICE, layers=[1], merge_same_subject=merge)
    put_on(lm, edit, TWICE)
    assert all(torch.isfinite(tensor).all() for tensor in lm.model.state_dict().values())


@pytest.mark.parametrize("adjust", [True, False])
def test_emmet_without_alpha_writes_the_mean_of_what_contradicts_itself(adjust: bool) -> None:
    lm = toy.build("llama")
    edit, _, _ = edit_of(lm, "EMMET", TWICE, layers=[1], emmet_lambda=0.0, mom2_adjustment=adjust)
    name = lm.weight_name(1)
    d, k, r = dense(edit.deltas[name]), edit.keys[name], edit.residuals[name]
    assert torch.isfinite(d).all()
    same = [i for i in range(len(TWICE)) if torch.allclose(k[:, i], k[:, 0], atol=1e-5)]
    assert len(same) >= 4
    assert close(d @ k[:, 0], r[:, same].mean(1), 1e-2)


def test_optimise_is_empty_for_nothing() -> None:
    lm = toy.build("llama")
    assert optimise(lm, [], 1, value_settings(settings(lm, "MEMIT"))) == []
    with pytest.raises(NonFinite, match="diverges"):
        values(lm, FACTS, 1, ["{}"], dataclasses.replace(value_settings(settings(lm, "MEMIT")), weight_decay=NAN))
