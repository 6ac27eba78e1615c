"""Lifelong normalisation and the ridge solve of editors that turn a pass's factors into an update. arXiv:2505.14679.

A token's feature is z = [h || g], what a projection takes in and how the loss depends on what it returns. It is
normalised by the mean and the deviation of all features so far: those of a warm-up, of the edits on the ledger, and of
the edit that is being made (Welford's running moments, joined as by Chan et al.). Each edit carries its own features
among its keys, so that the normaliser is a function of the edits that are on the model: it is saved with them, and
taking an edit back, the last or an earlier one, leaves exactly what there would be if it had never been made.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from easyeditor.core.gradients import Factors
from easyeditor.edits.delta import Dense, LowRank
from easyeditor.edits.edit import Edit, WeightEdit
from easyeditor.errors import EditFailed, NonFinite
from easyeditor.lm.clock import spent
from easyeditor.lm.structure import Site

GRADIENT = "/gradient"  # follows the weight's name where an edit keeps g beside the keys h
EPS = torch.finfo(torch.float32).eps
SENTENCE = re.compile(r"[.!?]+(?:\s+|$)")
SHORTEST = 4  # words of a sentence that can serve as a fact

Shape = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and spread of features, all fp64.

    Args:
        n: How many features.
        mean: (d_in + d_out,).
        squares: The sum of squared deviations from the mean, (d_in + d_out,).
        scatter: The sum of outer products of deviations of g, (d_out, d_out), where the whole covariance is wanted.
    """

    n: int
    mean: Tensor
    squares: Tensor
    scatter: Tensor | None = None

    @classmethod
    def of(cls, h: Tensor, g: Tensor, whole: bool = False) -> Moments:
        """The moments of some features.

        Args:
            h: (n, d_in).
            g: (n, d_out).
            whole: Whether the covariance of g is wanted.
        """
        z = torch.cat([h, g], dim=1).double()
        mean = z.mean(0)
        rest = z - mean
        part = rest[:, h.shape[1] :]
        return cls(len(z), mean, rest.square().sum(0), part.T @ part if whole else None)

    def __add__(self, other: Moments) -> Moments:
        """The moments of both together (Chan, Golub and LeVeque 1983)."""
        n = self.n + other.n
        apart = other.mean.to(self.mean) - self.mean
        weight = self.n * other.n / n
        scatter = None
        if self.scatter is not None and other.scatter is not None:
            g = apart[-len(self.scatter) :]
            scatter = self.scatter + other.scatter.to(g) + weight * torch.outer(g, g)
        squares = self.squares + other.squares.to(apart) + weight * apart.square()
        return Moments(n, self.mean + apart * (other.n / n), squares, scatter)

    @property
    def deviation(self) -> Tensor:
        """The standard deviation, (d_in + d_out,)."""
        return (self.squares / max(self.n - 1, 1)).sqrt()

    def normalised(self, factors: Factors) -> tuple[Tensor, Tensor]:
        """h^ and g^: features by mean and deviation, (n, d_in) and (n, d_out), fp64."""
        h, g = factors.inputs.double(), factors.gradients.double()
        split = h.shape[1]
        spread = self.deviation.to(h) + EPS
        mean = self.mean.to(h)
        return (h - mean[:split]) / spread[:split], (g - mean[split:]) / spread[split:]

    def whitened(self, factors: Factors, floor: float) -> tuple[Tensor, Tensor]:
        """As `normalised`, but g^ = S^(-1/2) (g - mean) with the whole covariance S of g, once it can be estimated.

        Args:
            factors: The features.
            floor: Eigenvalues of S below this share of the largest are lifted to it.

        Returns:
            h^ and g^; until there are more features than d_out + 1, those of `normalised`.
        """
        h, g = self.normalised(factors)
        width = g.shape[1]
        if self.scatter is None or self.n <= width + 1:
            return h, g
        covariance = self.scatter.to(g) / (self.n - width - 1)  # the mean of the inverse Wishart posterior
        values, vectors = torch.linalg.eigh(covariance)
        root = (vectors * values.clamp(min=float(values[-1]) * floor).rsqrt()) @ vectors.T
        return h, (factors.gradients.double() - self.mean[-width:].to(g)) @ root


def shape_of(site: Site) -> Shape:
    """What projections share a normaliser by: as with the authors, those of one shape have one."""
    return site.d_in, site.d_out


def joined(
    sites: Sequence[Site],
    found: Mapping[str, Factors],
    whole: bool = False,
    start: Mapping[Shape, Moments] | None = None,
) -> dict[Shape, Moments]:
    """The moments of the features of some projections, joined by shape.

    Args:
        sites: The projections.
        found: Path -> features.
        whole: See `Moments.of`.
        start: Moments to go on from.
    """
    out = dict(start or {})
    for site in sites:
        here = Moments.of(found[site.name].inputs, found[site.name].gradients, whole)
        out[shape_of(site)] = out[shape_of(site)] + here if shape_of(site) in out else here
    return out


def of_history(
    sites: Sequence[Site], history: Sequence[Edit], whole: bool, start: Mapping[Shape, Moments]
) -> dict[Shape, Moments]:
    """The moments of a start and of the features that earlier edits carry, oldest first."""
    found = dict(start)
    for edit in history:
        if isinstance(edit, WeightEdit):
            here = [site for site in sites if site.weight_name + GRADIENT in edit.keys]
            found = joined(here, {site.name: _kept(edit, site) for site in here}, whole, found)
    return found


def kept(site: Site, factors: Factors) -> dict[str, Tensor]:
    """What an edit keeps of its features, for its `keys`: (d_in, n) and (d_out, n)."""
    name = site.weight_name
    return {name: factors.inputs.T.contiguous(), name + GRADIENT: factors.gradients.T.contiguous()}


def _kept(edit: WeightEdit, site: Site) -> Factors:
    h, g = (edit.keys[site.weight_name + end].T.to(site.weight.device) for end in ("", GRADIENT))
    return Factors(h, g, torch.zeros(len(h), dtype=torch.long))


@spent("solve")
def ridge(h: Tensor, v: Tensor, alpha: float) -> LowRank | Dense:
    """The change D = ((H^T H + a I)^-1 H^T V)^T, which adds V at H as far as its size allows.

    With fewer tokens than inputs it is solved by the push-through identity, as a system of size n instead of d_in:
    (H^T H + a I)^-1 H^T = H^T (H H^T + a I)^-1.

    Args:
        h: H, (n, d_in).
        v: V, (n, d_out).
        alpha: a, above 0.

    Returns:
        The change, solved in fp64, of low rank where that is smaller.

    Raises:
        NonFinite: H or V holds values that are not finite numbers.
        EditFailed: The system is singular: `alpha` is too small for it.
    """
    h, v = h.double(), v.double()
    _refuse_infinite(h, v)
    n, width = h.shape
    if n <= width:
        factor = ridge_factor(h @ h.T, alpha)
        left = torch.cholesky_solve(v, factor).T  # (d_out, n)
        if n * (left.shape[0] + width) <= left.shape[0] * width:
            return LowRank(left.float().contiguous(), h.T.float().contiguous())
        return Dense((left @ h).float())
    return ridge_of_sums(h.T @ h, h.T @ v, alpha)


def ridge_of_sums(gram: Tensor, cross: Tensor, alpha: float) -> Dense:
    """`ridge` from sums over tokens, which may come in parts.

    Args:
        gram: H^T H, (d_in, d_in), fp64.
        cross: H^T V, (d_in, d_out), fp64.
        alpha: a, above 0.

    Raises:
        NonFinite: The sums hold values that are not finite numbers.
        EditFailed: The system is singular: `alpha` is too small for it.
    """
    _refuse_infinite(gram, cross)
    return Dense(torch.cholesky_solve(cross, ridge_factor(gram, alpha)).T.float().contiguous())


def _refuse_infinite(*tensors: Tensor) -> None:
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise NonFinite(
            "The model's states or gradients are not finite numbers, so that nothing can be solved for. "
            "Use a wider dtype, or take back the edit that did this."
        )


def ridge_factor(gram: Tensor, alpha: float) -> Tensor:
    """The Cholesky factor of a Gram matrix plus a I."""
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(gram + alpha * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    if failed:
        raise EditFailed(f"The system of {len(gram)} unknowns is singular with alpha = {alpha:g}. Raise alpha.")
    return factor


def facts_from(texts: Iterable[str], count: int) -> list[tuple[str, str]]:
    """Made-up facts for a warm-up: sentences without their last word, each with the last word of the next one.

    Args:
        texts: Ordinary text.
        count: How many facts at most.

    Returns:
        Prompt and answer; an answer that a sentence had already is left out.
    """
    whole: list[tuple[str, str]] = []
    for text in texts:
        for sentence in SENTENCE.split(text):
            words = sentence.split()
            if len(words) >= SHORTEST:
                whole.append((" ".join(words[:-1]), words[-1]))
        if len(whole) > count:
            break
    pairs = zip(whole, whole[1:] + whole[:1], strict=True)
    return [(prompt, other) for (prompt, own), (_, other) in pairs if other != own][:count]
