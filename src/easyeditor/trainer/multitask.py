"""The training of an editor of several tasks, and what it is worth on each. Zhang et al., 2024, arXiv:2402.16123."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from easyeditor.core.instructions import task_of
from easyeditor.core.training import Trainable, Visit
from easyeditor.data.multitask import MultiTaskDataset, request_of
from easyeditor.data.personality import PersonalityDataset
from easyeditor.editors.per import opinions_of
from easyeditor.edits.ledger import applied
from easyeditor.hparams.training import Trained
from easyeditor.lm.model import LM
from easyeditor.metrics.opinions import Opinions, opinion_scores
from easyeditor.requests import EditRequest
from easyeditor.trainer.facts import batches, room
from easyeditor.trainer.run import EditTrainer

BY_TASK = ("edit/acc", "loc/acc")


class MultiTaskTrainer(EditTrainer):
    """Train an editor on edits of several tasks: ``MultiTaskTrainer(config=..., train_set=..., val_set=...).run()``.

    It trains as `EditTrainer` does. In validation it also says what the editor is worth on each task (such as
    ``edit/acc[zsre]_val``), and for records with ``metric_kwargs`` how far opinions turned and whether others moved
    (``es_val`` and ``dd_val``; see `easyeditor.metrics.opinions`).

    Args:
        config: Training settings, such as `InstructEditTrainingHparams` or `MENDTrainingHparams`.
        train_set: A `MultiTaskDataset`, some of its items, or whatever `EditTrainer` takes.
        val_set: Likewise; None: a tenth of the training set, which is then not trained on.
        **kwargs: As for `EditTrainer`.
    """

    def __init__(self, config: Trained, train_set: Any, val_set: Any = None, **kwargs: Any) -> None:
        self._opinions: dict[str, Opinions] = {}
        sets = [
            self._read(source, what)
            for source, what in ((train_set, "The training set"), (val_set, "The validation set"))
        ]
        super().__init__(config, *sets, **kwargs)

    def editor(self, hparams: Trained, lm: LM) -> Trainable:
        """What is trained, with what it is worth on each task."""
        return ByTask(super().editor(hparams, lm), lm, self._opinions)

    def validation(self, size: int) -> list[list[int]]:
        """The places of the validation set that are edited together: facts of one task."""
        tasks: dict[str | None, list[int]] = {}
        for place, request in enumerate(self.val_set):
            tasks.setdefault(task_of(request.prompt), []).append(place)
        size = room(self.val_set, size)
        return [batch for places in tasks.values() for batch in batches(self.val_set, places, size)]

    def _read(self, source: Any, what: str) -> Any:
        """Requests in the place of items; their opinions are kept aside."""
        if isinstance(source, MultiTaskDataset):
            source = list(source)
        if not isinstance(source, list | tuple):
            return source
        found = []
        for i, item in enumerate(source):
            if isinstance(item, EditRequest) or "metric_kwargs" not in item:
                found.append(item)
                continue
            record = f"{what}, record {i}"
            request = request_of(item, record)
            if item["metric_kwargs"]:
                self._opinions[request.prompt] = Opinions.from_dict(item["metric_kwargs"], record)
            found.append(request)
        return found


class PEREditTrainer(MultiTaskTrainer):
    """Train an editor on opinions: a `PersonalityDataset`, with ``es_val`` and ``dd_val`` in validation."""

    def _read(self, source: Any, what: str) -> Any:
        if not isinstance(source, PersonalityDataset):
            return super()._read(source, what)
        items, requests = list(source), source.requests()
        for place, request in enumerate(requests):
            self._opinions[request.prompt] = opinions_of(items, place)
        return requests


class ByTask:
    """An editor that also measures each task by itself; see `easyeditor.core.training.Trainable`.

    Args:
        editor: What is trained.
        lm: The model.
        opinions: Prompt -> the opinions that an edit of it should turn, and those that it should leave.
    """

    def __init__(self, editor: Trainable, lm: LM, opinions: Mapping[str, Opinions]) -> None:
        self.inner, self.lm, self.opinions = editor, lm, opinions
        self.module = editor.module
        self.prepare, self.parameters, self.header = editor.prepare, editor.parameters, editor.header

    def losses(self, groups: Sequence[Sequence[Visit]]) -> dict[str, Tensor]:
        """The losses of the editor; in validation also by task."""
        found = dict(self.inner.losses(groups))
        if any(visit.epoch is not None for group in groups for visit in group):
            return found
        tasks = [task_of(group[0].request.prompt) for group in groups]  # a batch of the validation is of one task
        for task in sorted({task for task in tasks if task is not None}):
            places = [place for place, each in enumerate(tasks) if each == task]
            found |= {f"{name}[{task}]": found[name][places] for name in BY_TASK if name in found}
        return found | self._turned(groups)

    def _turned(self, groups: Sequence[Sequence[Visit]]) -> dict[str, Tensor]:
        """ES and DD of those edits that are of one opinion each."""
        scores: dict[str, list[float]] = {}
        for group in groups:
            asked = self.opinions.get(group[0].request.prompt)
            edit = getattr(self.inner, "edit", None)
            if len(group) > 1 or asked is None or edit is None:
                continue
            with applied(self.lm, edit([group[0].request])):
                for name, value in opinion_scores(self.lm, asked).items():
                    scores.setdefault(name, []).extend([] if value is None else [value])
        return {name: Tensor(values) for name, values in scores.items() if values}
