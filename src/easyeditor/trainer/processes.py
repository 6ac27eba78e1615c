"""The processes of a training, on one machine or several: who does what, and what all of them know."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from easyeditor.errors import EasyEditError, MissingExtra, UsageError
from easyeditor.hparams.training import Trained
from easyeditor.lm.model import LM

T = TypeVar("T")


class Processes:
    """What accelerate knows of the processes and the precision.

    Args:
        config: The settings of the training.
        lm: The model, where it is loaded already.

    Raises:
        MissingExtra: accelerate is not installed.
        UsageError: The device does not know the precision.
    """

    def __init__(self, config: Trained, lm: LM | None) -> None:
        try:
            from accelerate import Accelerator
            from accelerate.state import AcceleratorState
        except ImportError:
            raise MissingExtra("Training needs accelerate. Install it: pip install 'easyeditor[train]'.") from None
        AcceleratorState._reset_state()  # a process may train twice, in different precisions
        precision = "bf16" if config.half and config.mixed_precision == "no" else config.mixed_precision
        on_cpu = (lm.device.type if lm is not None else config.device) == "cpu"
        self.accelerator: Any = Accelerator(mixed_precision=precision, cpu=on_cpu)
        if precision == "fp16" and self.accelerator.device.type == "cpu":
            raise UsageError(
                "Setting 'mixed_precision' is 'fp16', which a CPU does not train in. Choose 'bf16' or 'no'."
            )
        self.count: int = self.accelerator.num_processes
        self.first: bool = self.accelerator.is_main_process

    def mine(self, items: Sequence[T]) -> Sequence[T]:
        """What this process does of some work."""
        return items[self.accelerator.process_index :: self.count]

    def told(self, find: Callable[[], T]) -> T:
        """What the first process finds, or the error that it meets, in all of them: the others may have other disks."""
        if self.count == 1:
            return find()
        from accelerate.utils import broadcast_object_list

        said: list[Any] = [None]
        if self.first:
            try:
                said = [find()]
            except EasyEditError as error:
                said = [error]
        broadcast_object_list(said)
        if isinstance(said[0], EasyEditError):
            raise said[0]
        found: T = said[0]
        return found

    def over_all(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Sums over all processes."""
        if self.count == 1:
            return dict(sums)
        from accelerate.utils import gather_object

        gathered: list[dict[str, float]] = gather_object([dict(sums)])
        names = list(dict.fromkeys(name for each in gathered for name in each))
        return {name: sum(each.get(name, 0.0) for each in gathered) for name in names}

    def sum_gradients(self, weights: Sequence[Tensor]) -> None:
        """Sum the gradients over all processes."""
        if self.count == 1:
            return
        for weight in weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        flat = self.accelerator.reduce(torch.cat([w.grad.reshape(-1) for w in weights if w.grad is not None]), "sum")
        for weight, part in zip(weights, flat.split([w.numel() for w in weights]), strict=True):
            weight.grad = part.view_as(weight)
