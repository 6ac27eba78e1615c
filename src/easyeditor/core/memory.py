"""Gated memories: a codebook of keys, values and radii that stands in for a module's output near its keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SAME = 1e-3  # keys nearer than this part of the initial radius are one key
GAP = 1e-5  # the share by which the older of two neighbouring balls stays smaller than the newer


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


@dataclass
class Codebook:
    """Balls around keys, and what is returned inside each.

    Args:
        keys: (n, d_in), fp32.
        values: (n, d_out), fp32.
        radii: (n,), fp32; negative: switched off.
        labels: The answer of each.
        distance: See `Entry`.
        replacement: See `Entry`.
    """

    keys: Tensor
    values: Tensor
    radii: Tensor
    labels: list[str]
    distance: str = "euc"
    replacement: str = "replace_last"

    @classmethod
    def of(cls, entries: list[Entry]) -> Codebook:
        """The codebook that results from adding entries one after the other."""
        first = entries[0]
        book = cls(
            first.key[None].float(),
            first.value[None].float(),
            torch.tensor([first.radius], device=first.key.device),
            [first.label],
            first.distance,
            first.replacement,
        )
        for entry in entries[1:]:
            book.add(entry)
        return book

    def add(self, entry: Entry) -> None:
        """GRACE, algorithm 1: add a ball, let a ball of the same answer grow, or split two of different answers."""
        distances, nearest = self.nearest(entry.key[None].float())
        d, i = float(distances[0]), int(nearest[0])
        if d > entry.radius + float(self.radii[i]):
            self._append(entry, entry.radius)
        elif self.labels[i] == entry.label:
            self.values[i] = entry.value.to(self.values)
            if d > float(self.radii[i]):
                self.radii[i] = d
                if entry.expand == "moving_average":
                    self.keys[i] = (self.keys[i] + entry.key.to(self.keys)) / 2
        elif d < SAME * entry.radius:
            self.radii[i] = -1.0
            self._append(entry, entry.radius)
        else:
            self.radii[i] = min(float(self.radii[i]), d / 2 * (1 - GAP))
            self._append(entry, d / 2)

    def _append(self, entry: Entry, radius: float) -> None:
        self.keys = torch.cat([self.keys, entry.key[None].to(self.keys)])
        self.values = torch.cat([self.values, entry.value[None].to(self.values)])
        self.radii = torch.cat([self.radii, torch.tensor([radius], device=self.radii.device)])
        self.labels.append(entry.label)

    def nearest(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Distance to and index of the nearest key that is not switched off, of each query (m, d_in)."""
        if self.distance == "cos":
            normed = torch.nn.functional.normalize
            distances = 1 - normed(queries, dim=-1) @ normed(self.keys.to(queries.device), dim=-1).T
        else:
            distances = torch.cdist(queries, self.keys.to(queries), compute_mode="donot_use_mm_for_euclid_dist")
        off = (self.radii < 0).to(queries.device)
        best = distances.masked_fill(off, torch.inf).min(dim=-1)
        return best.values, best.indices

    def __call__(self, states: Tensor, output: Tensor) -> Tensor:
        """The module's output with the values put in where a key is met.

        Args:
            states: What the module took in, (..., d_in).
            output: What it returned, (..., d_out).
        """
        distances, index = self.nearest(states.reshape(-1, states.shape[-1]).float())
        met = (distances <= self.radii.to(distances.device)[index]).reshape(output.shape[:-1])
        if not met.any():
            return output
        values = self.values.to(output)[index.to(output.device)].reshape(output.shape)
        if self.replacement == "replace_last" or output.dim() < 3:
            return torch.where(met[..., None], values, output)
        length = output.shape[1]
        last = torch.where(met, torch.arange(length, device=met.device), -1).max(dim=1).values  # (rows,)
        chosen = values[torch.arange(len(output)), last.clamp(min=0)][:, None]
        reach = last if self.replacement == "replace_prompt" else torch.where(last < 0, -1, length)
        where = torch.arange(length, device=met.device)[None] <= reach[:, None]
        return torch.where(where[..., None], chosen, output)
