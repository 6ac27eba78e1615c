"""LoRA: Low-Rank Adaptation of Large Language Models. Hu et al., ICLR 2022. arXiv:2106.09685; AdaLoRA, LoRA_uns.

Idea      Low-rank adapters beside the projections of queries and values learn the new answers; the adapter is the edit.
Equation  W' = W + (alpha / r) B A.  AdaLoRA (`lora_type`, arXiv:2303.10512): W' = W + (alpha / r) P L Q, L diagonal,
          with the penalty |P^T P - I| + |Q Q^T - I| and ranks that are taken away where they matter least.
          The loss is the shifted cross-entropy over the tokens of the answer.
Changes   Every adapted weight, with the rank of its adapter.
Needs     Nothing but prompt and answer; peft, which is in the extra `train`.
Relations DPO learns the same adapters from preferences, QLoRA beside a base of 4 bits. LoRA_uns (the LoRA of AKEW,
          arXiv:2402.18909) learns long free-text answers, with their end.
Deviates  The trained adapter becomes a change of weights, which can be added, taken back and merged; it is saved in
          peft's own format as well. Training ends when the mean loss of an epoch is below 1e-2, as that of FT. AdaLoRA
          starts from 1.5 times the rank and takes ranks away, as its paper does and EasyEdit does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from easyeditor.core.adapters import low_rank_edit, targets
from easyeditor.core.learn import minibatches
from easyeditor.edits.edit import Edit, WeightEdit
from easyeditor.hparams.adapters import AdapterSettings
from easyeditor.lm.model import LM
from easyeditor.registry import method
from easyeditor.requests import EditRequest


@dataclass(kw_only=True)
class LoRAHyperParams(AdapterSettings):
    """Settings of LoRA."""

    alg_name: str = "LoRA"


@dataclass(kw_only=True)
class LoRA_uns_HyperParams(AdapterSettings):
    """Settings of LoRA_uns."""

    alg_name: str = "LoRA_uns"
    with_end: bool = True  # whether the end-of-text token is learnt with the answer


@method("LoRA", hparams=LoRAHyperParams, paper="arXiv:2106.09685", requests="many")
def lora(
    lm: LM, requests: Sequence[EditRequest], hparams: LoRAHyperParams, state: Mapping[str, Any], history: Sequence[Edit]
) -> WeightEdit:
    """The low-rank edit of any number of facts."""
    return _edit(lm, requests, hparams)


@method("LoRA_uns", hparams=LoRA_uns_HyperParams, paper="arXiv:2402.18909", requests="many")
def lora_uns(
    lm: LM,
    requests: Sequence[EditRequest],
    hparams: LoRA_uns_HyperParams,
    state: Mapping[str, Any],
    history: Sequence[Edit],
) -> WeightEdit:
    """The low-rank edit of any number of long answers."""
    return _edit(lm, requests, hparams)


def _edit(lm: LM, requests: Sequence[EditRequest], hparams: AdapterSettings) -> WeightEdit:
    sites = targets(lm, hparams.target_modules, hparams.layers)
    first = min(lm.block_of(site) for site in sites)
    batches = minibatches(lm, requests, hparams.batch_size, first, with_end=hparams.with_end)
    return low_rank_edit(lm, sites, batches, hparams)
