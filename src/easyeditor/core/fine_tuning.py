"""Training the weights of a few projections and nothing else; the change is a tensor of its own, never in the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from easyeditor.core.learn import minibatches, train
from easyeditor.core.reading import refuse_ruin
from easyeditor.edits.delta import Dense
from easyeditor.edits.edit import WeightEdit
from easyeditor.lm.hooks import fused_activations
from easyeditor.lm.model import LM
from easyeditor.lm.resume import with_weight
from easyeditor.lm.structure import Site
from easyeditor.requests import EditRequest


@dataclass(frozen=True)
class Training:
    """How projections are trained.

    Args:
        epochs: How often each request is seen, at most.
        lr: Adam's step size.
        batch_size: Requests per step.
        weight_decay: Adam's L2 factor, on the weights.
        bound: The largest change of any weight; 0: no bound.
        at_prompt_end: Whether all tokens of an answer are predicted from the prompt's last token (FT-L).
        with_end: Whether the end-of-text token belongs to the answer.
    """

    epochs: int
    lr: float
    batch_size: int
    weight_decay: float = 0.0
    bound: float = 0.0
    at_prompt_end: bool = False
    with_end: bool = False


def fine_tuned(lm: LM, requests: Sequence[EditRequest], sites: Sequence[Site], training: Training) -> WeightEdit:
    """The dense change of some projections that makes the new answers likely.

    Args:
        lm: The model; it is left as it is.
        requests: What to learn.
        sites: The projections; all other weights stay.
        training: How.

    Returns:
        One `Dense` change in fp32 per site; the notes hold the mean loss of each epoch.

    Raises:
        NonFinite: The loss is not a finite number.
        EditFailed: The trained model would read ordinary text worse than by guessing.
    """
    deltas = [torch.zeros(site.d_out, site.d_in, device=site.weight.device) for site in sites]
    first = min(lm.block_of(site) for site in sites)
    options = {"at_prompt_end": training.at_prompt_end, "with_end": training.with_end}

    def decay() -> Tensor:
        squares = [(site.matrix() + delta).square().sum() for site, delta in zip(sites, deltas, strict=True)]
        return training.weight_decay / 2 * torch.stack(squares).sum()

    def clamp() -> None:
        for delta in deltas:
            delta.clamp_(-training.bound, training.bound)

    with lm.frozen(), fused_activations(lm.model), _weights(sites, deltas):
        batches = minibatches(lm, requests, training.batch_size, first, **options)
        losses = train(
            deltas,
            [batch.loss for batch in batches],
            epochs=training.epochs,
            lr=training.lr,
            penalty=decay if training.weight_decay else None,
            project=clamp if training.bound else None,
        )
    changes = {site.weight_name: Dense(delta) for site, delta in zip(sites, deltas, strict=True)}
    edit = WeightEdit(deltas=changes, notes={"losses": losses})
    refuse_ruin(lm, edit, training.lr)
    return edit


def projections(lm: LM, layer: int) -> list[Site]:
    """Every Linear or Conv1D of a block."""
    block = lm.blocks[layer]
    inside = [name for name, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    return [lm.site(f"{lm.stack}.{layer}.{name}") for name in inside]


@contextmanager
def _weights(sites: Sequence[Site], deltas: Sequence[Tensor]) -> Iterator[None]:
    """A context in which each site computes with W + D."""
    with ExitStack() as stack:
        for site, delta in zip(sites, deltas, strict=True):
            stack.enter_context(with_weight(site.module, _sum(site.matrix(), delta)))
        yield


def _sum(weight: Tensor, delta: Tensor) -> Callable[[], Tensor]:
    return lambda: weight + delta
