"""Balls around keys, and memories that are made of them.

A `Memory` is a function of the entries that are on the model, in their order: it can go from one list of entries to
another, undoing the last ones and adding others, at the cost of the difference; what it is then is what the new list
alone would have made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import is_
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from easyeditor.core.nearest import Nearest, Stack
from easyeditor.errors import UsageError

SAME = 1e-3  # keys nearer than this part of the initial radius are one key
GAP = 1e-5  # the share by which the older of two neighbouring balls stays smaller than the newer
EDGE = 1e-3  # the share of its radius by which a ball reaches further, so that rounding cannot lose a key on its edge


class Balls:
    """Balls around keys.

    Args:
        width: Of a key, d_in.
        distance: ``euc``: between the vectors; ``cos``: one minus the cosine of their angle.
        device: Where the keys are; they move to where queries come from.

    Attributes:
        radii: Of each ball, (n,), fp32; negative: switched off.
    """

    def __init__(self, width: int, distance: str = "euc", device: torch.device | str | None = None) -> None:
        self.distance = distance
        self._nearest = Nearest(width, device)
        self._radii = Stack(device=device)
        self._reach: float | None = 0.0

    def __len__(self) -> int:
        return len(self._nearest)

    @property
    def keys(self) -> Tensor:
        """All keys, (n, d_in), fp32; of unit length for ``cos``."""
        return self._nearest.points

    @property
    def radii(self) -> Tensor:
        """The radius of each ball, (n,), fp32."""
        return self._radii.rows

    @property
    def reach(self) -> float:
        """The largest radius."""
        if self._reach is None:
            self._reach = max(float(self.radii.max()), 0.0)
        return self._reach

    def append(self, key: Tensor, radius: float) -> None:
        """Add a ball."""
        self._nearest.append(self._point(key))
        self._radii.append(radius)
        self._reach = None

    def change(self, index: int, radius: float, key: Tensor | None = None) -> None:
        """Give a ball another radius and, if told, another key; a negative radius switches it off."""
        was = float(self.radii[index])
        self.radii[index] = radius
        if key is not None:
            self._nearest.move(index, self._point(key))
        if (was < 0) != (radius < 0):
            self._nearest.switch(index, radius >= 0)
        self._reach = None

    def cut(self, count: int) -> None:
        """Keep the first balls only."""
        self._nearest.cut(count)
        self._radii.cut(count)
        self._reach = None if count else 0.0

    def to(self, device: torch.device) -> None:
        """Move all of it, if it is elsewhere."""
        if self._radii.rows.device != device:
            self._nearest.to(device)
            self._radii.to(device)

    def nearest(self, queries: Tensor, within: float) -> tuple[Tensor, Tensor]:
        """The nearest key of each query, if it is not farther away than a bound.

        Args:
            queries: (m, d_in).
            within: The bound.

        Returns:
            Distance, infinite where there is none, and index, (m,) each.
        """
        self.to(queries.device)
        if self.distance == "cos":  # of unit vectors: |a - b|^2 = 2 (1 - a b)
            far, index = self._nearest.within(self._point(queries), (2 * within) ** 0.5)
            return far.square() / 2, index
        return self._nearest.within(self._point(queries), within)

    def met(self, queries: Tensor) -> Tensor:
        """The ball of the nearest key of each query that the query lies in, (m,); -1: in none."""
        distances, index = self.nearest(queries, self.reach * (1 + EDGE))
        return torch.where(distances <= self.radii[index] * (1 + EDGE), index, -1)

    def _point(self, key: Tensor) -> Tensor:
        return normalize(key.float(), dim=-1) if self.distance == "cos" else key.float()


class Memory(Balls):
    """Balls that the entries of edits put there, one after the other, and that can be taken back.

    Args:
        width: See `Balls`.
        distance: See `Balls`.
        device: See `Balls`.

    Attributes:
        entries: What it was made from, oldest first.
    """

    alike: ClassVar[tuple[str, ...]] = ("distance", "replacement")  # settings that all entries share

    def __init__(self, width: int, distance: str = "euc", device: torch.device | str | None = None) -> None:
        super().__init__(width, distance, device)
        self.entries: list[Any] = []
        self._log: list[tuple[int, list[Callable[[], None]]]] = []  # of each entry: balls before it, how to undo it

    def follow(self, entries: Sequence[Any], add: Callable[[Any], None]) -> None:
        """Take back the newest entries and add others, until it is the memory of these.

        Args:
            entries: What it is to be made from, oldest first.
            add: What an entry does to the balls; changes that `change` and `cut` cannot undo it leaves with `undoing`.

        Raises:
            UsageError: They are not of one kind; the memory is as before.
        """
        same = shared(self.entries, entries)
        check_alike([*entries[:1], *entries[same:]], self.alike)
        for _ in self.entries[same:]:
            count, steps = self._log.pop()
            self.entries.pop()
            self.cut(count)
            for step in reversed(steps):
                step()
        if not same:
            self.begin(entries[0])
        for entry in entries[same:]:
            self.entries.append(entry)
            self._log.append((len(self), []))
            add(entry)

    def begin(self, entry: Any) -> None:
        """Take over the settings of the first entry."""
        self.distance = entry.distance

    def undoing(self, step: Callable[[], None]) -> None:
        """Remember how to undo something that the newest entry does; the balls after it are gone by then."""
        self._log[-1][1].append(step)

    def change(self, index: int, radius: float, key: Tensor | None = None) -> None:
        """Give a ball another radius and, if told, another key, until the newest entry is taken back."""
        was, place = float(self.radii[index]), self.keys[index].clone()
        self.undoing(lambda: self._restore(index, was, place))
        super().change(index, radius, key)

    def _restore(self, index: int, radius: float, place: Tensor) -> None:
        Balls.change(self, index, radius)
        self._nearest.move(index, place)


def shared(known: Sequence[Any], wanted: Sequence[Any]) -> int:
    """How many of the first items two lists have in common, the very same objects."""
    length = min(len(known), len(wanted))
    if all(map(is_, known, wanted)):
        return length
    return next(i for i in range(length) if known[i] is not wanted[i])


def check_alike(entries: Sequence[Any], names: Sequence[str]) -> None:
    """Whether what shares a module was made with the same settings.

    Raises:
        UsageError: It was not.
    """
    for name in names:
        first = getattr(entries[0], name)
        if other := next((getattr(e, name) for e in entries if getattr(e, name) != first), None):
            raise UsageError(
                f"Two edits of one method share a module, one made with {name} '{first}' and one with '{other}'. "
                "Make both with the same settings, or take the first back."
            )
