"""MELO's vector index: which low-rank block acts where, by clusters of what one module returns.

The index is a wrapper around one module that changes nothing: it leaves on the model's board, for the blocks in the
layers above, which point was met at each position of this pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from easyeditor.core.balls import GAP, SAME, Memory
from easyeditor.core.memory import standing
from easyeditor.core.nearest import Stack
from easyeditor.errors import EditFailed


@dataclass(frozen=True)
class Point:
    """What an edit puts into the index. A wrapper of a `ModuleEdit`.

    Args:
        key: What the indexed module returned at the prompt's last token, (d_out,).
        label: The answer; points of one answer share a cluster, clusters of different answers split theirs.
        block: The name of the low-rank block that acts near the key.
        index: The module path of the indexed module.
        radius: The radius of a new cluster.
        distance: ``euc`` or ``cos``.
        expand: ``moving_average``: a cluster's centre is the mean of its points; ``coverage``: it stays.
    """

    key: Tensor
    label: str
    block: str
    index: str
    radius: float
    distance: str = "euc"
    expand: str = "moving_average"

    def tensors(self) -> dict[str, Tensor]:
        """The key."""
        return {"key": self.key}

    def config(self) -> dict[str, Any]:
        """The rest."""
        names = ("label", "block", "index", "radius", "distance", "expand")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Point:
        """The point with this key and these settings."""
        return cls(tensors["key"], **config)

    @classmethod
    def combined(cls, wrappers: list[Point]) -> Clusters:
        """The index of all points, oldest first."""
        found = Clusters(wrappers[0])
        found.become(wrappers)
        return found


@dataclass(frozen=True)
class Route:
    """What was met in a pass.

    Args:
        met: The point at each position, (rows, length) or flat; -1: none.
        blocks: The block of each point.
    """

    met: Tensor
    blocks: Sequence[str]


class Clusters(Memory):
    """Clusters of points; what is met is the nearest point of the nearest cluster, inside its radius.

    Args:
        first: A point, for the width.

    Attributes:
        labels: The answer of each cluster.
        members: The points of each cluster, by number.
        board: Where the route is left.
    """

    alike = ("distance", "index")

    def __init__(self, first: Point) -> None:
        super().__init__(len(first.key), first.distance, first.key.device)
        self.board: dict[str, Any] = {}
        self.labels: list[str] = []
        self.members: list[list[int]] = []
        self._points = Stack(len(first.key), device=first.key.device)
        self._blocks: list[str] = []

    def become(self, entries: Sequence[Point]) -> None:
        """Be the index of these entries, oldest first; see `Memory.follow`."""
        self.follow(entries, self._add)

    def _add(self, entry: Point) -> None:
        """A cluster of its own, or a place in one of the same answer; two of different answers are split."""
        key, number = entry.key.to(self.keys.device), len(self.entries) - 1
        self._points.append(self._point(key))
        self._blocks.append(entry.block)
        self.undoing(lambda: self._shorten(number))
        distances, nearest = self.nearest(key[None], entry.radius + self.reach)
        d, i = float(distances[0]), int(nearest[0])
        if not len(self) or d > entry.radius + float(self.radii[i]):
            self._append(entry, entry.radius)
        elif self.labels[i] == entry.label:
            self._list(i, [*self.members[i], number])
            if entry.expand == "coverage":
                self.change(i, max(float(self.radii[i]), d))
            else:
                points = self._points.rows[self.members[i]]
                centre = self._point(points.mean(dim=0))
                self.change(i, max(float(self._far(points, centre).max()), entry.radius), centre)
        elif d < SAME * entry.radius:
            self.change(i, -1.0)
            self._append(entry, entry.radius)
        else:
            radius = min(float(self.radii[i]), d / 2 * (1 - GAP))
            self.change(i, radius)
            inside = (self._far(self._points.rows[self.members[i]], self.keys[i]) <= radius).tolist()
            self._list(i, [point for point, there in zip(self.members[i], inside, strict=True) if there])
            self._append(entry, d / 2)

    def _far(self, points: Tensor, centre: Tensor) -> Tensor:
        apart: Tensor = torch.linalg.vector_norm(points - centre, dim=-1)
        return apart.square() / 2 if self.distance == "cos" else apart

    def _append(self, entry: Point, radius: float) -> None:
        self.append(entry.key.to(self.keys.device), radius)
        self.labels.append(entry.label)
        self.members.append([len(self.entries) - 1])

    def _list(self, index: int, members: list[int]) -> None:
        known = self.members[index]

        def back() -> None:
            self.members[index] = known

        self.undoing(back)
        self.members[index] = members

    def _shorten(self, count: int) -> None:
        self._points.cut(count)
        del self._blocks[count:]

    def cut(self, count: int) -> None:
        """Keep the first clusters only."""
        super().cut(count)
        del self.labels[count:], self.members[count:]

    def to(self, device: torch.device) -> None:
        """Move all of it, if it is elsewhere."""
        super().to(device)
        self._points.to(device)

    def __call__(self, states: Tensor, output: Tensor) -> Tensor:
        """Look up what the module returned, (..., d_out), and leave the route; nothing is changed."""
        flat = output.detach().reshape(-1, output.shape[-1])
        clusters = self.met(flat)
        points = torch.full_like(clusters, -1)
        for cluster in sorted(set(clusters[clusters >= 0].tolist())):
            if members := self.members[cluster]:
                places = (clusters == cluster).nonzero(as_tuple=True)[0]
                asked = self._point(flat[places])
                far = torch.stack([self._far(asked, self._points.rows[member]) for member in members])
                points[places] = torch.tensor(members, device=points.device)[far.argmin(dim=0)]
        self.board[self.entries[0].index] = Route(points.reshape(output.shape[:-1]), self._blocks)
        return output


@dataclass(frozen=True)
class Block:
    """A low-rank block beside a projection. A wrapper of a `ModuleEdit`.

    Args:
        left: (d_out, r).
        right: (r, d_in).
        name: What points call it.
        index: The module path of the index that says where it acts.
        scale: What its product is multiplied by.
        replacement: ``replace_last``: it acts where its key was met; ``replace_prompt``: there and at all positions
            before; ``replace_all``: at all positions of the pass.
    """

    left: Tensor
    right: Tensor
    name: str
    index: str
    scale: float = 1.0
    replacement: str = "replace_last"

    def tensors(self) -> dict[str, Tensor]:
        """Both factors."""
        return {"left": self.left, "right": self.right}

    def config(self) -> dict[str, Any]:
        """The rest."""
        return {name: getattr(self, name) for name in ("name", "index", "scale", "replacement")}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Block:
        """The block with these factors."""
        return cls(tensors["left"], tensors["right"], **config)

    @classmethod
    def combined(cls, wrappers: list[Block]) -> Blocks:
        """All blocks beside a projection."""
        return Blocks(wrappers)


class Blocks:
    """The blocks beside a projection; each position gets the one that the index has met there.

    Args:
        blocks: The blocks.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.board: dict[str, Any] = {}
        self.become(blocks)

    def become(self, blocks: Sequence[Block]) -> None:
        """Hold these blocks and no others."""
        self._by_index: dict[str, dict[str, Block]] = {}
        for block in blocks:
            self._by_index.setdefault(block.index, {})[block.name] = block

    def __call__(self, states: Tensor, output: Tensor) -> Tensor:
        """What the projection returns, with what the blocks add.

        Args:
            states: What it took in, (..., d_in).
            output: What it returned, (..., d_out).

        Raises:
            NotRouted: The index was not passed on the way here.
        """
        taken, given = (x.reshape(-1, x.shape[-1]) for x in (states, output))
        added: Tensor | None = None
        for index, blocks in self._by_index.items():
            route = self._route(index, len(taken))
            first = next(iter(blocks.values()))
            where, what = standing(route.met.to(taken.device), first.replacement)
            where, what = (x.reshape(-1).repeat(len(taken) // x.numel()) for x in (where, what))
            for point in sorted(set(what[where].tolist())):
                block = blocks.get(route.blocks[point])
                if block is None:
                    continue
                (places,) = (where & (what == point)).nonzero(as_tuple=True)
                left, right = block.left.to(taken.device), block.right.to(taken.device)
                change = block.scale * (taken[places].float() @ right.T @ left.T)
                added = torch.zeros_like(given, dtype=torch.float32) if added is None else added
                added = added.index_add(0, places, change)
        return output if added is None else (given.float() + added).to(output.dtype).reshape(output.shape)

    def _route(self, index: str, positions: int) -> Route:
        route: Route | None = self.board.get(index)
        if route is None or positions % route.met.numel():
            raise NotRouted(
                f"A block of MELO was reached by a pass that left out '{index}', where it is decided which block acts. "
                "Take the edits of MELO back first, or edit with a method that runs the whole model."
            )
        return route


class NotRouted(EditFailed):
    """A part of the model was run without the part that says which blocks act."""


class Part:
    """What `easyeditor.edits.store` restores an edit of MELO with: the index or a block."""

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Point | Block:
        """The one whose tensors and settings these are."""
        return Point.restore(tensors, config) if "key" in tensors else Block.restore(tensors, config)
