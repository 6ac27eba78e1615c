"""Running only the upper part of a model: blocks below a cut are not computed, their known result is put in instead.

What lies below the place where something changes is the same in every step of an optimisation. It is computed once,
with `cut_at`; `resumed` then lets the model's own forward pass begin at the cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from easyeditor.lm.hooks import hidden, with_hidden
from easyeditor.lm.model import LM


@dataclass
class Cut:
    """A place between two blocks.

    Args:
        first: The first block above it; with 0 nothing lies below.
        output: What the block below returned, once recorded.
        sequence_first: Whether that is (length, rows, width).
        board: What wrappers below it have left for those above; see `easyeditor.lm.model.Kept`.
    """

    first: int
    output: Any = None
    sequence_first: bool = False
    board: dict[str, Any] = field(default_factory=dict)

    @property
    def states(self) -> Tensor:
        """The hidden states that pass through the cut, (rows, length, width)."""
        states = hidden(self.output)
        return states.transpose(0, 1) if self.sequence_first else states

    def carrying(self, states: Tensor) -> Any:
        """What the block below would return with other hidden states in it, given as (rows, length, width)."""
        return with_hidden(self.output, states.transpose(0, 1).contiguous() if self.sequence_first else states)

    def since(self, column: int) -> Cut:
        """The cut with the columns from one on; with nothing below, itself."""
        if self.first == 0:
            return self
        return Cut(self.first, self.carrying(self.states[:, column:].contiguous()), self.sequence_first)


@contextmanager
def cut_at(lm: LM, first: int) -> Iterator[Cut]:
    """Record what passes from the block below ``first`` upwards during one forward pass."""
    cut = Cut(first, sequence_first=lm.sequence_first)

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        cut.output = with_hidden(output, hidden(output).detach().clone())
        cut.board = dict(lm.kept.board)

    if first == 0:
        yield cut
        return
    handle = lm.blocks[first - 1].register_forward_hook(keep)
    try:
        yield cut
    finally:
        handle.remove()


@contextmanager
def resumed(lm: LM, cut: Cut, states: Tensor) -> Iterator[None]:
    """A context in which the forward pass begins at a cut.

    Args:
        lm: The model.
        cut: The recorded place.
        states: The hidden states to go on with, (rows, length, width).
    """
    result = cut.carrying(states) if cut.first else None
    if cut.first:  # what an earlier pass has left there belongs to other rows
        lm.kept.board.clear()
        lm.kept.board.update(cut.board)
    with ExitStack() as stack:
        for block in lm.blocks[: cut.first]:
            stack.enter_context(instead_of(block, lambda *_, **__: result))
        yield


@contextmanager
def instead_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """A context in which a module's forward is another function."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@dataclass
class HeadAt:
    """Which positions the head is applied to.

    Args:
        rows: (n,).
        columns: (n,).
    """

    rows: Tensor
    columns: Tensor
    used: bool = field(default=False, init=False)

    def logits(self, logits: Tensor) -> Tensor:
        """The logits at the positions, (n, vocab), whether or not the head was restricted to them."""
        return logits.reshape(len(self.rows), -1) if self.used else logits[self.rows, self.columns]


@contextmanager
def head_at(lm: LM, rows: Tensor, columns: Tensor) -> Iterator[HeadAt]:
    """A context in which the head, which costs as much as several blocks, sees a few positions only.

    Args:
        lm: The model.
        rows: (n,).
        columns: (n,).

    Yields:
        What picks the n logits out of the model's output.
    """
    at = HeadAt(rows.to(lm.device), columns.to(lm.device))

    def pick(_: nn.Module, args: tuple[Any, ...]) -> Any:
        if not args or not isinstance(args[0], Tensor) or args[0].dim() != 3:
            return None
        at.used = True
        place = args[0].device
        return (args[0][at.rows.to(place), at.columns.to(place)].unsqueeze(0), *args[1:])

    find = getattr(lm.model, "get_output_embeddings", None)
    head = find() if find is not None else None
    if head is None or lm.sequence_first:  # the head of such a model may see either layout
        yield at
        return
    handle = head.register_forward_pre_hook(pick)
    lm.kept.picked = at
    try:
        yield at
    finally:
        lm.kept.picked = None
        handle.remove()


def with_weight(module: nn.Module, weight: Callable[[], Tensor]) -> Any:
    """A context in which a projection uses another weight, through which gradients flow; its own is not touched.

    Args:
        module: A Linear or Conv1D.
        weight: The weight to use, (d_out, d_in).
    """
    bias = module.bias

    def forward(x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, weight().to(x.dtype), bias)  # type: ignore[arg-type]

    return instead_of(module, forward)
