"""The solver of the closed-form family: every shortcut against the textbook formula, in fp64."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from easyeditor.core.solve import NullSpace, System, cholesky, equality, null_space, solve, without
from easyeditor.edits.delta import LowRank, dense
from easyeditor.errors import NonFinite, UsageError

D, OUT, N = 48, 20, 7


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(d: int = D, seed: int = 9) -> Tensor:
    a = draw(d, 3 * d, seed=seed)
    return a @ a.T / (3 * d)


def update(delta: LowRank) -> Tensor:
    return delta.left.double() @ delta.right.double().T


def close(a: Tensor, b: Tensor, tolerance: float = 1e-6) -> bool:
    return float((a - b).norm() / b.norm()) <= tolerance


def test_memit_is_regularised_least_squares() -> None:
    c, k, r, weight = moment(), draw(D, N), draw(OUT, N, seed=1), 15.0
    plain = r @ k.T @ torch.linalg.inv(weight * c + k @ k.T)
    found = solve(System(c, weight), k, r)
    assert close(update(found.delta), plain)
    missed = (r - plain @ k).norm() / r.norm()
    assert found.residual == pytest.approx(float(missed), rel=1e-6)


def test_encore_adds_the_weight_of_the_changes_own_size() -> None:
    c, k, r = moment(), draw(D, N), draw(OUT, N, seed=1)
    plain = r @ k.T @ torch.linalg.inv(15.0 * c + 20.0 * torch.eye(D).double() + k @ k.T)
    assert close(update(solve(System(c, 15.0, ridge=20.0), k, r).delta), plain)


def test_emmet_with_one_key_and_alpha_zero_is_rome() -> None:
    c, k, r = moment(), draw(D, 1), draw(OUT, 1, seed=1)
    u = torch.linalg.solve(c, k)
    rome = r @ u.T / (u.T @ k)
    assert close(update(solve(System(c, 1e5), k, r, gamma=0.0).delta), rome)
    assert close(update(equality(k, r, c)), rome)


def test_emmet_is_its_formula() -> None:
    c, k, r, weight, alpha = moment(), draw(D, N), draw(OUT, N, seed=1), 10.0, 0.1
    inverse = torch.linalg.inv(weight * c)
    plain = r @ torch.linalg.inv(k.T @ inverse @ k + alpha * torch.eye(N).double()) @ k.T @ inverse
    assert close(update(solve(System(c, weight), k, r, gamma=alpha).delta), plain)


def test_emmet_with_alpha_is_memit_with_lambda_alpha() -> None:
    c, k, r = moment(), draw(D, N), draw(OUT, N, seed=1)
    emmet = solve(System(c, 1500.0), k, r, gamma=0.1)
    assert close(update(emmet.delta), update(solve(System(c, 150.0), k, r).delta))


def test_memit_tends_to_emmet_as_lambda_goes_to_zero() -> None:
    c, k, r = moment(), draw(D, N), draw(OUT, N, seed=1)
    emmet = update(solve(System(c), k, r, gamma=0.0).delta)
    gaps = [float((update(solve(System(c, weight), k, r).delta) - emmet).norm()) for weight in (1.0, 1e-3, 1e-6)]
    assert gaps[0] > 10 * gaps[1] > 100 * gaps[2]
    assert gaps[2] < 1e-5 * float(emmet.norm())


def test_alphaedit_is_its_formula_with_a_past() -> None:
    c, k, past, r, ridge = moment(), draw(D, N), draw(D, 5, seed=3), draw(OUT, N, seed=1), 10.0
    space = null_space(c, float(torch.linalg.eigvalsh(c)[D // 3]))
    p = space(torch.eye(D).double())
    m = p @ (k @ k.T + past @ past.T) + ridge * torch.eye(D).double()
    plain = torch.linalg.solve(m, p @ k @ r.T).T  # as the authors' code has it
    found = solve(System(None, weight=ridge, project=space, size=D), k, r, past=[past])
    assert close(update(found.delta), plain)


def test_alphaedit_without_projection_and_past_is_memit_with_the_identity() -> None:
    k, r = draw(D, N), draw(OUT, N, seed=1)
    everything = NullSpace(torch.zeros(D, 0).double(), False, 1.0)
    alpha = solve(System(None, weight=10.0, project=everything, size=D), k, r)
    memit = solve(System(torch.eye(D).double(), 10.0), k, r)
    assert close(update(alpha.delta), update(memit.delta))


@pytest.mark.parametrize("cut", [5, 40])
def test_keys_that_text_uses_stay_untouched(cut: int) -> None:
    """The projection is exact whichever of the two bases is stored, and what it projects away does not move."""
    c = moment()
    values, vectors = torch.linalg.eigh(c)
    space = null_space(c, float(values[cut]))
    assert space.share == pytest.approx(cut / D)
    assert space.basis.shape[1] == min(cut, D - cut)
    kept = vectors[:, :cut] @ vectors[:, :cut].T
    assert torch.allclose(space(draw(D, 3)), kept @ draw(D, 3), atol=1e-12)
    found = solve(System(None, weight=10.0, project=space, size=D), draw(D, N), draw(OUT, N, seed=1))
    known = vectors[:, cut:] @ draw(D - cut, 4, seed=8)
    assert (update(found.delta) @ known).abs().max() < 1e-6


def test_what_the_null_space_keeps_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="easyeditor"):
        null_space(moment(), 1e-9, "h.3")
        null_space(moment(), 1e9, "h.3")
        null_space(moment(), float(torch.linalg.eigvalsh(moment())[D // 2 - 1 : D // 2 + 1].mean()), "h.3")
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 2
    assert "keeps 0 %" in warnings[0] and "Raise nullspace_threshold" in warnings[0]
    assert "keeps 100 %" in warnings[1] and "Lower nullspace_threshold" in warnings[1]
    assert "keeps 50.0 % of the spectrum" in caplog.text


@pytest.mark.parametrize("fold", [1, 4, 10, 1000])
@pytest.mark.parametrize("base", ["moment", "identity", "null space"])
def test_a_history_counts_as_if_it_were_in_the_matrix(base: str, fold: int) -> None:
    c, weight = moment(), 12.0
    space = null_space(c, float(torch.linalg.eigvalsh(c)[30])) if base == "null space" else None
    system = System(c if base == "moment" else None, weight, project=space, size=D, fold=fold)
    p = space(torch.eye(D).double()) if space else torch.eye(D).double()
    a = weight * (c if base == "moment" else torch.eye(D).double())
    past: list[Tensor] = []
    for i in range(9):
        k, r = draw(D, 1 + i % 4, seed=20 + i), draw(OUT, 1 + i % 4, seed=40 + i)
        m = a + p @ sum((q @ q.T for q in past), torch.zeros(D, D).double()) @ p + p @ k @ k.T @ p
        plain = r @ k.T @ p @ torch.linalg.inv(m)
        found = solve(system, k, r, past=past)
        assert close(update(found.delta), plain), f"edit {i}"
        fresh = solve(
            System(c if base == "moment" else None, weight, project=space, size=D, fold=fold), k, r, past=past
        )
        assert torch.equal(fresh.delta.left, found.delta.left), "what is kept between calls must not change a bit"
        past.append(k.float() if i % 2 else k)
    for shorter in (past[:4], [*past[:3], *past[4:]], []):  # edits were taken back
        k, r = draw(D, 2, seed=70), draw(OUT, 2, seed=71)
        m = a + p @ sum((q.double() @ q.double().T for q in shorter), torch.zeros(D, D).double()) @ p + p @ k @ k.T @ p
        assert close(update(solve(system, k, r, past=shorter).delta), r @ k.T @ p @ torch.linalg.inv(m))


@pytest.mark.parametrize("gamma", [1.0, 0.1])
@pytest.mark.parametrize("column", [0, 3, N - 1])
def test_a_fact_taken_out_is_a_fact_never_solved_for(column: int, gamma: float) -> None:
    system, k, r = System(moment(), 3.0), draw(D, N).float(), draw(OUT, N, seed=1).float()
    whole = solve(system, k, r, gamma)
    keep = [i for i in range(N) if i != column]
    expected = solve(system, k[:, keep], r[:, keep], gamma)
    delta, residuals, factor = without(whole.delta, r, whole.factor, column)
    assert close(update(delta), update(expected.delta))
    assert torch.equal(residuals, r[:, keep])
    assert torch.allclose(factor, expected.factor, atol=1e-10)
    again, _, _ = without(delta, residuals, factor, 0)
    assert close(update(again), update(solve(system, k[:, keep[1:]], r[:, keep[1:]], gamma).delta))


def test_duplicates_and_same_keys_do_not_break_the_solve() -> None:
    k, r = draw(D, N), draw(OUT, N, seed=1)
    k[:, 1], k[:, 2], r[:, 2] = k[:, 0], k[:, 0], r[:, 0]
    for gamma in (1.0, 0.1):
        found = solve(System(moment(), 2.0), k, r, gamma)
        assert torch.isfinite(update(found.delta)).all()
    exact = solve(System(moment(), 2.0), k, r, gamma=0.0)  # keys that contradict each other get the mean
    hit = update(exact.delta) @ k
    assert torch.allclose(hit[:, 0], r[:, :3].mean(1), atol=1e-3)
    assert torch.allclose(hit[:, 3:], r[:, 3:], atol=1e-3)


def test_the_condition_number_is_that_of_the_system() -> None:
    system, k, r = System(moment(), 0.05), draw(D, N), draw(OUT, N, seed=1)
    found = solve(system, k, r)
    gram = torch.eye(N).double() + k.T @ torch.linalg.inv(0.05 * moment()) @ k
    assert found.condition == pytest.approx(float(torch.linalg.cond(gram)), rel=0.05)


def test_a_system_without_any_weight_is_refused() -> None:
    with pytest.raises(UsageError, match=r"singular.*mom2_update_weight"):
        solve(System(moment(), 0.0), draw(D, N), draw(OUT, N))
    with pytest.raises(UsageError, match=r"singular \(size 48\).*mom2_tokens"):
        cholesky(torch.zeros(D, D).double())
    with pytest.raises(NonFinite, match="bfloat16"):
        solve(System(moment(), 1.0), draw(D, N) * float("nan"), draw(OUT, N))


def test_a_moment_from_too_little_text_still_gives_a_finite_update() -> None:
    few = draw(D, 5, seed=2)
    found = solve(System(few @ few.T, 15.0), draw(D, N), draw(OUT, N, seed=1))
    assert torch.isfinite(update(found.delta)).all()
    assert dense(found.delta).shape == (OUT, D)
