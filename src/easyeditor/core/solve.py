"""From keys and residuals to the factors of an update. All of it in fp64, all of it low rank."""

from __future__ import annotations

import torch
from torch import Tensor

from easyeditor.edits.delta import LowRank
from easyeditor.errors import NonFinite


def equality(keys: Tensor, residuals: Tensor, moment: Tensor | None = None, factor: Tensor | None = None) -> LowRank:
    """The smallest change, in the metric of C, that adds the residuals at the keys exactly.

    ``D = R (K^T C^-1 K)^-1 (C^-1 K)^T``. With one key this is ROME's rank-one update, with several EMMET's.

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


def solve_spd(matrix: Tensor, right: Tensor, ridge: float = 1e-10) -> Tensor:
    """``matrix^-1 right`` for a symmetric positive (semi)definite matrix; see `cholesky`.

    Args:
        matrix: (d, d), fp64.
        right: (d, n), fp64.
        ridge: See `cholesky`.

    Returns:
        (d, n).
    """
    return torch.cholesky_solve(right, cholesky(matrix, ridge))


def cholesky(matrix: Tensor, ridge: float = 1e-10) -> Tensor:
    """The lower factor of a symmetric positive (semi)definite matrix.

    Args:
        matrix: (d, d), fp64.
        ridge: Added to the diagonal relative to its mean, enlarged until the factorisation exists.

    Returns:
        (d, d), fp64.

    Raises:
        NonFinite: The matrix holds numbers that are not finite.
    """
    if not torch.isfinite(matrix).all():
        raise NonFinite(
            "The second moment holds numbers that are not finite: the model's activations leave the range of its "
            "dtype. Load the model in bfloat16 or float32, or set mom2_adjustment to false."
        )
    scale = matrix.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
    while True:
        factor, info = torch.linalg.cholesky_ex(matrix + ridge * scale * torch.eye(len(matrix)).to(matrix))
        if not info.any():
            return factor  # type: ignore[no-any-return]
        ridge *= 10
