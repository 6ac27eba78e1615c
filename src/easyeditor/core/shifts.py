"""A network that says what a projection should return at each token, and the change of its weight that comes closest.

MALMEN, arXiv:2311.04661. A token is a pair: its key k, what the projection takes in, and g, how the loss depends on
what it returns. A network maps both to k~ and g~, and the value of the token is to move by d = -eta (k^T k~) g~. The
change is the ridge solution over all tokens of all facts, with keys as the columns of K and moves as those of D:

    Delta = D K^T (K K^T + e^lambda I)^-1.

In code keys and moves are rows. Gradients reach the network through D K^T, which is summed over some tokens at a time:
of the network's activations never more than those are held, and each part is computed again on the way back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from easyeditor.core.gradients import Factors
from easyeditor.core.hypernetwork import ByShape, Normaliser
from easyeditor.core.lifelong import ridge, ridge_factor, ridge_of_sums
from easyeditor.edits.delta import Dense, LowRank


class Block(nn.Module):
    """z + s * ReLU(z A B + b) + o, the identity before any training.

    Args:
        width: Of z.
        rank: Of A B, at most the width.
        modes: How many projections share it; each has an s and an o of its own.
        generator: Draws A.
    """

    def __init__(self, width: int, rank: int, modes: int, generator: torch.Generator) -> None:
        super().__init__()
        rank = min(rank, width)
        self.A = nn.Parameter(torch.randn(width, rank, generator=generator))
        self.B = nn.Parameter(torch.zeros(rank, width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.scale = nn.Parameter(torch.ones(modes, width))
        self.shift = nn.Parameter(torch.zeros(modes, width))

    def forward(self, z: Tensor, mode: int) -> Tensor:
        """What it makes of z, (n, width), of one projection."""
        inner = (z @ self.A @ self.B + self.bias).clamp(min=0)  # unlike ReLU, clamp has a gradient at 0
        return z + self.scale[mode] * inner + self.shift[mode]


class ShiftTransform(Normaliser):
    """k, g -> k~, g~ for projections of one shape."""

    def __init__(self, d_in: int, d_out: int, rank: int, n_blocks: int, modes: int, generator: torch.Generator) -> None:
        super().__init__(d_in + d_out)
        self.d_in = d_in
        self.blocks = nn.ModuleList(Block(d_in + d_out, rank, modes, generator) for _ in range(n_blocks))

    def forward(self, k: Tensor, g: Tensor, mode: int) -> tuple[Tensor, Tensor]:
        """k~ and g~, (n, d_in) and (n, d_out), of one projection."""
        z = self.normalised(k, g)
        for block in self.blocks:
            z = block(z, mode)
        return z[:, : self.d_in], z[:, self.d_in :]


class ShiftNetwork(ByShape):
    """The transforms of some projections, and of each the learned eta and lambda.

    Args:
        shapes: Weight name -> (d_out, d_in), in an order that counts.
        rank: Of the blocks.
        n_blocks: Of each transform.
        lr: Where eta begins; lambda begins at 0.
        seed: Draws the weights.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, int]], rank: int, n_blocks: int, lr: float, seed: int = 0
    ) -> None:
        super().__init__(shapes)
        generator = torch.Generator().manual_seed(seed)
        self.lrs = nn.Parameter(torch.full((len(self.names),), lr))
        self.lamda = nn.Parameter(torch.zeros(len(self.names)))
        for key, names in self.groups.items():
            d_out, d_in = shapes[names[0]]
            self.transforms[key] = ShiftTransform(d_in, d_out, rank, n_blocks, len(names), generator)

    def moves(self, name: str, keys: Tensor, gradients: Tensor) -> Tensor:
        """D: how the values of some tokens of a projection are to move.

        Args:
            name: The weight's name.
            keys: (n, d_in).
            gradients: (n, d_out).

        Returns:
            (n, d_out).
        """
        key, names = next((key, names) for key, names in self.groups.items() if name in names)
        k, g = self.transforms[key](keys, gradients, names.index(name))
        along = (keys.to(k) * k).sum(1, keepdim=True)
        moved: Tensor = -self.lrs[self.names.index(name)] * along * g
        return moved

    def alpha(self, name: str) -> Tensor:
        """e^lambda of a projection, in fp64."""
        return self.lamda[self.names.index(name)].double().exp()

    def change(self, name: str, found: Factors, at_once: int) -> Tensor:
        """Delta of a projection, (d_out, d_in), fp64; gradients flow through it into the network.

        Args:
            name: The weight's name.
            found: All tokens.
            at_once: Tokens that pass the network at a time; the change does not depend on it.
        """
        cross: Any = 0.0
        for keys, gradients in in_parts(found, at_once):
            part = checkpoint(self._cross, name, keys, gradients, use_reentrant=False, preserve_rng_state=False)
            cross = cross + part
        delta: Tensor = _LeastSquares.apply(cross, self.alpha(name), found.inputs)  # type: ignore[no-untyped-call]
        return delta

    def _cross(self, name: str, keys: Tensor, gradients: Tensor) -> Tensor:
        return (self.moves(name, keys, gradients).T @ keys).double()


def in_parts(found: Factors, at_once: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and gradients, some tokens at a time; one part at least."""
    for start in range(0, max(len(found.inputs), 1), at_once):
        yield found.inputs[start : start + at_once], found.gradients[start : start + at_once]


class _LeastSquares(torch.autograd.Function):
    """Delta = D^T K (K^T K + a I)^-1 by D^T K and a, with keys and moves as rows."""

    @staticmethod
    def forward(ctx: Any, cross: Tensor, alpha: Tensor, keys: Tensor) -> Tensor:
        ctx.system = _System(keys, float(alpha))
        delta: Tensor = ctx.system.times_inverse(cross)
        ctx.save_for_backward(delta)
        return delta

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        """M = dL/dDelta (K^T K + a I)^-1; dL/dD = K M^T, dL/da = -<M, Delta>."""
        m = ctx.system.times_inverse(gradient)
        return m, -(m * ctx.saved_tensors[0]).sum(), None


class _System:
    """K^T K + a I, or with fewer tokens than inputs K K^T + a I in its place, as its Cholesky factor in fp64."""

    def __init__(self, keys: Tensor, alpha: float) -> None:
        k = keys.double()
        self.alpha = alpha
        self.keys = k if len(k) < k.shape[1] else None
        self.factor = ridge_factor(k @ k.T if self.keys is not None else k.T @ k, alpha)

    def times_inverse(self, x: Tensor) -> Tensor:
        """X (K^T K + a I)^-1 of X, (m, d_in)."""
        if self.keys is None:
            return torch.cholesky_solve(x.T, self.factor).T
        inside = torch.cholesky_solve(self.keys @ x.T, self.factor)  # Woodbury
        return (x - inside.T @ self.keys) / self.alpha


class Sums:
    """The tokens of any number of facts, of which no more are held than a projection has inputs.

    Beyond that only K^T K and K^T D are kept.

    Args:
        width: d_in.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self._held: list[tuple[Tensor, Tensor]] = []
        self._sums: tuple[Tensor, Tensor] | None = None

    def add(self, keys: Tensor, moves: Tensor) -> None:
        """Let some tokens count, (n, d_in) and (n, d_out)."""
        self._held.append((keys, moves))
        if sum(len(k) for k, _ in self._held) > self.width:
            self._fold()

    def change(self, alpha: float) -> LowRank | Dense:
        """Delta; of low rank where that is smaller.

        Raises:
            NonFinite: A key or a move is no finite number.
        """
        if self._sums is None:
            k, d = (torch.cat(side) for side in zip(*self._held, strict=True))
            return ridge(k, d, alpha)
        self._fold()
        return ridge_of_sums(*self._sums, alpha)

    def _fold(self) -> None:
        if self._held:
            k, d = (torch.cat(side).double() for side in zip(*self._held, strict=True))
            gram, cross = k.T @ k, k.T @ d
            self._sums = (gram, cross) if self._sums is None else (self._sums[0] + gram, self._sums[1] + cross)
            self._held = []
