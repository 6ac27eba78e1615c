"""The change of one weight, as (d_out, d_in) whatever the orientation of its module: low rank, dense, or some rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from easyeditor.errors import DamagedFile


@dataclass(frozen=True, eq=False)
class LowRank:
    """``left @ right.T``.

    Args:
        left: (d_out, r).
        right: (d_in, r).
    """

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.left.shape[0], self.right.shape[0]

    @property
    def rank(self) -> int:
        """The number of columns."""
        return self.left.shape[1]

    def add_to(self, matrix: Tensor) -> None:
        """Add to a floating (d_out, d_in) matrix in place."""
        matrix += self.left.to(matrix) @ self.right.to(matrix).T

    def scaled(self, factor: float) -> LowRank:
        """The change times a number."""
        return LowRank(self.left * factor, self.right)

    def tensors(self) -> dict[str, Tensor]:
        """What is saved."""
        return {"left": self.left, "right": self.right}


@dataclass(frozen=True, eq=False)
class Dense:
    """A matrix of the weight's size.

    Args:
        matrix: (d_out, d_in).
    """

    matrix: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.matrix.shape[0], self.matrix.shape[1]

    @property
    def rank(self) -> int:
        """At most this."""
        return min(self.matrix.shape)

    def add_to(self, matrix: Tensor) -> None:
        """Add to a floating (d_out, d_in) matrix in place."""
        matrix += self.matrix.to(matrix)

    def scaled(self, factor: float) -> Dense:
        """The change times a number."""
        return Dense(self.matrix * factor)

    def tensors(self) -> dict[str, Tensor]:
        """What is saved."""
        return {"matrix": self.matrix}


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of a weight, such as the embeddings of some tokens.

    Args:
        index: (n,), int64.
        values: (n, d_in).
        height: The number of rows of the whole weight, d_out.
    """

    index: Tensor
    values: Tensor
    height: int

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.height, self.values.shape[1]

    @property
    def rank(self) -> int:
        """At most this."""
        return len(self.index)

    def add_to(self, matrix: Tensor) -> None:
        """Add to a floating (d_out, d_in) matrix in place."""
        matrix.index_add_(0, self.index.to(matrix.device), self.values.to(matrix))

    def scaled(self, factor: float) -> Rows:
        """The change times a number."""
        return Rows(self.index, self.values * factor, self.height)

    def tensors(self) -> dict[str, Tensor]:
        """What is saved."""
        return {"index": self.index, "values": self.values, "height": torch.tensor(self.height)}


Delta = LowRank | Dense | Rows


def plus(a: Delta, b: Delta) -> Delta:
    """The sum of two changes of one weight: low rank stays low rank, rows stay rows."""
    if isinstance(a, LowRank) and isinstance(b, LowRank):
        return LowRank(torch.cat([a.left, b.left], dim=1), torch.cat([a.right, b.right], dim=1))
    if isinstance(a, Rows) and isinstance(b, Rows):
        return Rows(torch.cat([a.index, b.index]), torch.cat([a.values, b.values]), a.height)
    return Dense(dense(a) + dense(b))


def dense(delta: Delta) -> Tensor:
    """The change as a matrix, (d_out, d_in), fp32."""
    device = next(iter(delta.tensors().values())).device
    out = torch.zeros(delta.shape, device=device)
    delta.add_to(out)
    return out


def from_tensors(tensors: Mapping[str, Tensor]) -> Delta:
    """The change whose `tensors` these are.

    Raises:
        DamagedFile: They are those of no kind of change.
    """
    names = set(tensors)
    if names == {"left", "right"}:
        return LowRank(tensors["left"], tensors["right"])
    if names == {"matrix"}:
        return Dense(tensors["matrix"])
    if names == {"index", "values", "height"}:
        return Rows(tensors["index"], tensors["values"], int(tensors["height"]))
    raise DamagedFile(f"A saved change holds the tensors {sorted(names)}; expected left and right, or matrix, or rows.")
