"""What the trainer asks of an editor that is trained; see `easyeditor.trainer`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

from torch import Tensor, nn

from easyeditor.requests import EditRequest

TOTAL = "loss/total"  # what is descended


@dataclass(frozen=True)
class Visit:
    """A request of the training or validation set, each time that it is seen.

    Args:
        request: The request.
        place: Where it stands in its set.
        epoch: How often the set was seen before; None in validation.
        other: Another request of the set, for an editor that needs something unrelated.
    """

    request: EditRequest
    place: int
    epoch: int | None
    other: EditRequest | None = None

    @property
    def key(self) -> tuple[bool, int]:
        """What is the same each time that it is seen."""
        return self.epoch is None, self.place

    def drawing(self, seed: int) -> Random:
        """What draws for this visit: the same in every process, and after a restart."""
        return Random(f"{seed}/{self.epoch}/{self.place}")


class Trainable(Protocol):
    """An editor that is trained."""

    @property
    def module(self) -> nn.Module:
        """What is trained; its state is the archive."""

    def prepare(self, visits: Sequence[Visit]) -> None:
        """Look at some of the training set before the first step, such as for means and deviations."""

    def parameters(self) -> list[dict[str, Any]]:
        """The groups that an optimiser of torch takes."""

    def losses(self, groups: Sequence[Sequence[Visit]]) -> Mapping[str, Tensor]:
        """What is measured of some batches, each edited by itself.

        Args:
            groups: For each batch the requests that are edited together.

        Returns:
            Name -> one number per batch, (groups,); in validation, one for each batch that it can be measured of.
            ``loss/total`` is what is descended; ``loss/edit``, ``loss/loc`` and ``edit/acc`` are what the progress bar
            shows.
        """

    def header(self) -> Mapping[str, Any]:
        """What the archive has to say of itself: ``base`` (fingerprints) and whatever restores the editor."""
