"""The training of editors that need one; see `easyeditor.trainer.run`."""

from __future__ import annotations

from easyeditor.trainer.meters import EarlyStopper, RunningStatAverager
from easyeditor.trainer.multitask import MultiTaskTrainer, PEREditTrainer
from easyeditor.trainer.run import EditTrainer

BaseTrainer = EditTrainer  # its name in scripts that derive from it

__all__ = ["BaseTrainer", "EarlyStopper", "EditTrainer", "MultiTaskTrainer", "PEREditTrainer", "RunningStatAverager"]
