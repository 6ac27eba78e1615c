"""The settings that editors share which are trained before they edit, under the names of existing files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from easyeditor.errors import UsageError
from easyeditor.hparams import HyperParams

PRECISIONS = ("no", "bf16", "fp16")


@dataclass(kw_only=True)
class Trained(HyperParams):
    """How long an editor is trained and on what it learns to change; a batch is a number of facts edited together."""

    archive: str | None = None  # what was trained: the folder of 'easyedit train --out'; in training: where to begin
    lr: float = 1e-6  # the step size of what is trained
    max_iters: int | None = None  # batches in all
    max_epochs: int | None = None  # times that the training set is seen, at most
    batch_size: int = 1  # facts that are edited together
    accumulate_bs: int = 10  # batches per step of the optimiser, over all processes
    batch_size_once: int = 1  # batches per pass of the model; the result does not depend on it
    val_batch_size: int = 1  # facts that are edited together in validation
    val_steps: int = 500  # batches per validation at most
    val_interval: int = 1000  # batches between validations
    log_interval: int = 1000  # batches between two lines of the log
    model_save_pt: int = 5000  # batches between checkpoints, besides those after each validation
    early_stop_patience: int = 20_000  # batches without a better validation after which training ends
    early_stop_key: str = "loss/total_edit_val"  # of the validation; a loss is better low, all else high
    opt: str = "Adam"  # a class of torch.optim
    grad_clip: float = 100.0  # the largest norm of a gradient
    mixed_precision: str = "no"  # 'bf16' or 'fp16': passes in that precision; what is trained stays in fp32
    cache_gb: float = 2.0  # memory for what the untouched model says of the training set
    seed: int = 42  # for whatever is drawn
    results_dir: str = "./results"  # the archive goes to RESULTS_DIR/models/ALG/MODEL unless a folder is named
    final_eval: bool = True  # whether the best archive is validated at the end
    eval_only: bool = False  # validate the archive and do not train
    half: bool = False  # the name of mixed_precision 'bf16' in existing files
    silent: bool = False  # no progress bar
    save: bool = False  # kept for existing files; the archive is always saved
    debug: bool = False  # kept for existing files
    verbose: bool = True  # kept for existing files
    eval_log_interval: int = 1000  # kept for existing files
    dropout: float = 0.0  # kept for existing files; editors are trained without dropout
    train_base: bool = False  # kept for existing files; the model itself is never trained
    no_grad_layers: Any = None  # kept for existing files; nothing below the lowest projection has gradients
    model_class: str | None = None  # kept for existing files
    tokenizer_class: str | None = None  # kept for existing files
    tokenizer_name: str | None = None  # kept for existing files; the tokenizer is the model's own

    @property
    def per_batch(self) -> int:
        """Facts of one batch of the training."""
        return self.batch_size

    @property
    def largest_norm(self) -> float:
        """What gradients are clipped to."""
        return self.grad_clip

    def check(self) -> None:
        """Sizes that mean something, and choices that exist."""
        name = self.alg_name
        sizes = ("batch_size", "accumulate_bs", "batch_size_once", "val_batch_size", "val_steps", "val_interval",
                 "log_interval", "model_save_pt", "early_stop_patience")  # fmt: skip
        for setting in sizes:
            if (value := getattr(self, setting)) < 1:
                raise UsageError(f"Setting '{setting}' of {name} is {value}. It has to be a number from 1 on.")
        for setting in ("max_iters", "max_epochs"):
            if (value := getattr(self, setting)) is not None and value < 1:
                raise UsageError(f"Setting '{setting}' of {name} is {value}. Give a number from 1 on, or leave it out.")
        for setting in ("lr", "grad_clip"):
            if not 0 < (value := getattr(self, setting)) < float("inf"):
                raise UsageError(f"Setting '{setting}' of {name} is {value}. It has to be a number above 0.")
        if self.mixed_precision not in PRECISIONS:
            raise UsageError(
                f"Setting 'mixed_precision' of {name} is '{self.mixed_precision}'. Choose {', '.join(PRECISIONS)}."
            )
        if self.train_base:
            raise UsageError(f"Setting 'train_base' of {name} is true, but the model itself is never trained. Drop it.")


def named_once(method: str, projections: Sequence[str]) -> None:
    """See that no projection is named twice.

    Raises:
        UsageError: One is.
    """
    if len(set(projections)) < len(projections):
        raise UsageError(f"Setting 'inner_params' of {method} names a projection twice. Name each once.")
