"""FT: constrained fine-tuning of a few MLP projections. Zhu et al., 2020. arXiv:2012.00363; FT-L and FT-M.

Idea      Train the output projection of some blocks until the new answer is likely; no weight goes far from its base.
Equation  min over D of the cross-entropy of the new answer under W + D,  |D|_inf <= norm_constraint.
          FT-M (`target_new`): the shifted cross-entropy over all tokens of the answer, teacher-forced.
          FT-L (`prompt_last`): the mean of -log p(t) over the answer's tokens t, all read at the prompt's last token,
          as in the baseline of the ROME paper; it is wrong for answers of several tokens and kept for comparison.
Changes   One projection per block in `layers`, densely.
Needs     Nothing but prompt and answer.
Relations LocFT-BF is FT-M in mini-batches with more epochs.
Deviates  The weight is not changed while training: D is a tensor of its own in fp32, whatever the model's dtype.
          Blocks below the lowest edited one are computed once. EasyEdit ends an epoch loop the same way: a batch below
          a loss of 1e-2 is skipped, and the training ends when the mean is below it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from easyeditor.core.fine_tuning import Training, fine_tuned
from easyeditor.edits.edit import Edit, WeightEdit
from easyeditor.errors import UsageError
from easyeditor.hparams import HyperParams, ModuleTemplates
from easyeditor.lm.model import LM
from easyeditor.registry import method
from easyeditor.requests import EditRequest


@dataclass(kw_only=True)
class FTHyperParams(ModuleTemplates, HyperParams):
    """Settings of FT."""

    alg_name: str = "FT"
    layers: list[int] = field(default_factory=list)  # the blocks to train; empty: preset row, else by depth
    num_steps: int = 25  # epochs over the requests
    lr: float = 5e-4  # Adam's step size
    weight_decay: float = 0.0  # Adam's L2 factor, on the weights
    kl_factor: float = 0.0  # kept for existing files; the original does not use it either
    norm_constraint: float | bool = False  # the largest change of any weight; false: no bound
    objective_optimization: str = "target_new"  # 'target_new' (FT-M) or 'prompt_last' (FT-L)
    batch_size: int = 64  # requests per step

    def check(self) -> None:
        """An objective, a bound and sizes that mean something."""
        if self.objective_optimization not in ("target_new", "prompt_last"):
            raise UsageError(
                f"Setting 'objective_optimization' of FT is '{self.objective_optimization}'. "
                "Choose 'target_new' (FT-M) or 'prompt_last' (FT-L)."
            )
        if self.norm_constraint is True:
            raise UsageError("Setting 'norm_constraint' of FT is true. Give the largest change of a weight, or false.")
        if self.batch_size < 1 or self.num_steps < 1:
            raise UsageError("Settings 'batch_size' and 'num_steps' of FT are numbers from 1 on. Correct them.")
        if len(set(self.layers)) != len(self.layers):
            raise UsageError(f"Setting 'layers' of FT names a block twice: {self.layers}. Name each once.")


@method("FT", hparams=FTHyperParams, paper="arXiv:2012.00363", requests="many")
def ft(
    lm: LM, requests: Sequence[EditRequest], hparams: FTHyperParams, state: Mapping[str, Any], history: Sequence[Edit]
) -> WeightEdit:
    """The dense edit of any number of facts."""
    training = Training(
        epochs=hparams.num_steps,
        lr=hparams.lr,
        batch_size=hparams.batch_size,
        weight_decay=hparams.weight_decay,
        bound=float(hparams.norm_constraint),
        at_prompt_end=hparams.objective_optimization == "prompt_last",
    )
    return fine_tuned(lm, requests, [lm.mlp_out(layer) for layer in sorted(hparams.layers)], training)
