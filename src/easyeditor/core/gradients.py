"""Gradients of projections as factors: what a projection takes in, and how the loss depends on what it returns.

For a projection y = W h the gradient of a loss by W is the sum over tokens of g h^T with g = dL/dy. One forward and one
backward pass give h and g at any number of projections. No weight gets a gradient, nothing below the lowest projection
is part of the graph, and the head sees the answers' tokens only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from easyeditor.core.likelihood import Answers, answers, token_log_probs
from easyeditor.errors import UsageError
from easyeditor.lm.clock import spent
from easyeditor.lm.hooks import by_row, hidden
from easyeditor.lm.model import LM
from easyeditor.lm.structure import Site

TOKENS = ("ans", "mask")


@dataclass(frozen=True, eq=False)
class Factors:
    """The gradient of one projection, as pairs of vectors, one pair per token.

    Args:
        inputs: h, (n, d_in), fp32.
        gradients: g, (n, d_out), fp32.
        rows: Which prompt each token belongs to, (n,).
    """

    inputs: Tensor
    gradients: Tensor
    rows: Tensor

    def weight(self) -> Tensor:
        """The gradient by the weight, (d_out, d_in); complete if the factors are those of all tokens."""
        return self.gradients.T @ self.inputs


@dataclass
class _Seen:
    """What one pass leaves at a projection: its input at the chosen tokens, and its whole output in the graph."""

    inputs: Tensor
    output: Tensor


def surprise(log_probs: Tensor) -> Tensor:
    """The sum of -log p over all answer tokens: what a prompt adds does not depend on the others in its batch."""
    return -log_probs.sum()


@spent("gradients")
def factors(
    lm: LM,
    sites: Sequence[Site],
    batch: Answers,
    tokens: str = "ans",
    loss: Callable[[Tensor], Tensor] = surprise,
) -> dict[str, Factors]:
    """The factors of some projections, from one forward and one backward pass.

    Args:
        lm: The model; it is left as it was.
        sites: The projections.
        batch: Prompts with their answers.
        tokens: ``ans``: the tokens that predict an answer token; ``mask``: all tokens of prompt and answer. In the
            encoder of an encoder-decoder model it is always all tokens, in its decoder those of the answer.
        loss: From the log-probability of each answer token, (tokens,), to a scalar.

    Returns:
        Path of the projection -> its factors.

    Raises:
        UsageError: The tokens are called something else, or a projection takes no part in the pass.
    """
    if tokens not in TOKENS:
        raise UsageError(f"Factors are taken at the tokens '{tokens}'. Choose {' or '.join(TOKENS)}.")
    if any(site.module is lm.head for site in sites):
        raise UsageError(f"The head of {lm.name} cannot be edited by factors. Name projections of its blocks.")
    places = {site.name: _places(lm, site, batch, tokens) for site in sites}
    seen: dict[str, _Seen] = {}
    with lm.frozen(), torch.enable_grad(), ExitStack() as stack:
        for site in sites:
            stack.enter_context(_watched(lm, site, len(batch.ids), places[site.name], seen))
        value = loss(token_log_probs(lm, batch))
    if absent := [site.name for site in sites if site.name not in seen]:
        raise UsageError(f"'{absent[0]}' takes no part in what {lm.name} says. Name a projection that does.")
    gradients = torch.autograd.grad(value, [seen[site.name].output for site in sites])
    found = {}
    for site, gradient in zip(sites, gradients, strict=True):
        at = places[site.name]
        g = by_row(gradient, len(batch.ids), lm.sequence_first)[at].float()
        found[site.name] = Factors(seen[site.name].inputs, g, at[0])
    return found


def factors_of(
    lm: LM, sites: Sequence[Site], pairs: Sequence[tuple[str, str]], tokens: str = "ans", at_once: int = 10
) -> dict[str, Factors]:
    """The factors of many prompts with their answers, some prompts per pass; see `factors`.

    Args:
        lm: The model.
        sites: The projections.
        pairs: Prompt, as the model is asked it, and answer.
        tokens: See `factors`.
        at_once: Prompts per pass; the factors do not depend on it.
    """
    passes = [
        factors(lm, sites, answers(lm, pairs[start : start + at_once]), tokens)
        for start in range(0, len(pairs), at_once)
    ]
    joined = {}
    for site in sites:
        parts = [each[site.name] for each in passes]
        rows = torch.cat([part.rows + i * at_once for i, part in enumerate(parts)])
        h, g = torch.cat([part.inputs for part in parts]), torch.cat([part.gradients for part in parts])
        joined[site.name] = Factors(h, g, rows)
    return joined


def _places(lm: LM, site: Site, batch: Answers, tokens: str) -> tuple[Tensor, Tensor]:
    """Rows and columns of the chosen tokens, as they are counted where the projection is."""
    inside = lm.seq2seq and any(module is site.module for module in lm.model.get_encoder().modules())  # type: ignore[operator]
    if inside or (tokens == "mask" and not lm.seq2seq):
        rows, columns = batch.mask.nonzero(as_tuple=True)
        return rows, columns
    return batch.rows, batch.columns


@contextmanager
def _watched(lm: LM, site: Site, count: int, at: tuple[Tensor, Tensor], seen: dict[str, _Seen]) -> Iterator[None]:
    """A context in which a projection leaves what `factors` needs; the lowest one is where the graph begins."""

    def after(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        taken = by_row(hidden(args).detach(), count, lm.sequence_first)[at].float()
        given = output if output.requires_grad else output.detach().requires_grad_(True)
        seen[site.name] = _Seen(taken, given)
        return given.clone()  # a model may go on writing into it

    handle = site.module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()
