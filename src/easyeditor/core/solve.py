"""From keys and residuals to the factors of an update. All of it in fp64, all of it low rank.

Every solver of the family has one form. With A what a change costs elsewhere (lambda C + beta I, and the keys of
earlier edits) and X = A^-1 K,

    D = R (gamma I + K^T X)^-1 X^T.

    gamma = 1        least squares, D = R K^T (A + K K^T)^-1 by push-through     MEMIT, PMET, AlphaEdit, ...
    gamma = 0        the residuals are added exactly                            ROME, R-ROME
    gamma = alpha    in between                                                 EMMET

AlphaEdit's D = R K^T P (P M P + L2 I)^-1 is least squares with A = L2 I and keys projected by P.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from easyeditor.edits.delta import LowRank
from easyeditor.errors import NonFinite, UsageError
from easyeditor.lm.clock import spent

log = logging.getLogger(__name__)

PIVOT = 1e-13  # of the mean: a pivot below it is rounding error and not a direction of the matrix


@dataclass(frozen=True)
class Solution:
    """An update and how well it was determined.

    Args:
        delta: D, as left (d_out, n) and right = X (d_in, n), fp32.
        factor: The lower Cholesky factor of ``gamma I + K^T X``, (n, n), fp64; a fact can be taken out of it. None
            where keys are one and the same and nothing holds them apart.
        condition: The condition number of that system, estimated.
        residual: ``|R - D K| / |R|``: what the solver gave up for the sake of everything else.
    """

    delta: LowRank
    factor: Tensor | None
    condition: float
    residual: float


class System:
    """A = lambda C + beta I + sum over earlier edits of K K^T, ready to be applied from the left as A^-1.

    Its Cholesky factor is computed once. The keys of earlier edits come in by Woodbury's identity, and are folded into
    the factor whenever ``fold`` of them have come together, so that the cost of an edit stays flat. When that happens
    depends on the history alone; what is kept between calls changes the time and not the result.

    Args:
        moment: C, (d, d); None: the identity.
        weight: lambda.
        ridge: beta.
        project: What is applied to all keys first, such as a projection; None: nothing.
        size: d, where there is no moment.
        fold: After how many keys the factor is made anew; None: an eighth of d.
    """

    def __init__(
        self,
        moment: Tensor | None,
        weight: float = 1.0,
        ridge: float = 0.0,
        project: Callable[[Tensor], Tensor] | None = None,
        size: int | None = None,
        fold: int | None = None,
    ) -> None:
        self.size = len(moment) if moment is not None else int(size or 0)
        self.moment = moment if moment is not None and weight != 0 else None
        self.weight, self.ridge = weight, ridge + (weight if moment is None else 0.0)
        self.project = project
        self.fold = fold or max(64, self.size // 8)
        self._projected: list[tuple[Tensor, Tensor]] = []  # keys of the past as given, and in fp64
        self._folded = 0  # how many of them the factor holds
        self._factor: Tensor | None = None
        self._sum: tuple[int, Tensor] | None = None  # how many edits are in the sum that the factor is of, and the sum
        self._inside: list[Tensor] = []  # A_folded^-1 of the keys that it does not hold
        self._newest: tuple[Tensor, Tensor] | None = None  # keys last asked for, the history's next, with A_folded^-1

    def keys(self, keys: Tensor) -> Tensor:
        """Keys as the solver sees them, (d, n), fp64."""
        wide = keys.double()
        return wide if self.project is None else self.project(wide)

    def inverse_times(self, keys: Tensor, past: Sequence[Tensor] = ()) -> Tensor:
        """X = A^-1 K.

        Args:
            keys: K as `keys` gives them, (d, n), fp64.
            past: The keys of earlier edits, oldest first, each (d, m).

        Returns:
            (d, n), fp64.

        Raises:
            UsageError: Nothing is to be kept, so that A is zero.
        """
        self._remember(past, keys.device)
        x = self._base(keys)
        known, self._newest = self._newest, (keys, x)
        recent = [k for _, k in self._projected[self._folded :]]
        if not recent:
            return x
        for k in recent[len(self._inside) :]:
            self._inside.append(known[1] if known and torch.equal(known[0], k) else self._base(k))
        u, inside = torch.cat(recent, dim=1), torch.cat(self._inside, dim=1)  # (d, m)
        gram = torch.eye(u.shape[1]).to(u) + u.T @ inside
        return x - inside @ torch.cholesky_solve(inside.T @ keys, cholesky(gram))

    def _base(self, keys: Tensor) -> Tensor:
        """A^-1 K with the part of the history that is in the factor."""
        if self.moment is None and not self._folded:
            if self.ridge <= 0:
                raise UsageError(
                    "The system is singular: nothing that is known has any weight. Set mom2_update_weight, "
                    "update_norm_lambda or L2 above 0."
                )
            return keys / self.ridge
        if self._factor is None:
            self._factor = cholesky(self._matrix(keys.device))
        factor = self._factor.to(keys.device)  # two triangular solves; cholesky_solve would copy it for each
        half = torch.linalg.solve_triangular(factor, keys, upper=False)
        solved: Tensor = torch.linalg.solve_triangular(factor.mT, half, upper=True)
        return solved

    def _matrix(self, device: torch.device) -> Tensor:
        """A with the part of the history that is folded; from the last such sum on, if there is one."""
        done, matrix = self._sum if self._sum is not None else (0, self._start(device))
        for _, k in self._projected[done : self._folded]:
            matrix.addmm_(k, k.T)
        self._sum = (self._folded, matrix) if self._folded else None
        return matrix

    def _start(self, device: torch.device) -> Tensor:
        matrix = torch.zeros(self.size, self.size, dtype=torch.float64, device=device)
        if self.moment is not None:
            matrix += self.weight * self.moment.to(device=device, dtype=torch.float64)
        matrix.diagonal().add_(self.ridge)
        return matrix

    def _remember(self, past: Sequence[Tensor], device: torch.device) -> None:
        """Take in the history; start anew where it is not a continuation of the one known."""
        known = len(self._projected)
        if len(past) < known or any(a is not b for (a, _), b in zip(self._projected, past, strict=False)):
            self._projected, self._inside, known = [], [], 0
            if self._folded:
                self._folded, self._factor, self._sum, self._newest = 0, None, None, None
        self._projected += [(k, self.keys(k.to(device))) for k in past[known:]]
        folded = _foldable([k.shape[1] for k in past], self.fold)
        if folded != self._folded:
            self._folded, self._factor, self._inside = folded, None, []
            self._newest = None


def _foldable(counts: Sequence[int], fold: int) -> int:
    """How many edits of a history go into the factor, by the numbers of their keys."""
    folded = pending = 0
    for i, count in enumerate(counts, 1):
        pending += count
        if pending >= fold:
            folded, pending = i, 0
    return folded


@spent("solve")
def solve(system: System, keys: Tensor, residuals: Tensor, gamma: float = 1.0, past: Sequence[Tensor] = ()) -> Solution:
    """D = R (gamma I + K^T X)^-1 X^T with X = A^-1 K.

    Args:
        system: A.
        keys: K, (d_in, n).
        residuals: R, (d_out, n).
        gamma: 1: least squares; 0: equality; EMMET's alpha in between.
        past: The keys of earlier edits, oldest first, each (d_in, m).

    Returns:
        The update, on the device of the keys.

    Raises:
        NonFinite: A key, a residual or the moment is not finite.
        UsageError: The system is singular.
    """
    k, r = system.keys(keys), residuals.double()
    x = system.inverse_times(k, past)
    gram = k.T @ x
    gram = (gram + gram.T) / 2
    gram.diagonal().add_(gamma)
    _refuse_infinite(gram)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if failed or _singular(factor, gram):  # keys that are one and the same: what they share is the mean
        left, factor = r @ torch.linalg.pinv(gram, rtol=1e-10, hermitian=True), None
    else:
        left = torch.cholesky_solve(r.T, factor).T  # (d_out, n)
    missed = r - left @ (x.T @ k)
    return Solution(
        LowRank(left.float(), x.float()),
        factor,
        _condition(gram, factor) if factor is not None else float("inf"),
        float(missed.norm() / r.norm().clamp(min=torch.finfo(torch.float64).tiny)),
    )


def without(delta: LowRank, residuals: Tensor, factor: Tensor, column: int) -> tuple[LowRank, Tensor, Tensor]:
    """The update that solving without one fact would have given, by down-dating the factor.

    Column i of X depends on key i alone, so only the small system loses a row and a column.

    Args:
        delta: The update, as `solve` gave it.
        residuals: R, (d_out, n).
        factor: Its factor, (n, n), fp64.
        column: Which fact.

    Returns:
        Update, residuals and factor of the other facts.
    """
    keep = torch.arange(factor.shape[0], device=factor.device) != column
    small = factor[keep][:, keep].clone()
    _add_outer(small[column:, column:], factor[column + 1 :, column].clone())
    kept = residuals[:, keep.to(residuals.device)]
    left = torch.cholesky_solve(kept.to(small).T, small).T
    right = delta.right[:, keep.to(delta.right.device)]
    return LowRank(left.to(delta.left), right), kept, small


def quality_of(delta: LowRank, keys: Tensor, residuals: Tensor, factor: Tensor) -> dict[str, float]:
    """The condition number of an update's system and the share of the residuals that it leaves, as `solve` says them.

    Args:
        delta: The update.
        keys: K, (d_in, n).
        residuals: R, (d_out, n), fp64.
        factor: The factor of its system, (n, n), fp64.
    """
    missed = residuals - delta.left.to(residuals) @ (delta.right.to(residuals).T @ keys.to(residuals))
    tiny = torch.finfo(torch.float64).tiny
    return {
        "condition": _condition(factor @ factor.T, factor),
        "residual": float(missed.norm() / residuals.norm().clamp(min=tiny)),
    }


def _add_outer(factor: Tensor, vector: Tensor) -> None:
    """L L^T + v v^T as a Cholesky factor, in place, in O(n^2)."""
    for i in range(len(vector)):
        r = torch.hypot(factor[i, i], vector[i])
        c, s = r / factor[i, i], vector[i] / factor[i, i]
        factor[i, i] = r
        factor[i + 1 :, i].add_(s * vector[i + 1 :]).div_(c)
        vector[i + 1 :].mul_(c).sub_(s * factor[i + 1 :, i])


def equality(keys: Tensor, residuals: Tensor, moment: Tensor | None = None, factor: Tensor | None = None) -> LowRank:
    """The smallest change, in the metric of C, that adds the residuals at the keys exactly.

    ``D = R (K^T C^-1 K)^-1 (C^-1 K)^T``. With one key this is ROME's rank-one update, with several EMMET's at alpha 0.

    Args:
        keys: K, (d_in, n).
        residuals: R, (d_out, n).
        moment: C, (d_in, d_in); None: the identity.
        factor: C's Cholesky factor, if it is at hand already; see `cholesky`.

    Returns:
        The factors, fp32, on the device of the keys.
    """
    k, r = keys.double(), residuals.double()
    if factor is None and moment is not None:
        factor = cholesky(moment.double().to(k.device))
    u = k if factor is None else torch.cholesky_solve(k, factor.to(k.device))  # C^-1 K, (d_in, n)
    gram = k.T @ u  # (n, n)
    left = torch.linalg.solve(gram.T, r.T).T  # (d_out, n)
    scale = u.norm(dim=0).clamp(min=torch.finfo(torch.float64).tiny)
    return LowRank((left * scale).float(), (u / scale).float())


@dataclass(frozen=True)
class NullSpace:
    """The directions in which text hardly ever looks: eigenvectors of C with an eigenvalue below a threshold.

    Args:
        basis: The thinner of U, which spans them, and of what spans the rest, (d, r), fp64.
        inside: Whether the basis is U.
        share: The share of the spectrum that is kept: r(U) / d.
    """

    basis: Tensor
    inside: bool
    share: float

    def __call__(self, keys: Tensor) -> Tensor:
        """P K, with P = U U^T."""
        basis = self.basis.to(keys)
        along = basis @ (basis.T @ keys)
        return along if self.inside else keys - along


def null_space(moment: Tensor, threshold: float, name: str = "") -> NullSpace:
    """AlphaEdit's null space of C. arXiv:2410.02355, equation 7; the threshold is absolute.

    Args:
        moment: C, (d, d).
        threshold: Eigenvalues below it count as zero.
        name: What the log calls it.
    """
    found, vectors = torch.linalg.eigh(moment.double())
    small = found < threshold
    share = float(small.double().mean())
    log.info("%s: the null space at threshold %g keeps %.1f %% of the spectrum.", name, threshold, 100 * share)
    if share in (0.0, 1.0):
        log.warning(
            "The null space of %s keeps %d %% of the spectrum (eigenvalues from %.2g to %.2g, nullspace_threshold %g): "
            "%s. %s nullspace_threshold.",
            name or "the second moment",
            100 * share,
            float(found[0]),
            float(found[-1]),
            threshold,
            "nothing may change" if share == 0 else "nothing is protected",
            "Raise" if share == 0 else "Lower",
        )
    inside = bool(share <= 0.5)
    return NullSpace(vectors[:, small if inside else ~small].contiguous(), inside, share)


def cholesky(matrix: Tensor, ridge: float = 1e-10) -> Tensor:
    """The lower factor of a symmetric positive (semi)definite matrix.

    Args:
        matrix: (d, d), fp64.
        ridge: What is added to the diagonal, relative to its mean, where there is no factorisation without; it is
            enlarged until there is one.

    Returns:
        (d, d), fp64.

    Raises:
        NonFinite: The matrix holds numbers that are not finite.
        UsageError: It is not positive even with a ridge of a thousandth: the system is singular.
    """
    _refuse_infinite(matrix)
    scale = matrix.diagonal().mean()
    factor, info = torch.linalg.cholesky_ex(matrix)
    while info.any() or _singular(factor, matrix):
        if ridge > 1e-3 or not scale > 0:
            raise UsageError(
                f"The system of the update is singular (size {len(matrix)}). Take more text for the second moment "
                "(mom2_tokens), or raise mom2_update_weight, update_norm_lambda, emmet_lambda or L2."
            )
        factor, info = torch.linalg.cholesky_ex(matrix + ridge * scale * torch.eye(len(matrix)).to(matrix))
        ridge *= 10
    return factor  # type: ignore[no-any-return]


def _singular(factor: Tensor, matrix: Tensor) -> bool:
    return bool(factor.diagonal().min() ** 2 < PIVOT * matrix.diagonal().mean())


def _refuse_infinite(matrix: Tensor) -> None:
    if not torch.isfinite(matrix).all():
        raise NonFinite(
            "The second moment, a key or a value holds numbers that are not finite: the model's activations leave the "
            "range of its dtype. Load the model in bfloat16 or float32, or set mom2_adjustment to false."
        )


def _condition(matrix: Tensor, factor: Tensor, rounds: int = 20) -> float:
    """The condition number of a symmetric positive matrix, by the power method on it and on its inverse."""
    n = len(matrix)
    if n == 1:
        return 1.0
    start = torch.randn(n, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(matrix)
    largest, smallest = start, start
    for _ in range(rounds):
        largest = matrix @ largest
        largest = largest / largest.norm()
        smallest = torch.cholesky_solve(smallest, factor)
        smallest = smallest / smallest.norm()
    return float((largest.T @ matrix @ largest) / (smallest.T @ matrix @ smallest))
