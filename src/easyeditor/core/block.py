"""A whole block trained to return given states at some tokens, and what it returned before at all others. UnKE.

    min over its projections of  mean |f(x) - (h + d)|^2 where there is a vector d  +  mean |f(x) - h|^2 elsewhere

See `easyeditor.core.states` for the vectors. arXiv:2405.15349.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from easyeditor.core.fine_tuning import projections
from easyeditor.core.learn import descend
from easyeditor.core.states import Wanted, added
from easyeditor.edits.delta import Dense
from easyeditor.errors import NonFinite
from easyeditor.lm.clock import spent
from easyeditor.lm.hooks import by_row, hidden, stop_after
from easyeditor.lm.model import LM
from easyeditor.lm.text import pad

TEXT = 256  # the most tokens of a text that is to stay as it is


@dataclass(frozen=True)
class Call:
    """How a block was called for some rows, in fp32, and where.

    Args:
        args: Positional arguments, the hidden states first.
        kwargs: The others.
        mask: Which places are filled, (rows, length).
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mask: Tensor


class Block:
    """A block as a function of its projections, in fp32 whatever the model's dtype.

    Args:
        lm: The model.
        layer: The block.
    """

    def __init__(self, lm: LM, layer: int) -> None:
        self.lm, self.module = lm, lm.blocks[layer]
        self.sites = projections(lm, layer)
        self.fixed = {
            name: tensor.detach().float() if tensor.is_floating_point() else tensor
            for name, tensor in (*self.module.named_parameters(), *self.module.named_buffers())
        }
        self.names = [site.weight_name.removeprefix(f"{lm.stack}.{layer}.") for site in self.sites]
        self.deltas = [torch.zeros(site.d_out, site.d_in, device=site.weight.device) for site in self.sites]

    def call(self, ids: Tensor, mask: Tensor, decoder_ids: Tensor | None = None) -> Call:
        """Record how the model calls the block for some rows."""
        seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append((tree_map(_detached, args), tree_map(_detached, kwargs)))

        handle = self.module.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            with torch.no_grad(), stop_after(self.module):
                self.lm.run(ids, mask, decoder_input_ids=decoder_ids)
        finally:
            handle.remove()
        return Call(*seen[-1], mask)

    def __call__(self, call: Call) -> Tensor:
        """What the block returns with its weights changed, (rows, length, width)."""
        tensors = dict(self.fixed)
        for site, name, delta in zip(self.sites, self.names, self.deltas, strict=True):
            tensors[name] = self.fixed[name] + site.oriented(delta)
        out: Tensor = hidden(functional_call(self.module, tensors, call.args, call.kwargs))
        return by_row(out, len(call.mask), self.lm.sequence_first)


def _detached(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().float().clone() if value.is_floating_point() else value.detach().clone()


@spent("training")
def trained(
    lm: LM, layer: int, found: Sequence[Wanted], texts: Sequence[str], *, steps: int, lr: float
) -> tuple[dict[str, Dense], list[float]]:
    """Train the projections of a block.

    Args:
        lm: The model; it is left as it was.
        layer: The block.
        found: What it is to return.
        texts: What it returns on these is to stay.
        steps: Steps of Adam.
        lr: Adam's step size.

    Returns:
        Weight name -> change, and the loss of each step.

    Raises:
        NonFinite: The training diverges.
    """
    block = Block(lm, layer)
    terms = [_written(block, each) for each in found]
    kept = _kept(block, texts)

    def loss() -> Tensor:
        there, others, tokens, places = torch.zeros(()), torch.zeros(()), 0, 0
        for error, at in (*(term() for term in terms), *([kept()] if kept else [])):
            there, tokens = there + error[at].sum().to(there.device), tokens + int(at.sum())
            others, places = others + error[~at].sum().to(others.device), places + int((~at).sum())
        total = there / max(tokens, 1) + others / max(places, 1)
        if not torch.isfinite(total):
            raise NonFinite(
                "The training of a block diverges: its loss is no finite number. The model is as before. Lower lr."
            )
        return total[None]

    trace = descend(block.deltas, loss, steps=steps, lr=lr, final_update=True)
    changes = {site.weight_name: Dense(delta) for site, delta in zip(block.sites, block.deltas, strict=True)}
    return changes, [each[0] for each in trace]


Term = Callable[[], tuple[Tensor, Tensor]]


def _written(block: Block, found: Wanted) -> Term:
    """The squared error at each filled place of some answers, and which of these have a vector."""
    batch = found.batch
    filled = torch.ones_like(batch.decoder_ids) if batch.decoder_ids is not None else batch.mask
    call = block.call(batch.ids, batch.mask, batch.decoder_ids)
    at = torch.zeros_like(filled, dtype=torch.bool)
    at[found.rows, found.columns] = True
    with torch.no_grad():
        target = block(call)
        target = added(target, found.rows, found.columns, found.vectors)
    return _error(block, Call(call.args, call.kwargs, filled), target, at)


def _kept(block: Block, texts: Sequence[str]) -> Term | None:
    """The same for texts, none of which have a vector."""
    lm = block.lm
    rows = [lm.text.encode(text).ids[:TEXT] for text in texts]
    if not rows:
        return None
    ids, mask = pad(rows, lm.text.pad_id, "right", lm.device)
    shifted = torch.cat([torch.full_like(ids[:, :1], lm.decoder_start), ids[:, :-1]], dim=1) if lm.seq2seq else None
    call = block.call(ids, mask, shifted)
    with torch.no_grad():
        target = block(call)
    return _error(block, call, target, torch.zeros_like(mask, dtype=torch.bool))


def _error(block: Block, call: Call, target: Tensor, at: Tensor) -> Term:
    def error() -> tuple[Tensor, Tensor]:
        filled = call.mask.bool().to(target.device)
        return (block(call) - target).square().mean(-1)[filled], at.to(target.device)[filled]

    return error
