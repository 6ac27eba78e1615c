"""A network that turns the gradient of a projection into a better change of its weight. MEND, arXiv:2110.11309.

The gradient comes as pairs of vectors, one pair per token (`easyeditor.core.gradients`): u, what the projection takes
in, and v, how the loss depends on what it returns. Each pair is normalised and goes through residual layers of low rank
that are the identity before any training: g(z) = z + ReLU(s * (U V z + b) + o), equation 3. Projections of one shape
share U, V and b; each has a scale s, an offset o and a learned step of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from easyeditor.core.gradients import Factors
from easyeditor.core.lifelong import EPS, Moments
from easyeditor.errors import UsageError

SIDES = ("both", "separate", "inputs", "gradients")


@dataclass(frozen=True)
class Design:
    """What such a network looks like.

    Args:
        rank: Of U V, at most the width.
        n_hidden: Layers besides the last one.
        sides: ``both``: one network on [u, v]; ``separate``: one on each; ``inputs``, ``gradients``: on one of them
            only, the other stays as it is; ``smaller``: on the one with fewer numbers.
        norm: Whether u and v are normalised.
        shared: Whether projections of one shape share a network.
        edit_lr: Where the steps begin.
    """

    rank: int = 1920
    n_hidden: int = 1
    sides: str = "both"
    norm: bool = True
    shared: bool = True
    edit_lr: float = 1e-4


class Residual(nn.Module):
    """One layer, the identity before any training.

    Args:
        width: Of what it takes and returns.
        rank: Of its matrix, at most the width.
        modes: How many projections share it.
        generator: Draws V.
    """

    def __init__(self, width: int, rank: int, modes: int, generator: torch.Generator) -> None:
        super().__init__()
        rank = min(rank, width)
        self.u = nn.Parameter(torch.zeros(width, rank))
        self.v = nn.Parameter(torch.randn(rank, width, generator=generator) / width**0.5)
        self.bias = nn.Parameter(torch.zeros(width))
        self.scale = nn.Parameter(torch.ones(modes, width))
        self.offset = nn.Parameter(torch.zeros(modes, width))

    def forward(self, z: Tensor, mode: Tensor) -> Tensor:
        """The layer's z + ReLU(s * (U V z + b) + o) for the projection that each z, (n, width), belongs to."""
        inner = (z @ self.v.T) @ self.u.T + self.bias
        # unlike ReLU, clamp has a gradient at 0, where every layer begins
        return z + (inner * self.scale[mode] + self.offset[mode]).clamp(min=0)


class Chain(nn.Module):
    """Some layers, one after the other."""

    def __init__(self, width: int, design: Design, modes: int, generator: torch.Generator) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Residual(width, design.rank, modes, generator) for _ in range(design.n_hidden + 1))

    def forward(self, z: Tensor, mode: Tensor) -> Tensor:
        """What the last layer returns, (n, width)."""
        for layer in self.layers:
            z = layer(z, mode)
        return z


class Normaliser(nn.Module):
    """Mean and deviation of the pairs that a network has seen before its training.

    Args:
        width: Of u and v together.
        norm: False: pairs stay as they are.
    """

    count: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(self, width: int, norm: bool = True) -> None:
        super().__init__()
        self.norm = norm
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(width, dtype=torch.double))
        self.register_buffer("squares", torch.zeros(width, dtype=torch.double))

    def observe(self, u: Tensor, v: Tensor) -> None:
        """Let some pairs, (n, d_in) and (n, d_out), count in the normalisation."""
        found = Moments.of(u.to(self.mean.device), v.to(self.mean.device))
        if int(self.count):
            found = Moments(int(self.count), self.mean, self.squares) + found
        self.count.fill_(found.n)
        self.mean.copy_(found.mean)
        self.squares.copy_(found.squares)

    def normalised(self, u: Tensor, v: Tensor) -> Tensor:
        """[u, v] by mean and deviation, (n, d_in + d_out), fp32; a number that never varied becomes 0.

        Raises:
            UsageError: Fewer than two pairs were observed.
        """
        z = torch.cat([u, v], dim=1).to(self.mean.device)
        if not self.norm:
            return z.float()
        if int(self.count) < 2:
            raise UsageError(
                "This network normalises by what it has seen in training, and it has seen nothing. Train it, or set "
                "norm to false."
            )
        deviation = (self.squares / (self.count - 1)).sqrt()
        spread = torch.where(deviation > 0, deviation + EPS, torch.inf)
        return ((z.double() - self.mean) / spread).float()


class GradientTransform(Normaliser):
    """u, v -> u~, v~ for projections of one shape.

    Args:
        d_in: The width of u.
        d_out: The width of v.
        design: What it looks like.
        modes: How many projections share it.
        generator: Draws its weights.
    """

    def __init__(self, d_in: int, d_out: int, design: Design, modes: int, generator: torch.Generator) -> None:
        super().__init__(d_in + d_out, design.norm)
        self.d_in = d_in
        sides = design.sides if design.sides != "smaller" else ("gradients" if d_in > d_out else "inputs")
        widths = {"both": {"both": d_in + d_out}, "separate": {"inputs": d_in, "gradients": d_out}}.get(
            sides, {sides: d_in if sides == "inputs" else d_out}
        )
        self.chains = nn.ModuleDict({name: Chain(width, design, modes, generator) for name, width in widths.items()})

    def forward(self, u: Tensor, v: Tensor, mode: Tensor) -> tuple[Tensor, Tensor]:
        """u~ and v~, (n, d_in) and (n, d_out), of the projection that each pair belongs to, (n,)."""
        z = self.normalised(u, v)
        if "both" in self.chains:
            z = self.chains["both"](z, mode)
            return z[:, : self.d_in], z[:, self.d_in :]
        sides = {"inputs": z[:, : self.d_in], "gradients": z[:, self.d_in :]}
        done = {name: self.chains[name](part, mode) if name in self.chains else part for name, part in sides.items()}
        return done["inputs"], done["gradients"]


class ByShape(nn.Module):
    """Networks for some projections, of which those of one shape share one.

    Args:
        shapes: Weight name -> (d_out, d_in), in an order that counts.
        shared: False: each projection has its own.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int]], shared: bool = True) -> None:
        super().__init__()
        self.names, self.shared = list(shapes), shared
        self.groups: dict[str, list[str]] = {}
        for name, (d_out, d_in) in shapes.items():
            key = f"{d_in}x{d_out}" if shared else name.replace(".", "/")
            self.groups.setdefault(key, []).append(name)
        self.transforms = nn.ModuleDict()

    def observe(self, found: Mapping[str, Factors]) -> None:
        """Let factors, by weight name, count in the normalisation."""
        for key, names in self.groups.items():
            u, v = (torch.cat([getattr(found[name], side) for name in names]) for side in ("inputs", "gradients"))
            self.transforms[key].observe(u, v)  # type: ignore[operator]


class Hypernetwork(ByShape):
    """The transforms of some projections, and the learned step of each.

    Args:
        shapes: Weight name -> (d_out, d_in), in an order that counts.
        design: What the transforms look like.
        seed: Draws their weights.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int]], design: Design, seed: int = 0) -> None:
        super().__init__(shapes, design.shared)
        generator = torch.Generator().manual_seed(seed)
        self.lrs = nn.Parameter(torch.full((len(self.names),), design.edit_lr))
        for key, names in self.groups.items():
            d_out, d_in = shapes[names[0]]
            self.transforms[key] = GradientTransform(d_in, d_out, design, len(names), generator)

    def forward(self, found: Mapping[str, Factors]) -> dict[str, Factors]:
        """The change of each weight, as factors: sum of gradients inputs^T = -lr sum of v~ u~^T.

        Args:
            found: Weight name -> the factors of its gradient.

        Returns:
            Weight name -> factors with the same rows; gradients flow through them into the network.
        """
        changes = {}
        for key, names in self.groups.items():
            parts = [found[name] for name in names]
            sizes = [len(part.rows) for part in parts]
            mode = torch.repeat_interleave(torch.arange(len(names)), torch.tensor(sizes)).to(self.lrs.device)
            u, v = (torch.cat([getattr(part, side) for part in parts]) for side in ("inputs", "gradients"))
            u, v = self.transforms[key](u, v, mode)
            for name, part, right, left in zip(names, parts, u.split(sizes), v.split(sizes), strict=True):
                changes[name] = Factors(right, -self.lrs[self.names.index(name)] * left, part.rows)
        return {name: changes[name] for name in self.names}


def with_gradient(factors: Factors) -> Factors:
    """The factors of those tokens that the loss depends on."""
    kept = (factors.gradients != 0).any(1) & (factors.inputs != 0).any(1)
    return Factors(factors.inputs[kept], factors.gradients[kept], factors.rows.to(kept.device)[kept])


def of_rows(found: Sequence[Factors]) -> Factors:
    """The factors of several prompts as one, with the place of each prompt as its row."""
    rows = torch.repeat_interleave(torch.arange(len(found)), torch.tensor([len(part.rows) for part in found]))
    inputs, gradients = (torch.cat([getattr(part, side) for part in found]) for side in ("inputs", "gradients"))
    return Factors(inputs, gradients, rows.to(inputs.device))
