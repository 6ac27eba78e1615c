"""The settings that methods of low-rank adapters share, under the names of existing files."""

from __future__ import annotations

from dataclasses import dataclass, field

from easyeditor.errors import UsageError
from easyeditor.hparams import HyperParams

KINDS = ("lora", "adalora")


@dataclass(kw_only=True)
class AdapterSettings(HyperParams):
    """Which modules get an adapter of which shape, and how it is trained."""

    lora_type: str = "lora"  # 'lora' or 'adalora'
    layers: list[int] = field(default_factory=list)  # the blocks whose modules get one; empty: all
    target_modules: list[str] = field(default_factory=list)  # names or patterns; empty: queries and values, as found
    rank: int = 8  # of an adapter; of AdaLoRA: the mean over all of them in the end
    lora_alpha: float = 32.0  # an adapter is scaled by lora_alpha / rank
    lora_dropout: float = 0.1  # on what an adapter takes, while it is trained
    num_steps: int = 60  # epochs over the requests
    lr: float = 5e-3  # Adam's step size
    weight_decay: float = 0.0  # Adam's L2 factor, on the adapters
    batch_size: int = 128  # requests per step
    with_end: bool = False  # whether the end-of-text token is learnt with the answer
    kl_factor: float = 0.0  # kept for existing files; the original does not use it either
    norm_constraint: float | bool = False  # kept for existing files; the original does not use it either

    def check(self) -> None:
        """Sizes and choices that mean something."""
        check_adapters(self.alg_name, self.lora_type, self.rank, self.lora_dropout)
        if self.batch_size < 1 or self.num_steps < 1:
            raise UsageError(
                f"Settings 'batch_size' and 'num_steps' of {self.alg_name} are numbers from 1 on. Correct them."
            )


def check_adapters(method: str, kind: str, rank: int, dropout: float) -> None:
    """Refuse adapters that cannot be made.

    Raises:
        UsageError: A value is none of those that there are.
    """
    if kind not in KINDS:
        raise UsageError(f"Setting 'lora_type' of {method} is '{kind}'. Choose 'lora' or 'adalora'.")
    if rank < 1:
        raise UsageError(f"The rank of {method} is {rank}. Give a number from 1 on.")
    if not 0 <= dropout < 1:
        raise UsageError(f"Setting 'lora_dropout' of {method} is {dropout}. Give a share from 0 up to 1, 1 excluded.")
