"""Training the weights of a few projections and nothing else; the change is a tensor of its own, never in the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from easyeditor.core.learn import minibatches, refuse_quantised, train
from easyeditor.core.reading import refuse_ruin
from easyeditor.edits.delta import Dense
from easyeditor.edits.edit import WeightEdit
from easyeditor.hparams.fine_tuning import FineTuning
from easyeditor.lm.hooks import fused_activations
from easyeditor.lm.model import LM
from easyeditor.lm.resume import with_weight
from easyeditor.lm.structure import Site
from easyeditor.requests import EditRequest


def fine_tuned(
    lm: LM,
    requests: Sequence[EditRequest],
    hparams: FineTuning,
    *,
    with_end: bool = False,
    size: int | None = None,
    whole_blocks: bool = False,
) -> WeightEdit:
    """The dense change of some projections that makes the new answers likely.

    Args:
        lm: The model; it is left as it is.
        requests: What to learn.
        hparams: Which blocks are trained, and how.
        with_end: Whether the end-of-text token belongs to the answer.
        size: Requests per step; None: the settings' batch size.
        whole_blocks: Whether all projections of a block are trained, instead of the MLP's output projection.

    Returns:
        One `Dense` change in fp32 per projection; the notes hold the mean loss of each epoch.

    Raises:
        UsageError: The base is quantised.
        NonFinite: The loss is not a finite number.
        EditFailed: The trained model would read ordinary text worse than by guessing.
    """
    layers = sorted(hparams.layers)
    sites = [site for i in layers for site in projections(lm, i)] if whole_blocks else [lm.mlp_out(i) for i in layers]
    refuse_quantised(lm, sites)
    deltas = [torch.zeros(site.d_out, site.d_in, device=site.weight.device) for site in sites]
    options = {"at_prompt_end": hparams.objective_optimization == "prompt_last", "with_end": with_end}
    bound = float(hparams.norm_constraint)

    def decay() -> Tensor:
        squares = [(site.matrix() + delta).square().sum() for site, delta in zip(sites, deltas, strict=True)]
        return hparams.weight_decay / 2 * torch.stack(squares).sum()

    def clamp() -> None:
        for delta in deltas:
            delta.clamp_(-bound, bound)

    with lm.frozen(), fused_activations(lm.model), _weights(sites, deltas):
        batches = minibatches(lm, requests, size or hparams.batch_size, layers[0], **options)
        losses = train(
            deltas,
            [batch.loss for batch in batches],
            epochs=hparams.num_steps,
            lr=hparams.lr,
            penalty=decay if hparams.weight_decay else None,
            project=clamp if bound else None,
        )
    changes = {site.weight_name: Dense(delta) for site, delta in zip(sites, deltas, strict=True)}
    edit = WeightEdit(deltas=changes, notes={"losses": losses})
    refuse_ruin(lm, edit, hparams.lr)
    return edit


def projections(lm: LM, layer: int) -> list[Site]:
    """Every Linear or Conv1D of a block."""
    lm.mlp_out(layer)  # a block that is not there is refused by name
    block = lm.blocks[layer]
    inside = [name for name, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    return [lm.site(f"{lm.stack}.{layer}.{name}") for name in inside]


@contextmanager
def _weights(sites: Sequence[Site], deltas: Sequence[Tensor]) -> Iterator[None]:
    """A context in which each site computes with W + D."""
    with ExitStack() as stack:
        for site, delta in zip(sites, deltas, strict=True):
            stack.enter_context(with_weight(site.module, _sum(site.matrix().contiguous(), delta)))
        yield


def _sum(weight: Tensor, delta: Tensor) -> Callable[[], Tensor]:
    return lambda: weight + delta
