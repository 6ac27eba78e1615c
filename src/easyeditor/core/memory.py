"""GRACE's codebook: a value that stands in for a module's output where what the module takes in lies near a key."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from easyeditor.core.balls import GAP, SAME, Memory
from easyeditor.core.nearest import Stack


@dataclass(frozen=True)
class Entry:
    """One entry that an edit puts into a codebook. A wrapper of a `ModuleEdit`.

    Args:
        key: What the module took in at the prompt's last token, (d_in,).
        value: What it shall return there, (d_out,).
        label: The answer; entries of one answer share a ball, entries of different answers split theirs.
        radius: The radius of a new ball.
        distance: ``euc`` or ``cos``.
        expand: ``coverage``: a ball grows to cover a new key of its answer; ``moving_average``: it also moves there.
        replacement: ``replace_last``: the output is replaced where the key was met; ``replace_prompt``: there and at
            all positions before; ``replace_all``: at all positions of the pass.
    """

    key: Tensor
    value: Tensor
    label: str
    radius: float
    distance: str = "euc"
    expand: str = "coverage"
    replacement: str = "replace_last"

    def tensors(self) -> dict[str, Tensor]:
        """Key and value."""
        return {"key": self.key, "value": self.value}

    def config(self) -> dict[str, Any]:
        """The rest."""
        return {
            "label": self.label,
            "radius": self.radius,
            "distance": self.distance,
            "expand": self.expand,
            "replacement": self.replacement,
        }

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Entry:
        """The entry with these tensors and settings."""
        return cls(tensors["key"], tensors["value"], **config)

    @classmethod
    def combined(cls, wrappers: list[Entry]) -> Callable[[Tensor, Tensor], Tensor]:
        """One function for all entries on a module, oldest first."""
        return Codebook.of(wrappers)


class Codebook(Memory):
    """Balls around keys, and what is returned inside each.

    Args:
        first: An entry, for the widths.

    Attributes:
        labels: The answer of each ball.
    """

    def __init__(self, first: Entry) -> None:
        super().__init__(len(first.key), first.distance, first.key.device)
        self.replacement = first.replacement
        self.labels: list[str] = []
        self._values = Stack(len(first.value), device=first.value.device)

    @classmethod
    def of(cls, entries: Sequence[Entry]) -> Codebook:
        """The codebook that results from adding entries one after the other."""
        book = cls(entries[0])
        book.become(entries)
        return book

    def begin(self, entry: Entry) -> None:
        """Take over the settings of the first entry."""
        self.distance, self.replacement = entry.distance, entry.replacement

    @property
    def values(self) -> Tensor:
        """What is returned in each ball, (n, d_out), fp32."""
        return self._values.rows

    def become(self, entries: Sequence[Entry]) -> None:
        """Be the codebook of these entries, oldest first; see `Memory.follow`."""
        self.follow(entries, self._add)

    def _add(self, entry: Entry) -> None:
        """GRACE, algorithm 1: add a ball, let a ball of the same answer grow, or split two of different answers."""
        key = entry.key.to(self.keys.device)
        distances, nearest = self.nearest(key[None], entry.radius + self.reach)
        d, i = float(distances[0]), int(nearest[0])
        if not len(self) or d > entry.radius + float(self.radii[i]):
            self._append(entry, entry.radius)
        elif self.labels[i] == entry.label:
            value, old = self.values[i].clone(), float(self.radii[i])
            self.undoing(lambda: self._put(i, value))
            self._put(i, entry.value)
            if d > old:
                middle = (self.keys[i] + self._point(key)) / 2
                self.change(i, d, middle if entry.expand == "moving_average" else None)
        elif d < SAME * entry.radius:
            self.change(i, -1.0)
            self._append(entry, entry.radius)
        else:
            self.change(i, min(float(self.radii[i]), d / 2 * (1 - GAP)))
            self._append(entry, d / 2)

    def joined(self, key: Tensor, label: str, radius: float) -> Tensor | None:
        """The value of the ball that a new entry would share, (d_out,); None: it would get its own."""
        distances, nearest = self.nearest(key[None], radius + self.reach)
        i = int(nearest[0])
        if not len(self) or self.labels[i] != label or float(distances[0]) > radius + float(self.radii[i]):
            return None
        return self.values[i].clone()

    def _append(self, entry: Entry, radius: float) -> None:
        self.append(entry.key.to(self.keys.device), radius)
        self._values.append(entry.value)
        self.labels.append(entry.label)

    def _put(self, index: int, value: Tensor) -> None:
        self.values[index] = value

    def cut(self, count: int) -> None:
        """Keep the first balls only."""
        super().cut(count)
        self._values.cut(count)
        del self.labels[count:]

    def to(self, device: torch.device) -> None:
        """Move all of it, if it is elsewhere."""
        super().to(device)
        self._values.to(device)

    def __call__(self, states: Tensor, output: Tensor) -> Tensor:
        """The module's output with the values put in where a key is met.

        Args:
            states: What the module took in, (..., d_in).
            output: What it returned, (..., d_out).
        """
        index = self.met(states.reshape(-1, states.shape[-1])).to(output.device)
        met = (index >= 0).reshape(output.shape[:-1])
        if not met.any():
            return output
        places, values = standing(index.reshape(met.shape), self.replacement)
        return torch.where(places[..., None], self.values[values.clamp(min=0)].to(output), output)


def standing(index: Tensor, replacement: str) -> tuple[Tensor, Tensor]:
    """Where what was met takes effect.

    Args:
        index: What was met at each position, (rows, length) or flat; -1: nothing.
        replacement: See `Entry`.

    Returns:
        At which positions something takes effect, and what, both shaped as the index.
    """
    if replacement == "replace_last" or index.dim() < 2:
        return index >= 0, index
    length = index.shape[1]
    places = torch.arange(length, device=index.device)[None]
    last = torch.where(index >= 0, places, -1).max(dim=1, keepdim=True).values  # (rows, 1)
    chosen = index.gather(1, last.clamp(min=0)).expand_as(index)
    reach = last if replacement == "replace_prompt" else torch.where(last < 0, -1, length)
    return places <= reach, chosen
