"""The equations of the papers against plain computations: what is solved, collected, trained and remembered."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import toy
from easyeditor.core.keys import keys
from easyeditor.core.learn import descend
from easyeditor.core.likelihood import Answers, answers, mean_per_row, token_log_probs
from easyeditor.core.memory import Codebook, Entry
from easyeditor.core.solve import cholesky, equality
from easyeditor.core.stats import second_moments
from easyeditor.core.values import ValueSettings, values
from easyeditor.editors.perform import make_edit, prepared, put_on
from easyeditor.edits.delta import dense
from easyeditor.edits.edit import WeightEdit
from easyeditor.edits.ledger import Ledger, applied
from easyeditor.errors import NonFinite, UsageError
from easyeditor.hparams import complete
from easyeditor.lm.generate import answer
from easyeditor.lm.hooks import capture
from easyeditor.lm.model import LM
from easyeditor.methods.ft import FTHyperParams
from easyeditor.methods.grace import GraceHyperParams
from easyeditor.methods.rome import ROMEHyperParams
from easyeditor.registry import get_method
from easyeditor.requests import EditRequest

CORPUS = toy.corpus()


def loss(lm: LM, batch: Answers) -> Tensor:
    return -mean_per_row(token_log_probs(lm, batch), batch).mean()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment_of(width: int, samples: int, seed: int = 5) -> Tensor:
    found = draw(samples, width, seed=seed)
    return found.T @ found / samples


def rome_settings(**more: Any) -> ROMEHyperParams:
    given = {"layers": [1], "v_num_grad_steps": 8, "context_template_length_params": [[2, 3]], **more}
    return ROMEHyperParams(**given)


def rome(lm: LM, request: EditRequest, **more: Any) -> WeightEdit:
    spec, hparams = get_method("ROME"), complete(rome_settings(**more), lm)
    edit = make_edit(lm, spec, [request], hparams, prepared(lm, spec, hparams, CORPUS))
    assert isinstance(edit, WeightEdit)
    return edit


# ---- ROME


@pytest.mark.parametrize("adjust", [False, True], ids=["C = I", "C from text"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_rome_writes_its_value_at_its_key(family: str, adjust: bool) -> None:
    """W' k* = v* with one and the same k*, through the module itself and through the stored factors."""
    lm, request = toy.build(family), toy.request()
    site = lm.mlp_out(1)
    edit = rome(lm, request, mom2_adjustment=adjust)
    k, residual = edit.keys[site.weight_name], edit.residuals[site.weight_name]
    assert (k.shape, residual.shape) == ((site.d_in, 1), (site.d_out, 1))
    assert edit.deltas[site.weight_name].rank == 1
    assert residual.norm() > 0.1
    with torch.no_grad():
        before = site.module(k.T)
        with applied(lm, edit):
            error = (site.module(k.T) - (before + residual.T)).norm() / residual.norm()
    assert error < 1e-4
    change = dense(edit.deltas[site.weight_name])
    assert (change @ k - residual).norm() / residual.norm() < 1e-4


def test_rome_takes_key_and_value_where_the_paper_does() -> None:
    """k* is the mean over contexts of what the projection takes in at the subject's last token; v* belongs there."""
    lm, request = toy.build("gpt2"), toy.request()
    site = lm.mlp_out(1)
    edit = rome(lm, request)
    contexts = edit.notes["contexts"]
    assert contexts[0] == "{}"
    assert len(contexts) == 4
    found = []
    for context in contexts:
        ids = lm.text.encode(context.replace("{}", request.prompt)).ids
        last = max(i for i, token in enumerate(ids) if lm.tokenizer.decode([token]) == request.subject.split()[-1])
        with torch.no_grad(), capture(site.module, "input") as seen:
            lm.model(torch.tensor([ids]))
        found.append(seen[0][0, last])
    plain = torch.stack(found).mean(0)
    assert torch.allclose(edit.keys[site.weight_name][:, 0], plain, atol=1e-5)
    hp = complete(rome_settings(), lm)
    settings = ValueSettings(hp.v_num_grad_steps, hp.v_lr, hp.v_weight_decay, hp.clamp_norm_factor, hp.kl_factor)
    delta = values(lm, [request], 1, contexts, settings)[0].delta
    assert torch.allclose(edit.residuals[site.weight_name][:, 0], delta, atol=1e-6)
    assert keys(lm, request, [site], contexts)[site.weight_name].shape == (4, site.d_in)


def test_the_second_moment_makes_a_difference() -> None:
    lm, request = toy.build("gpt2"), toy.request()
    name = lm.weight_name(1)
    plain, adjusted = rome(lm, request), rome(lm, request, mom2_adjustment=True)
    assert torch.equal(plain.keys[name], adjusted.keys[name])
    assert torch.equal(plain.residuals[name], adjusted.residuals[name])
    assert not torch.allclose(dense(plain.deltas[name]), dense(adjusted.deltas[name]), rtol=0.1)


def test_rome_with_the_second_moment_is_the_formula_written_out() -> None:
    lm, request = toy.build("llama"), toy.request()
    name = lm.weight_name(1)
    edit = rome(lm, request, mom2_adjustment=True)
    moment = second_moments(lm, [lm.mlp_out(1)], CORPUS)[name].matrix.double()
    k, r = edit.keys[name].double(), edit.residuals[name].double()
    u = torch.linalg.solve(moment + 1e-10 * moment.diagonal().mean() * torch.eye(len(moment)), k)
    expected = r @ u.T / (u.T @ k)
    assert (dense(edit.deltas[name]).double() - expected).norm() / expected.norm() < 1e-3


def test_rome_edits_one_block() -> None:
    with pytest.raises(UsageError, match=r"of ROME is .* It edits one block"):
        rome(toy.build("gpt2"), toy.request(), layers=[1, 2])


# ---- the solver


@pytest.mark.parametrize("n", [1, 3, 7])
@pytest.mark.parametrize("weighted", [False, True], ids=["C = I", "C"])
def test_equality_adds_the_residuals_at_the_keys(n: int, weighted: bool) -> None:
    k, r = draw(20, n), draw(8, n, seed=1)
    delta = equality(k.float(), r.float(), moment_of(20, 60) if weighted else None)
    assert (delta.shape, delta.rank) == ((8, 20), n)
    assert torch.allclose(dense(delta) @ k.float(), r.float(), atol=1e-4)


@pytest.mark.parametrize("n", [1, 4])
def test_equality_is_the_smallest_change_in_the_metric_of_the_moment(n: int) -> None:
    """Whatever is added without moving the keys makes tr(D C D^T) larger."""
    k, r, c = draw(20, n), draw(8, n, seed=1), moment_of(20, 60)
    for moment, metric in ((c, c), (None, torch.eye(20, dtype=torch.float64))):
        change = dense(equality(k, r, moment)).double()
        size = (change @ metric @ change.T).trace()
        off = torch.eye(20, dtype=torch.float64) - k @ torch.linalg.pinv(k)
        for seed in range(5):
            other = change + 0.3 * draw(8, 20, seed=seed) @ off
            assert torch.allclose(other @ k, change @ k, atol=1e-5)
            assert (other @ metric @ other.T).trace() > size + 1e-3


def test_equality_with_one_key_is_romes_formula() -> None:
    k, r, c = draw(20, 1), draw(8, 1, seed=1), moment_of(20, 60)
    u = torch.linalg.inv(c) @ k
    expected = r @ u.T / (u.T @ k)
    assert torch.allclose(dense(equality(k, r, c)).double(), expected, rtol=1e-5, atol=1e-7)
    assert torch.allclose(dense(equality(k, r)).double(), r @ k.T / (k.T @ k), rtol=1e-5, atol=1e-7)


def test_equality_with_several_keys_is_emmets_formula() -> None:
    k, r, c = draw(20, 5), draw(8, 5, seed=1), moment_of(20, 60)
    inverse = torch.linalg.inv(c)
    expected = r @ torch.linalg.inv(k.T @ inverse @ k) @ k.T @ inverse
    assert torch.allclose(dense(equality(k, r, c)).double(), expected, rtol=1e-4, atol=1e-6)


def test_the_scale_of_the_moment_does_not_matter() -> None:
    k, r, c = draw(20, 2), draw(8, 2, seed=1), moment_of(20, 60)
    expected = dense(equality(k, r, c))
    for factor in (1e-8, 1e8):
        assert torch.allclose(dense(equality(k, r, c * factor)), expected, rtol=1e-4, atol=1e-6)


def test_solving_with_a_definite_matrix() -> None:
    c, right = moment_of(20, 60), draw(20, 3)
    assert torch.allclose(torch.cholesky_solve(right, cholesky(c)), torch.linalg.solve(c, right), rtol=1e-6)


@pytest.mark.parametrize("rank", [1, 10])
def test_solving_with_a_singular_matrix(rank: int) -> None:
    """Fewer tokens than dimensions: the solution is finite, exact where C is not zero, and the keys are still hit."""
    basis = draw(20, rank, seed=4)
    c = basis @ basis.T
    found = torch.cholesky_solve(draw(20, 3), cholesky(c))
    assert torch.isfinite(found).all()
    right = c @ draw(20, 2, seed=6)
    assert torch.allclose(c @ torch.cholesky_solve(right, cholesky(c)), right, atol=1e-6)
    k, r = draw(20, 2, seed=7).float(), draw(8, 2, seed=8).float()
    assert torch.allclose(dense(equality(k, r, c)) @ k, r, atol=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_moment_that_is_not_finite_is_refused(bad: float) -> None:
    c = moment_of(20, 60)
    c[3, 3] = bad
    with pytest.raises(NonFinite, match="second moment"):
        cholesky(c)


# ---- descent


def test_independent_problems_stop_by_themselves() -> None:
    """Each problem goes as it would alone, and stands still once it is solved."""
    goal = torch.tensor([0.0, 1.0, 4.0])
    together = torch.zeros(3, 1)
    trace = descend(
        [together], lambda: (together[:, 0] - goal).square(), steps=40, lr=0.1, stop_below=0.01, final_update=False
    )
    assert trace[0] == [0.0, 1.0, 16.0]
    assert float(together[0]) == 0.0
    assert float((together[1] - 1.0).square()) < 0.01
    for i in range(3):
        alone = torch.zeros(1, 1)
        descend([alone], lambda i=i, x=alone: (x[:, 0] - goal[i]).square(), steps=40, lr=0.1, stop_below=0.01)  # type: ignore[misc]
        assert torch.allclose(alone[0], together[i], atol=1e-5)
    assert not together.requires_grad


def test_so_many_forward_passes_and_one_update_less() -> None:
    for final, updates in ((False, 4), (True, 5)):
        x, seen = torch.zeros(1), []
        trace = descend([x], lambda x=x: (x - 9.0).square(), steps=5, lr=0.1, final_update=final,  # type: ignore[misc]
                        project=lambda x=x, seen=seen: seen.append(float(x)))  # type: ignore[misc]  # fmt: skip
        assert (len(trace), len(seen)) == (5, updates)


# ---- FT


def batch_of(lm: LM, requests: list[EditRequest], **more: bool) -> Any:
    return answers(lm, [(r.prompt, r.target_new) for r in requests], **more)


LONG = [
    EditRequest("the home of ada ra is", "oslo"),
    EditRequest("where does bo su live ?", "rome and then lima . you and I"),
    EditRequest("cy vi works as", "a new pilot"),
]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "opt"])
def test_the_loss_is_the_shifted_cross_entropy_over_the_answer(family: str) -> None:
    """As transformers computes it from labels in which all but the answer is masked: mean per sample, then batch."""
    lm, plain = toy.build(family), []
    for request in LONG:
        start = lm.tokenizer(request.prompt)["input_ids"]
        whole = lm.tokenizer(f"{request.prompt} {request.target_new}")["input_ids"]
        assert whole[: len(start)] == start
        labels = torch.tensor([[-100] * len(start) + whole[len(start) :]])
        with torch.no_grad():
            plain.append(lm.model(input_ids=torch.tensor([whole]), labels=labels).loss)
    with torch.no_grad():
        assert abs(float(loss(lm, batch_of(lm, LONG)) - torch.stack(plain).mean())) < 1e-5
        assert abs(float(loss(lm, batch_of(lm, LONG[1:2])) - plain[1])) < 1e-5


def test_the_loss_of_an_encoder_decoder() -> None:
    lm, plain = toy.build("t5"), []
    for request in LONG:
        source, labels = (lm.tokenizer(text, return_tensors="pt")["input_ids"] for text in
                          (request.prompt, request.target_new))  # fmt: skip
        with torch.no_grad():
            plain.append(lm.model(input_ids=source, labels=labels).loss)
    with torch.no_grad():
        assert abs(float(loss(lm, batch_of(lm, LONG)) - torch.stack(plain).mean())) < 1e-5


def test_ft_l_reads_all_tokens_at_the_prompts_last_position() -> None:
    lm, plain = toy.build("llama"), []
    for request in LONG:
        ids = torch.tensor([lm.text.encode(request.prompt).ids])
        told = lm.tokenizer(request.target_new, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            plain.append(-lm.model(ids).logits[0, -1].log_softmax(-1)[told].mean())
    batch = batch_of(lm, LONG, at_prompt_end=True)
    with torch.no_grad():
        assert abs(float(loss(lm, batch) - torch.stack(plain).mean())) < 1e-5
    assert batch.ids.shape[1] == max(len(lm.text.encode(r.prompt).ids) for r in LONG), "no answer is read"


def ft(lm: LM, requests: list[EditRequest], **more: Any) -> WeightEdit:
    hparams = complete(FTHyperParams(**{"layers": [1], "lr": 5e-3, "batch_size": 8, **more}), lm)
    edit = make_edit(lm, get_method("FT"), requests, hparams, {})
    assert isinstance(edit, WeightEdit)
    return edit


@pytest.mark.parametrize("objective", ["target_new", "prompt_last"])
@pytest.mark.parametrize("layers", [[0], [2, 1]])
def test_ft_is_adam_on_the_weight(objective: str, layers: list[int]) -> None:
    """The same as changing the model's own weights by torch's Adam under the plain loss."""
    lm, other = toy.build("llama"), toy.build("llama")
    edit = ft(lm, LONG, layers=layers, objective_optimization=objective, num_steps=4, weight_decay=0.01)
    weights = [other.mlp_out(i).weight for i in sorted(layers)]
    before = [w.detach().clone() for w in weights]
    adam = torch.optim.Adam(weights, lr=5e-3, weight_decay=0.01)
    for _ in range(4):
        adam.zero_grad()
        loss(other, batch_of(other, LONG, at_prompt_end=objective == "prompt_last")).backward()
        adam.step()
    for name, weight, old in zip(edit.deltas, weights, before, strict=True):
        change = (weight - old).detach()
        assert (dense(edit.deltas[name]) - change).abs().max() < 2e-4
        assert change.abs().max() > 1e-2
    assert len(edit.notes["losses"]) == 4


@pytest.mark.parametrize("bound", [1e-3, 5e-2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_no_weight_moves_further_than_the_bound(bound: float, dtype: torch.dtype) -> None:
    lm = toy.build("gpt2")
    lm.model.to(dtype)
    edit = ft(lm, LONG, norm_constraint=bound, num_steps=12, layers=[1, 2])
    for delta in edit.deltas.values():
        change = dense(delta)
        assert float(change.abs().max()) <= float(torch.tensor(bound))
        assert (change.abs() == torch.tensor(bound)).any() or bound > 1e-2, "the bound was met"


def test_ft_stops_when_the_loss_is_small() -> None:
    lm, requests = toy.taught("llama"), [toy.request(), toy.request(5)]
    edit = ft(lm, requests, lr=2e-3, num_steps=200)
    losses = edit.notes["losses"]
    assert 2 < len(losses) < 200
    assert losses[-1] < 1e-2 <= min(losses[:-1])
    with applied(lm, edit), torch.no_grad():
        assert abs(float(loss(lm, batch_of(lm, requests))) - losses[-1]) < 1e-4


def test_ft_in_batches_takes_a_step_for_each() -> None:
    lm = toy.build("llama")
    whole, parts = ft(lm, LONG, num_steps=3, batch_size=8), ft(lm, LONG, num_steps=3, batch_size=2)
    assert len(whole.notes["losses"]) == len(parts.notes["losses"]) == 3
    assert whole != parts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_ft_in_half_precision(dtype: torch.dtype) -> None:
    """The change is a tensor in fp32: steps too small for the weight's own precision add up."""
    lm = toy.taught("llama", dtype)
    request = toy.request()
    assert answer(lm, [request.prompt], 4) == [request.ground_truth]
    edit = ft(lm, [request], lr=1e-3, num_steps=60)
    (delta,) = edit.deltas.values()
    assert dense(delta).dtype == delta.tensors()["matrix"].dtype == torch.float32
    assert lm.mlp_out(1).weight.dtype == dtype
    put_on(lm, edit, [request])
    assert answer(lm, [request.prompt], 4) == [request.target_new]


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [("objective_optimization", "promptz_last", "'target_new'"), ("norm_constraint", True, "largest change"),
     ("layers", [9], "blocks 0 to 3")],
)  # fmt: skip
def test_ft_refuses_settings_that_mean_nothing(setting: str, value: Any, said: str) -> None:
    with pytest.raises(UsageError, match=f"'{setting}'.*{said}"):
        ft(toy.build("llama"), LONG[:1], **{setting: value})


# ---- memories


def entry(key: list[float], value: float = 1.0, label: str = "a", radius: float = 1.0, **more: Any) -> Entry:
    return Entry(torch.tensor(key), torch.full((2,), value), label, radius, **more)


def ask(book: Codebook, *points: list[float]) -> list[float]:
    """What each point alone gets; 0 where the module's own output stays."""
    return [float(book(torch.tensor([[p]]), torch.zeros(1, 1, 2))[0, 0, 0]) for p in points]


def test_a_ball_holds_what_is_near() -> None:
    book = Codebook.of([entry([0.0, 0.0], 5.0)])
    assert ask(book, [0.0, 0.0], [0.9, 0.0], [0.0, -1.0], [1.1, 0.0], [0.8, 0.8]) == [5.0, 5.0, 5.0, 0.0, 0.0]


def test_a_distant_key_gets_a_new_ball() -> None:
    book = Codebook.of([entry([0.0, 0.0], 5.0), entry([3.0, 0.0], 7.0, "b")])
    assert book.radii.tolist() == [1.0, 1.0]
    assert book.labels == ["a", "b"]
    assert ask(book, [0.5, 0.0], [1.5, 0.0], [2.5, 0.0]) == [5.0, 0.0, 7.0]


def test_the_same_answer_grows_its_ball() -> None:
    book = Codebook.of([entry([0.0, 0.0], 5.0), entry([1.5, 0.0], 7.0)])
    assert len(book.keys) == 1
    assert book.radii.tolist() == [1.5]
    assert book.keys.tolist() == [[0.0, 0.0]]
    assert ask(book, [1.5, 0.0], [-1.4, 0.0], [1.6, 0.0]) == [7.0, 7.0, 0.0], "with the value that was trained last"
    inside = Codebook.of([entry([0.0, 0.0], 5.0), entry([0.5, 0.0], 7.0)])
    assert inside.radii.tolist() == [1.0], "a key inside needs no more room"


def test_the_same_answer_moves_its_ball() -> None:
    book = Codebook.of(
        [entry([0.0, 0.0], 5.0, expand="moving_average"), entry([1.5, 0.0], 7.0, expand="moving_average")]
    )
    assert book.keys.tolist() == [[0.75, 0.0]]
    assert ask(book, [0.0, 0.0], [1.5, 0.0]) == [7.0, 7.0]


def test_different_answers_split_their_balls() -> None:
    book = Codebook.of([entry([0.0, 0.0], 5.0), entry([1.0, 0.0], 7.0, "b")])
    assert len(book.keys) == 2
    assert book.radii[0] < 0.5
    assert float(book.radii[1]) == 0.5
    assert ask(book, [0.0, 0.0], [0.4, 0.0], [0.51, 0.0], [0.6, 0.0], [1.0, 0.0]) == [5.0, 5.0, 7.0, 7.0, 7.0]
    assert ask(book, [-0.6, 0.0]) == [0.0], "both balls are smaller"


def test_at_one_key_the_newer_answer_holds() -> None:
    first, second = entry([0.3, 0.0], 5.0), entry([0.3, 0.0], 7.0, "b")
    assert ask(Codebook.of([first, second]), [0.3, 0.0], [1.2, 0.0]) == [7.0, 7.0]
    assert ask(Codebook.of([second, first]), [0.3, 0.0]) == [5.0]
    assert ask(Codebook.of([first, second, first]), [0.3, 0.0]) == [5.0]


def test_every_key_keeps_its_answer_in_a_crowd() -> None:
    """Fifty keys with four answers: whatever splits and grows, the last word on a key is not lost to another answer."""
    points = draw(50, 2, seed=3).float()
    found = [Entry(p, torch.full((2,), float(i % 4 + 1)), str(i % 4), 1.0) for i, p in enumerate(points)]
    book = Codebook.of(found)
    said = ask(book, points[-1].tolist())
    assert said == [float(49 % 4 + 1)]
    assert all(label == str(int(value[0]) - 1) for label, value in zip(book.labels, book.values, strict=True))


def test_the_distance_may_be_that_of_directions() -> None:
    book = Codebook.of([entry([1.0, 0.0], 5.0, radius=0.1, distance="cos")])
    assert ask(book, [9.0, 0.0], [9.0, 1.0], [0.0, 1.0], [-1.0, 0.0]) == [5.0, 5.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("replacement", "changed"),
    [("replace_last", [[0, 0, 1, 0, 0], [0, 0, 0, 0, 0], [1, 0, 0, 1, 0]]),
     ("replace_prompt", [[1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0]]),
     ("replace_all", [[1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])],
)  # fmt: skip
def test_where_the_value_stands(replacement: str, changed: list[list[int]]) -> None:
    book = Codebook.of([entry([0.0, 0.0], 5.0, replacement=replacement)])
    states = torch.full((3, 5, 2), 9.0)
    states[0, 2] = states[2, 0] = states[2, 3] = 0.0
    out = book(states, torch.zeros(3, 5, 2))
    assert torch.equal(out, 5.0 * torch.tensor(changed)[..., None].expand(3, 5, 2))


def test_the_output_is_untouched_far_from_all_keys() -> None:
    book, output = Codebook.of([entry([0.0, 0.0])]), torch.randn(2, 3, 2).half()
    assert book(torch.full((2, 3, 2), 9.0), output) is output
    flat = book(torch.zeros(6, 2), output.reshape(6, 2))
    assert flat.dtype == torch.float16
    assert torch.equal(flat, torch.ones(6, 2).half())


def test_what_an_entry_says_of_itself_makes_it_again() -> None:
    one = entry([1.0, 2.0], 3.0, "b", 0.5, distance="cos", expand="moving_average", replacement="replace_all")
    assert one.restore(one.tensors(), one.config()).config() == one.config()


def grace_settings(lm: LM, **more: Any) -> GraceHyperParams:
    given = {"inner_params": [lm.weight_name(2)], "n_iter": 60, "eps": 0.1, **more}
    return complete(GraceHyperParams(**given), lm)


def test_grace_in_sequence_keeps_all() -> None:
    lm, spec = toy.taught("llama"), get_method("GRACE")
    requests = [toy.request(i, relation) for i in range(0, 12, 2) for relation in ("home", "job")]
    prompts = [r.prompt for r in requests]
    assert answer(lm, prompts, 4) == [r.ground_truth for r in requests]
    others = [(p, a) for p, s, a in toy.prompts() if s not in {r.subject for r in requests}]
    hparams = grace_settings(lm)
    for request in requests:
        put_on(lm, make_edit(lm, spec, [request], hparams, {}), [request])
    assert answer(lm, prompts, 4) == [r.target_new for r in requests]
    kept = answer(lm, [p for p, _ in others], 4, 64)
    assert sum(a == b for a, (_, b) in zip(kept, others, strict=True)) / len(others) >= 0.95
    ledger = Ledger.of(lm)
    ledger.undo(ledger.active[3].id)
    expected = [r.ground_truth if i == 3 else r.target_new for i, r in enumerate(requests)]
    assert answer(lm, prompts, 4) == expected, "one is taken back, the others stay"


def test_graces_key_is_what_the_projection_takes_in_at_the_prompts_end() -> None:
    lm, request = toy.build("gpt2"), LONG[1]
    edit = make_edit(lm, get_method("GRACE"), [request], grace_settings(lm, n_iter=3), {})
    (found,) = edit.wrappers.values()
    with torch.no_grad(), capture(lm.mlp_out(2).module, "input") as seen:
        lm.model(torch.tensor([lm.text.encode(request.prompt).ids]))
    assert torch.allclose(found.key, seen[0][0, -1], atol=1e-5)
    assert (found.label, found.radius) == (request.target_new, 0.1)


def test_grace_starts_again_from_the_value_of_its_own_ball() -> None:
    lm, spec, request = toy.taught("llama"), get_method("GRACE"), toy.request()
    hparams = grace_settings(lm, n_iter=300)
    first = make_edit(lm, spec, [request], hparams, {})
    put_on(lm, first, [request])
    again = make_edit(lm, spec, [request], hparams, {})
    assert again.notes["losses"][0] < 5e-3 < first.notes["losses"][0]
    assert len(again.notes["losses"]) == 1


def test_the_models_that_are_tested_have_one_and_the_other_projection() -> None:
    from transformers.pytorch_utils import Conv1D

    assert isinstance(toy.build("gpt2").mlp_out(1).module, Conv1D)
    assert isinstance(toy.build("llama").mlp_out(1).module, nn.Linear)
    assert isinstance(toy.build("gpt2").model, transformers.GPT2LMHeadModel)
