"""Merging differences from one base weight into one: linear, slerp, TIES (arXiv:2306.01708), DARE (arXiv:2311.03099).

Written here, because peft, which has TIES and DARE, is no dependency of the core and draws DARE's masks from the global
generator. A test compares both.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from easyeditor.errors import UsageError

# What is thrown away (small values, or random ones), whether signs must agree, whether by the weights in place is
# divided. The names are those of existing settings files; 'dare' is short for 'dare_linear'.
RECIPES = MappingProxyType({
    "ties": ("small", True, True),
    "magnitude": ("small", False, False),
    "magnitude_norm": ("small", False, True),
    "sign": (None, True, True),
    "dare": ("random", False, False),
    "dare_linear": ("random", False, False),
    "dare_ties": ("random", True, False),
    "linear": (None, False, True),
})  # fmt: skip
ALGORITHMS = ("slerp", *RECIPES)
TINY = torch.finfo(torch.float32).tiny
PARALLEL = 1e-6  # below this sine two directions are one


def merged(
    differences: Sequence[Tensor], algorithm: str, weight: float = 1.0, density: float = 1.0, seed: int = 0
) -> Tensor:
    """One difference for several.

    Args:
        differences: At least one, all of one shape.
        algorithm: One of `ALGORITHMS`.
        weight: What all weights sum to; only the ways that do not divide by the weights depend on it.
        density: The share of values that are kept, where some are thrown away.
        seed: Of the random ones.

    Returns:
        The merged difference, fp32.

    Raises:
        UsageError: There is no such algorithm.
    """
    if algorithm not in ALGORITHMS:
        raise UsageError(f"There is no way of merging called '{algorithm}'. Choose {' or '.join(ALGORITHMS)}.")
    found = [difference.float() for difference in differences]
    if algorithm == "slerp":
        return _slerp(found)
    sparse, agree, divide = RECIPES[algorithm]
    generator = torch.Generator().manual_seed(seed)
    kept = torch.stack([_thinned(each, sparse, density, generator) for each in found])
    share = weight / len(kept)
    if agree:
        sign = torch.where(kept.sum(0) >= 0, 1.0, -1.0)
        kept = kept * (kept.sign() == sign)
    if not divide:
        return share * kept.sum(0)
    count = (kept != 0).sum(0).clamp(min=1) if agree else len(kept)
    return kept.sum(0) / count


def _thinned(difference: Tensor, what: str | None, density: float, generator: torch.Generator) -> Tensor:
    """A difference with a share of its values left: the largest, or random ones, which grow to keep their mean."""
    if what is None or density >= 1:
        return difference
    if what == "random":
        drawn = torch.rand(difference.shape, generator=generator).to(difference.device)
        return torch.where(drawn < density, difference / density, 0.0)
    count = max(int(density * difference.numel()), 1)
    kept = difference.abs().flatten().topk(count).indices
    out = torch.zeros_like(difference).flatten()
    out[kept] = difference.flatten()[kept]
    return out.reshape(difference.shape)


def _slerp(differences: Sequence[Tensor]) -> Tensor:
    """The middle of two directions on the arc between them, with the mean of their lengths; of more, one by one."""
    total = differences[0]
    for i, other in enumerate(differences[1:], 1):
        t = 1 / (i + 1)
        lengths = total.norm(), other.norm()
        a, b = (each / each.norm().clamp(min=TINY) for each in (total, other))
        angle = torch.arccos((a * b).sum().clamp(-1, 1))
        sine = torch.sin(angle)
        if sine < PARALLEL or not min(lengths):
            total = (1 - t) * total + t * other
            continue
        length = (1 - t) * lengths[0] + t * lengths[1]
        total = length * (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / sine
    return total
