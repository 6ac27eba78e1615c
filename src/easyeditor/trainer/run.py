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
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from easyeditor.core.archive import Archive, read_archive, write_archive
from easyeditor.core.training import TOTAL, Trainable, Visit
from easyeditor.errors import MissingExtra, NonFinite, UsageError, did_you_mean
from easyeditor.hparams import complete
from easyeditor.hparams.training import Trained
from easyeditor.lm.model import LM
from easyeditor.trainer.facts import Order, digest_of, requests_of, split, visit
from easyeditor.trainer.meters import EarlyStopper, RunningStatAverager, Show
from easyeditor.trainer.state import optimiser_state, put_back

log = logging.getLogger(__name__)

CHECKPOINT, RESULTS = "checkpoint", "results.json"
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
        self.accelerator = accelerator_of(config, lm)
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
            self._lm = _loaded(self.config, self.accelerator)
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

    def _checkpoint(self) -> Archive | None:
        if self._fresh or not (self.folder / f"{CHECKPOINT}.json").is_file():
            return None
        found = read_archive(self.folder, CHECKPOINT)
        return found if found.header.get("run") == self.key else None

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
        self.lm, self.accelerator = trainer.lm, trainer.accelerator
        self.lm.text.chat = trainer.config.use_chat_template
        self.hparams = complete(trainer.config, self.lm)
        self.editor = trainer.editor(self.hparams, self.lm)
        self.weights = [p for group in self.editor.parameters() for p in group["params"]]
        self.optimiser = self.accelerator.prepare(_optimiser(self.hparams, self.editor))
        self.order = Order(trainer.train_set, self.hparams.per_batch, self.hparams.seed)
        self.stopper = EarlyStopper(self.hparams.early_stop_patience, self.hparams.early_stop_key)
        self.done, self.best, self.history = 0, False, list[dict[str, float]]()

    def train(self) -> None:
        """All steps that are left."""
        total = iterations(self.hparams, self.order.per_epoch)
        self._begin()
        means, first = RunningStatAverager(), self.accelerator.is_main_process
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
                if validated or _crossed(before, self.done, self.hparams.model_save_pt):
                    self._save(CHECKPOINT)

    def final(self) -> dict[str, float]:
        """What the best archive scores."""
        if not self.hparams.eval_only:
            self.editor.module.load_state_dict(dict(read_archive(self.folder).tensors))
        if not (self.hparams.final_eval or self.hparams.eval_only):
            return self.history[-1] if self.history else {}
        found = self._measured()
        if self.accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(self.folder / RESULTS, {"results": found})
        return found

    def _begin(self) -> None:
        """From the checkpoint where there is one of this training, else from the start."""
        found = self.trainer._checkpoint()
        if found is None:
            self._start()
            return
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
        if self.accelerator.is_main_process and self.folder.exists() and any(self.folder.iterdir()):
            aside = _aside(self.folder)
            self.folder.rename(aside)
            log.warning("'%s' held another training; it was moved to '%s'.", self.folder, aside)
        self.accelerator.wait_for_everyone()
        train = self.trainer.train_set
        self.editor.prepare([visit(train, place, 0, self.hparams.seed) for place in range(len(train))])

    def _step(self, size: int) -> dict[str, float]:
        """One step of the optimiser, over some batches."""
        mine = list(range(self.done, self.done + size))[
            self.accelerator.process_index :: self.accelerator.num_processes
        ]
        sums: dict[str, float] = {}
        self.optimiser.zero_grad()
        for chunk in _chunks(mine, self.hparams.batch_size_once):
            with self.accelerator.autocast():
                found = self.editor.losses([self.order.batch(number) for number in chunk])
            self.accelerator.backward(found[TOTAL].sum() / size)
            for name, values in found.items():
                sums[name] = sums.get(name, 0.0) + float(values.detach().double().sum())
        stats = {name: value / size for name, value in self._over_all(sums).items()}
        self._reduce_gradients()
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
        self.history.append({"iteration": self.done, **found})
        if self.stopper.update(self.done, found):
            self.best = True
            self._save("archive")
        return found

    @torch.no_grad()
    def _measured(self) -> dict[str, float]:
        """The means over the validation set, each batch once."""
        requests, size = self.trainer.val_set, min(self.hparams.val_batch_size, len(self.trainer.val_set))
        batches = [range(i, min(i + size, len(requests))) for i in range(0, len(requests), size)]
        batches = batches[: self.hparams.val_steps]
        mine = batches[self.accelerator.process_index :: self.accelerator.num_processes]
        sums: dict[str, float] = {}
        counts: dict[str, float] = {}
        for chunk in _chunks(mine, self.hparams.batch_size_once):
            with self.accelerator.autocast():
                found = self.editor.losses([[self._seen(place) for place in batch] for batch in chunk])
            for name, values in found.items():
                sums[name] = sums.get(name, 0.0) + float(values.double().sum())
                counts[name] = counts.get(name, 0.0) + len(values)
        total, count = self._over_all(sums), self._over_all(counts)
        return {f"{name}_val": value / count[name] for name, value in total.items()}

    def _seen(self, place: int) -> Visit:
        return visit(self.trainer.val_set, place, None, self.hparams.seed)

    def _over_all(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Sums over all processes."""
        if self.accelerator.num_processes == 1:
            return dict(sums)
        from accelerate.utils import gather_object

        gathered: list[dict[str, float]] = gather_object([dict(sums)])
        names = list(dict.fromkeys(name for each in gathered for name in each))
        return {name: sum(each.get(name, 0.0) for each in gathered) for name in names}

    def _reduce_gradients(self) -> None:
        """Sum the gradients over all processes."""
        if self.accelerator.num_processes == 1:
            return
        for weight in self.weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        flat = self.accelerator.reduce(torch.cat([w.grad.reshape(-1) for w in self.weights]), "sum")
        for weight, part in zip(self.weights, flat.split([w.numel() for w in self.weights]), strict=True):
            weight.grad = part.view_as(weight)

    def _save(self, name: str) -> None:
        if self.accelerator.is_main_process:
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
        self.accelerator.wait_for_everyone()


def accelerator_of(config: Trained, lm: LM | None) -> Any:
    """What accelerate knows of the processes and the precision.

    Raises:
        MissingExtra: It is not installed.
    """
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    except ImportError:
        raise MissingExtra("Training needs accelerate. Install it: pip install 'easyeditor[train]'.") from None
    AcceleratorState._reset_state()  # a process may train twice, in different precisions
    precision = "bf16" if config.half and config.mixed_precision == "no" else config.mixed_precision
    on_cpu = (lm.device.type if lm is not None else config.device) == "cpu"
    return Accelerator(mixed_precision=precision, cpu=on_cpu)


def _loaded(config: Trained, accelerator: Any) -> LM:
    if not isinstance(config.model_name, str):
        return LM.wrap(*config.model_name)
    device = config.device if accelerator.num_processes == 1 else accelerator.device
    device_map = "auto" if config.model_parallel else None
    dtype = config.dtype or ("float16" if config.fp16 else None)
    return LM.load(config.model_name, dtype=dtype, device=device, device_map=device_map)


def _optimiser(hparams: Trained, editor: Trainable) -> torch.optim.Optimizer:
    cls = getattr(torch.optim, hparams.opt, None)
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise UsageError(f"Setting 'opt' is '{hparams.opt}', which is no optimiser of torch. Such as Adam or AdamW.")
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


def _aside(folder: Path) -> Path:
    names = (folder.with_name(f"{folder.name}.bk{number or ''}") for number in range(1000))
    return next(path for path in names if not path.exists())


def _write(path: Path, content: Any) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    temporary.replace(path)
