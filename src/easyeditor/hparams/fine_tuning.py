"""The settings that methods share which fine-tune a few projections, under the names of existing files."""

from __future__ import annotations

from dataclasses import dataclass, field

from easyeditor.errors import UsageError
from easyeditor.hparams import HyperParams, ModuleTemplates


@dataclass(kw_only=True)
class FineTuning(ModuleTemplates, HyperParams):
    """Which projections are trained, and how."""

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
        name = self.alg_name
        if self.objective_optimization not in ("target_new", "prompt_last"):
            raise UsageError(
                f"Setting 'objective_optimization' of {name} is '{self.objective_optimization}'. "
                "Choose 'target_new' (FT-M) or 'prompt_last' (FT-L)."
            )
        if self.norm_constraint is True:
            raise UsageError(
                f"Setting 'norm_constraint' of {name} is true. Give the largest change of a weight, or false."
            )
        if self.batch_size < 1 or self.num_steps < 1:
            raise UsageError(f"Settings 'batch_size' and 'num_steps' of {name} are numbers from 1 on. Correct them.")
        if len(set(self.layers)) != len(self.layers):
            raise UsageError(f"Setting 'layers' of {name} names a block twice: {self.layers}. Name each once.")
