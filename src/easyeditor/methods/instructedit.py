r"""InstructEdit: Instruction-based Knowledge Editing for LLMs. Zhang et al., IJCAI 2024. arXiv:2402.16123.

Idea      One editor for several tasks. An instruction in front of the prompt says which task an edit is, so that the
          gradient, and with it what the network makes of it, is that of the task.
Equation  That of MEND, with the prompt "Task: {task}\nDescription: {description}\nInput: {prompt}".
Changes   As MEND.
Needs     Prompt and answer, and an archive that `easyedit train --method InstructEdit` wrote for this model; requests
          of `MultiTaskDataset` carry their instructions, to others `task` and `description` put one.
Relations With neither instructions nor tasks it is MEND.
Deviates  The new answer is also learnt on the prompt without the instruction, so that an edit holds where nobody
          repeats it. Instructions are those of the data set; GPT-4 does not rewrite them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from easyeditor.core.instructions import instructed
from easyeditor.edits.edit import Edit, WeightEdit
from easyeditor.errors import UsageError
from easyeditor.hparams.training import Trained
from easyeditor.lm.model import LM
from easyeditor.methods.mend import MENDHyperParams, MENDTrainingHparams, mend, prepare
from easyeditor.registry import method
from easyeditor.requests import EditRequest


@dataclass(kw_only=True)
class InstructEditTrainingHparams(MENDTrainingHparams):
    """Settings of the training of InstructEdit."""

    alg_name: str = "InstructEdit"
    alg: str = "InstructEdit"  # alg_name under its other name


@dataclass(kw_only=True)
class InstructEditHyperParams(MENDHyperParams):
    """Settings of InstructEdit."""

    training: ClassVar[type[Trained]] = InstructEditTrainingHparams

    alg_name: str = "InstructEdit"
    task: str | None = None  # of requests without an instruction; None: they stay without one
    description: str | None = None  # what that task is, in a sentence

    def check(self) -> None:
        """A task with its description."""
        super().check()
        if (self.task is None) != (self.description is None):
            raise UsageError(
                "Of the settings 'task' and 'description' of InstructEdit one is given and one is not. An instruction "
                "needs both."
            )
        if any("\n" in text for text in (self.task or "", self.description or "")):
            raise UsageError("Settings 'task' and 'description' of InstructEdit are one line each.")


@method("InstructEdit", hparams=InstructEditHyperParams, paper="arXiv:2402.16123", requests="many", prepare=prepare)
def instructedit(
    lm: LM,
    requests: Sequence[EditRequest],
    hparams: InstructEditHyperParams,
    state: Mapping[str, Any],
    history: Sequence[Edit],
) -> WeightEdit:
    """One edit for all requests, each told with its instruction."""
    if hparams.task is None or hparams.description is None:
        return mend(lm, requests, hparams, state, history)
    told = [
        dataclasses.replace(request, prompt=instructed(request.prompt, hparams.task, hparams.description))
        for request in requests
    ]
    return mend(lm, told, hparams, state, history)
