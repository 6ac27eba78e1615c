"""QLoRA: Efficient Finetuning of Quantized LLMs. Dettmers et al., NeurIPS 2023. arXiv:2305.14314.

Idea      LoRA beside a base that is held in 4 bits: the memory of an edit is that of the small base.
Equation  y = dequantised(W) x + (alpha / r) B A x
Changes   What the adapted projections return; the base cannot be added to, so the adapter stays beside it.
Needs     Nothing but prompt and answer; peft, and bitsandbytes for a base of 4 bits (extras `train` and `quantised`).
Relations LoRA is the same with the adapter added to the weights.
Deviates  The loss is the cross-entropy of the answer's tokens at the positions that predict them; EasyEdit compares the
          prompt's positions with the answer's, padded. A model that is passed in is taken as it is, quantised or not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from easyeditor.core.adapters import AdapterTraining, Beside, adapter_note, learned, targets
from easyeditor.core.learn import minibatches
from easyeditor.core.reading import refuse_ruin
from easyeditor.edits.edit import Edit, ModuleEdit
from easyeditor.errors import UsageError
from easyeditor.hparams import HyperParams
from easyeditor.hparams.adapters import check_adapters
from easyeditor.lm.model import LM
from easyeditor.registry import method
from easyeditor.requests import EditRequest


@dataclass(kw_only=True)
class QLoRAHyperParams(HyperParams):
    """Settings of QLoRA."""

    alg_name: str = "QLoRA"
    quantization_bit: int = 4  # the bits that a base is loaded in: 4 or 8
    double_quant: bool = True  # whether the scales of a base of 4 bits are quantised too
    quant_type: str = "nf4"  # 'nf4' or 'fp4'
    lora_type: str = "lora"  # 'lora' or 'adalora'
    lora_r: int = 8  # the rank of an adapter
    lora_alpha: float = 32.0  # an adapter is scaled by lora_alpha / lora_r
    lora_dropout: float = 0.1  # on what an adapter takes, while it is trained
    target_modules: list[str] = field(default_factory=list)  # names or patterns; empty: queries and values, as found
    num_steps: int = 100  # epochs over the requests
    lr: float = 1e-4  # Adam's step size
    weight_decay: float = 0.0  # Adam's L2 factor, on the adapters

    @property
    def quantization(self) -> dict[str, Any]:
        """How a base is loaded, as the arguments of transformers' BitsAndBytesConfig."""
        four = self.quantization_bit == 4
        more = {"bnb_4bit_quant_type": self.quant_type, "bnb_4bit_use_double_quant": self.double_quant} if four else {}
        return {"load_in_4bit": four, "load_in_8bit": not four, **more}

    def check(self) -> None:
        """Sizes and choices that mean something."""
        check_adapters("QLoRA", self.lora_type, self.lora_r, self.lora_dropout)
        if self.quantization_bit not in (4, 8) or self.quant_type not in ("nf4", "fp4"):
            raise UsageError(
                f"Settings of QLoRA: quantization_bit is {self.quantization_bit}, expected 4 or 8; quant_type is "
                f"'{self.quant_type}', expected 'nf4' or 'fp4'. Correct them."
            )
        if self.batch_size < 1 or self.num_steps < 1:
            raise UsageError("Settings 'batch_size' and 'num_steps' of QLoRA are numbers from 1 on. Correct them.")


@method("QLoRA", hparams=QLoRAHyperParams, paper="arXiv:2305.14314", requests="many", kind="module", wrapper=Beside)
def qlora(
    lm: LM,
    requests: Sequence[EditRequest],
    hparams: QLoRAHyperParams,
    state: Mapping[str, Any],
    history: Sequence[Edit],
) -> ModuleEdit:
    """The adapters of any number of facts."""
    sites = targets(lm, hparams.target_modules)
    batches = minibatches(lm, requests, hparams.batch_size, min(lm.block_of(site) for site in sites))
    changes, losses = learned(lm, sites, batches, AdapterTraining.of(hparams, hparams.lora_r))
    wrappers = {name: Beside(change.left, change.right) for name, change in changes.items() if change.rank}
    edit = ModuleEdit(wrappers=wrappers, notes={"losses": losses, "adapter": adapter_note(lm, sites)})
    refuse_ruin(lm, edit, hparams.lr)
    return edit
