"""The training loop of editors that need one, on one process, several accelerators or several machines.

What happens does not depend on how many processes there are: a step has `accumulate_bs` batches over all of them, the
order is drawn from the seed and the place alone, and sums are taken before the step. A checkpoint
holds all that the next step needs, so that a training that was killed and goes on ends in the same bytes on the CPU.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from easyeditor.core.archive import Archive, check_archive, read_archive, write_archive
from easyeditor.core.training import TOTAL, Trainable, Visit
from easyeditor.editors.records import write_json
from easyeditor.edits.ledger import Ledger
from easyeditor.errors import NonFinite, UsageError, did_you_mean
from easyeditor.hparams import complete
from easyeditor.hparams.training import Trained
from easyeditor.lm.model import LM
from easyeditor.trainer.facts import Order, batches, digest_of, requests_of, room, split, visit
from easyeditor.trainer.folder import CHECKPOINT, RESULTS, checkpoint_in, move_aside, would_be_missed
from easyeditor.trainer.meters import EarlyStopper, RunningStatAverager, Show
from easyeditor.trainer.processes import Processes
from easyeditor.trainer.state import optimiser_state, put_back

log = logging.getLogger(__name__)

SECONDS = 600.0  # between checkpoints, where nothing else calls for one
NOT_OF_THE_RUN = (
    "max_iters", "max_epochs", "device", "model_parallel", "silent", "verbose", "debug", "save", "results_dir",
    "log_interval", "eval_log_interval", "model_save_pt", "final_eval", "eval_only", "cache_gb", "evaluation_type",
    "max_new_tokens", "alg",
)  # fmt: skip


class EditTrainer:
    """Train an editor: ``EditTrainer(config=..., train_set=..., val_set=...).run()``.

    Args:
        config: Training settings, such as `MENDTrainingHparams`.
        train_set: A data set of easyeditor, a list of requests or of dicts, a file, or ``tinyfacts:tuning``.
        val_set: Likewise; None: a tenth of the training set, which is then not trained on.
        out: The folder of the archive; None: ``RESULTS_DIR/models/ALG/MODEL``. A training that was interrupted there
            goes on; another one is moved aside.
        fresh: Whether to begin anew in any case.
        lm: The model, where it is loaded already.

    Raises:
        UsageError: A setting or a record is wrong; nothing has been loaded.
        MissingExtra: accelerate is not installed.
    """

    def __init__(
        self,
        config: Trained,
        train_set: Any,
        val_set: Any = None,
        *,
        out: str | Path | None = None,
        fresh: bool = False,
        lm: LM | None = None,
    ) -> None:
        self.config = config
        config.check()
        if not callable(getattr(config, "editor", None)):
            raise UsageError(
                f"{type(config).__name__} are settings of an edit, not of a training. Load those of the training, such "
                "as MENDTrainingHparams.from_hparams('TRAINING/MEND/gpt2-xl')."
            )
        self.train_set = requests_of(train_set, "The training set")
        if val_set is None:
            self.train_set, self.val_set = split(self.train_set, config.seed)
        else:
            self.val_set = requests_of(val_set, "The validation set")
        if config.eval_only and config.archive is None:
            raise UsageError("Setting 'eval_only' is true and 'archive' names none. Name what is to be validated.")
        self.processes = Processes(config, lm)
        self._lm, self._fresh = lm, fresh
        name = config.model_name if isinstance(config.model_name, str) else type(config.model_name[0]).__name__
        self.folder = (
            Path(out) if out is not None else Path(config.results_dir, "models", config.alg_name, Path(name).name)
        )
        self.history: list[dict[str, float]] = []  # what each validation found

    @property
    def lm(self) -> LM:
        """The model; loaded when first asked for."""
        if self._lm is None:
            self._lm = _loaded(self.config, self.processes)
        return self._lm

    def editor(self, hparams: Trained, lm: LM) -> Trainable:
        """What is trained.

        Args:
            hparams: Complete settings.
            lm: The model, without edits.
        """
        made: Trainable = hparams.editor(lm)  # type: ignore[attr-defined]
        return made

    def unfinished(self) -> bool:
        """Whether the folder holds a training of the same settings and data, which `run` goes on with."""
        return self._checkpoint() is not None

    def run(self) -> dict[str, float]:
        """Train, or go on with a training, and validate what came of it.

        Returns:
            What the best archive scores on the validation set, with the names of `early_stop_key`.

        Raises:
            UsageError: `max_iters` and `max_epochs` are both left out, or `early_stop_key` is measured by nobody.
            NonFinite: A loss is no finite number; the best archive so far stays.
            EditFailed: The folder cannot be written.
        """
        loop = _Loop(self)
        try:
            if not self.config.eval_only:
                loop.train()
            return loop.final()
        finally:
            self.history = loop.history

    def validation(self, size: int) -> list[list[int]]:
        """The places of the validation set that are edited together, batch by batch.

        Args:
            size: Requests per batch.
        """
        return batches(self.val_set, range(len(self.val_set)), room(self.val_set, size))

    def _checkpoint(self) -> Archive | None:
        return None if self._fresh else checkpoint_in(self.folder, self.key)

    @cached_property
    def key(self) -> str:
        """What tells this training from another: settings and data."""
        full = complete(self.config, self.lm).to_dict()
        settings = {name: value for name, value in full.items() if name not in NOT_OF_THE_RUN}
        text = json.dumps([settings, digest_of(self.train_set, self.val_set)], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class _Loop:
    """One run of a trainer."""

    def __init__(self, trainer: EditTrainer) -> None:
        self.trainer, self.folder = trainer, trainer.folder
        self.lm, self.processes = trainer.lm, trainer.processes
        self.accelerator = self.processes.accelerator
        if edits := Ledger.of(self.lm).active:
            raise UsageError(
                f"{self.lm.name} carries {len(edits)} edit(s), and an editor is trained on the untouched model. Take "
                "them back first (Ledger.of(lm).reset())."
            )
        self.lm.text.chat = trainer.config.use_chat_template
        self.hparams = complete(trainer.config, self.lm)
        self.editor = trainer.editor(self.hparams, self.lm)
        self.weights = [p for group in self.editor.parameters() for p in group["params"]]
        self.optimiser = self.accelerator.prepare(_optimiser(self.hparams, self.editor))
        self.order = Order(trainer.train_set, self.hparams.per_batch, self.hparams.seed)
        self.stopper = EarlyStopper(self.hparams.early_stop_patience, self.hparams.early_stop_key)
        self.done, self.best, self.history = 0, False, list[dict[str, float]]()
        self.saved = time.monotonic()

    def train(self) -> None:
        """All steps that are left."""
        total = iterations(self.hparams, self.order.per_epoch)
        self._begin()
        means, first = RunningStatAverager(), self.processes.first
        label = f"{self.hparams.alg_name} on {self.lm.name}"
        with Show(self.folder if first else None, label, total, self.done, self.hparams.silent) as show:
            while self.done < total and not self.stopper.should_stop():
                before, size = self.done, min(self.hparams.accumulate_bs, total - self.done)
                start = time.perf_counter()
                stats = self._step(size)
                self.done += size
                means.add({**stats, "time/edit": (time.perf_counter() - start) / size}, size)
                show.advance(self.done, means.average())
                last = self.done >= total
                if last or _crossed(before, self.done, self.hparams.log_interval):
                    show.report(self.done, means.average())
                    means.reset()
                if validated := last or _crossed(before, self.done, self.hparams.val_interval):
                    show.report(self.done, self._validate())
                late = time.monotonic() - self.saved > SECONDS
                if validated or late or _crossed(before, self.done, self.hparams.model_save_pt):
                    self._save(CHECKPOINT)

    def final(self) -> dict[str, float]:
        """What the best archive scores."""
        if not self.hparams.eval_only:
            best = self.processes.told(lambda: read_archive(self.folder))
            self.editor.module.load_state_dict(dict(best.tensors))
        if not (self.hparams.final_eval or self.hparams.eval_only):
            return self.history[-1] if self.history else {}
        found = self._measured()
        if self.processes.first:
            write_json(self.folder / RESULTS, {"results": found})
        return found

    def _begin(self) -> None:
        """From the checkpoint where there is one of this training, else from the start."""
        found = self.processes.told(self.trainer._checkpoint)
        if found is None:
            self._start()
            return
        check_archive(found, self.lm, self.hparams.alg_name)
        own = {name.removeprefix("module/"): t for name, t in found.tensors.items() if name.startswith("module/")}
        self.editor.module.load_state_dict(own)
        put_back(self.optimiser, found, self.accelerator)
        self.done, self.best = found.header["done"], found.header["best_value"] is not None
        self.history = list(found.header["history"])
        self.stopper.best_iter, self.stopper.current_iter = found.header["best_iter"], self.done
        if self.best:
            self.stopper.best_value = found.header["best_value"]
        log.info("Going on with the training in '%s' after %d batches.", self.folder, self.done)

    def _start(self) -> None:
        if self.processes.first and would_be_missed(self.folder):
            log.warning("'%s' held another training; it was moved to '%s'.", self.folder, move_aside(self.folder))
        train = self.trainer.train_set
        self.editor.prepare([visit(train, place, 0, self.hparams.seed) for place in range(len(train))])
        self._save(CHECKPOINT)

    def _step(self, size: int) -> dict[str, float]:
        """One step of the optimiser, over some batches."""
        mine = self.processes.mine(range(self.done, self.done + size))
        sums: dict[str, float] = {}
        self.optimiser.zero_grad()
        for chunk in _chunks(mine, self.hparams.batch_size_once):
            with self.accelerator.autocast():
                found = self.editor.losses([self.order.batch(number) for number in chunk])
            self.accelerator.backward(found[TOTAL].sum() / size)
            for name, values in found.items():
                sums[name] = sums.get(name, 0.0) + float(values.detach().double().sum())
        stats = {name: value / size for name, value in self.processes.over_all(sums).items()}
        self.processes.sum_gradients(self.weights)
        if self.accelerator.scaler is not None:
            self.accelerator.unscale_gradients(self.optimiser)
        norm = float(nn.utils.clip_grad_norm_(self.weights, self.hparams.largest_norm))
        if not math.isfinite(stats[TOTAL]) or (not math.isfinite(norm) and self.accelerator.scaler is None):
            raise NonFinite(self._lost(stats[TOTAL]))
        self.optimiser.step()
        return {**stats, "grad": norm}

    def _lost(self, loss: float) -> str:
        kept = f"the best archive so far is in '{self.folder}'" if self.best else "there is no archive yet"
        return (
            f"The loss or its gradient is not a finite number (loss {loss:g}) at batch {self.done}, so training ended; "
            f"{kept}. Lower lr, which is {self.hparams.lr:g}, or lr_lr and edit_lr, or use a wider precision, and "
            "train again."
        )

    def _validate(self) -> dict[str, float]:
        """Measure, and keep the archive if it is the best."""
        found = self._measured()
        if self.stopper.key not in found:
            raise UsageError(
                f"Setting 'early_stop_key' is '{self.stopper.key}'. {did_you_mean(self.stopper.key, found)}"
            )
        if not math.isfinite(found[self.stopper.key]):
            raise NonFinite(self._lost(found[self.stopper.key]))
        self.history.append({"iteration": self.done, **found})
        if self.stopper.update(self.done, found):
            self.best = True
            self._save("archive")
        return found

    @torch.no_grad()
    def _measured(self) -> dict[str, float]:
        """The means over the validation set, each batch once."""
        mine = self.processes.mine(self.trainer.validation(self.hparams.val_batch_size)[: self.hparams.val_steps])
        sums: dict[str, float] = {}
        counts: dict[str, float] = {}
        for chunk in _chunks(mine, self.hparams.batch_size_once):
            with self.accelerator.autocast():
                found = self.editor.losses([[self._seen(place) for place in batch] for batch in chunk])
            for name, values in found.items():
                sums[name] = sums.get(name, 0.0) + float(values.double().sum())
                counts[name] = counts.get(name, 0.0) + len(values)
        total, count = self.processes.over_all(sums), self.processes.over_all(counts)
        return {f"{name}_val": value / count[name] for name, value in total.items()}

    def _seen(self, place: int) -> Visit:
        return visit(self.trainer.val_set, place, None, self.hparams.seed)

    def _save(self, name: str) -> None:
        self.saved = time.monotonic()
        if self.processes.first:
            own = self.editor.module.state_dict()
            header = {
                "method": self.hparams.alg_name,
                "model": self.lm.name,
                **self.editor.header(),
                "settings": _plain(self.hparams),
                "done": self.done,
            }
            if name == CHECKPOINT:
                tensors, more = optimiser_state(self.optimiser, self.accelerator)
                best = {
                    "best_iter": self.stopper.best_iter,
                    "best_value": self.stopper.best_value if self.best else None,
                }
                header |= {"run": self.trainer.key, "history": self.history, **best, **more}
                write_archive(self.folder, header, {**{f"module/{k}": v for k, v in own.items()}, **tensors}, name)
            else:
                write_archive(self.folder, {**header, "scores": self.history[-1]}, own, name)


def _loaded(config: Trained, processes: Processes) -> LM:
    if not isinstance(config.model_name, str):
        return LM.wrap(*config.model_name)
    device = config.device if processes.count == 1 else processes.accelerator.device
    device_map = "auto" if config.model_parallel else None
    dtype = config.dtype or ("float16" if config.fp16 else None)
    return LM.load(config.model_name, dtype=dtype, device=device, device_map=device_map)


def _optimiser(hparams: Trained, editor: Trainable) -> torch.optim.Optimizer:
    cls = getattr(torch.optim, hparams.opt, None)
    unfit = (torch.optim.LBFGS, torch.optim.SparseAdam)  # these need a closure, or sparse gradients
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)) or issubclass(cls, unfit):
        raise UsageError(
            f"Setting 'opt' is '{hparams.opt}', which is no optimiser of torch that steps along dense gradients. "
            "Choose one, such as Adam or AdamW."
        )
    build: Any = cls
    made: torch.optim.Optimizer = build(editor.parameters(), lr=hparams.lr)
    return made


def iterations(hparams: Trained, per_epoch: int) -> int:
    """How many batches a training has.

    Raises:
        UsageError: Its settings do not say.
    """
    both = [n for n in (hparams.max_iters, hparams.max_epochs and hparams.max_epochs * per_epoch) if n]
    if not both:
        raise UsageError("Neither 'max_iters' nor 'max_epochs' is set, so training would never end. Set one of them.")
    return min(both)


def _crossed(before: int, now: int, interval: int) -> bool:
    return before // interval < now // interval


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _plain(hparams: Trained) -> dict[str, Any]:
    """Settings as they stand in an archive: without what belongs to a machine."""
    return {
        name: value for name, value in hparams.to_dict().items() if name not in ("device", "results_dir", "archive")
    }
