"""Looking into a forward pass and changing what passes by. All of it is a context, and nothing stays behind.

Modules return tensors, tuples or model outputs; the hidden states are the tensor, or the first tensor in it. What is
captured is a clone, because some models go on writing into it (Falcon adds attention into the MLP's output).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import FastGELUActivation, NewGELUActivation


class Stopped(Exception):
    """Raised inside a forward pass to leave it; `stop_after` catches it."""


def hidden(value: Any) -> Tensor:
    """The hidden states in what a module takes or returns.

    Raises:
        TypeError: There is no tensor in it.
    """
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        value = [value["hidden_states"]] if "hidden_states" in value else list(value.values())
    for item in value:
        if isinstance(item, Tensor):
            return item
    raise TypeError(f"Expected hidden states, got {type(value).__name__} without a tensor in it.")


def with_hidden(value: Any, new: Tensor) -> Any:
    """The same value with other hidden states in it: a tensor stays a tensor, a tuple a tuple."""
    if isinstance(value, Tensor):
        return new
    if isinstance(value, tuple | list):
        return type(value)([new, *value[1:]])
    key = next(name for name, item in value.items() if isinstance(item, Tensor))
    out = type(value)(**value)
    out[key] = new
    return out


@contextmanager
def capture(module: nn.Module, kind: str = "output") -> Iterator[list[Tensor]]:
    """Collect clones of what a module takes or returns, one per call.

    Args:
        module: The module.
        kind: ``input`` or ``output``.

    Yields:
        The list that fills up.
    """
    seen: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(hidden(args if args else kwargs).clone())

    def after(_: nn.Module, __: Any, output: Any) -> None:
        seen.append(hidden(output).clone())

    handle = (
        module.register_forward_pre_hook(before, with_kwargs=True)
        if kind == "input"
        else module.register_forward_hook(after)
    )
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def replace(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace what a module returns.

    Args:
        module: The module.
        change: Old hidden states to new ones.
    """

    def after(_: nn.Module, __: Any, output: Any) -> Any:
        return with_hidden(output, change(hidden(output)))

    handle = module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def by_row(states: Tensor, rows: int, sequence_first: bool = False) -> Tensor:
    """Hidden states as (rows, length, width), however a model lays them out.

    Args:
        states: (rows, length, width), flattened to (rows * length, width), or (length, rows, width).
        rows: The number of rows.
        sequence_first: Whether positions come before rows; the numbers alone cannot tell.
    """
    if sequence_first:
        return states.reshape(-1, rows, states.shape[-1]).transpose(0, 1)
    return states.reshape(rows, -1, states.shape[-1])


@contextmanager
def add_at(module: nn.Module, positions: Tensor, delta: Tensor, sequence_first: bool = False) -> Iterator[None]:
    """Add vectors to what a module returns, at one position of each row.

    Args:
        module: The module; its output is laid out in any of the ways of `by_row`.
        positions: One position per row, (rows,).
        delta: What to add, (width,) or (rows, width); gradients flow into it.
        sequence_first: See `by_row`.
    """

    def change(states: Tensor) -> Tensor:
        rows = len(positions)
        changed = states.clone()
        shaped = by_row(changed, rows, sequence_first)
        index = torch.arange(rows, device=states.device), positions.to(states.device)
        shaped[index] = shaped[index] + delta.to(states)
        return shaped.transpose(0, 1).reshape(states.shape) if sequence_first else shaped.reshape(states.shape)

    with replace(module, change):
        yield


@contextmanager
def stop_after(module: nn.Module) -> Iterator[None]:
    """Leave the forward pass as soon as a module has returned."""

    def stop(_: nn.Module, __: Any, ___: Any) -> None:
        raise Stopped

    handle = module.register_forward_hook(stop)
    try:
        yield
    except Stopped:
        pass
    finally:
        handle.remove()


@contextmanager
def fused_activations(model: nn.Module) -> Iterator[None]:
    """A context in which GELU's tanh form is one operation instead of eight; the function is the same.

    Args:
        model: The model; its modules are put back after.
    """
    swapped = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, NewGELUActivation | FastGELUActivation)
    ]
    for parent, name, _ in swapped:
        setattr(parent, name, nn.GELU(approximate="tanh"))
    try:
        yield
    finally:
        for parent, name, child in swapped:
            setattr(parent, name, child)
