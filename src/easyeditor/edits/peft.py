"""Low-rank edits in peft's own format, so that plain peft, and what reads its adapters, can serve them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from easyeditor.edits.delta import LowRank, plus
from easyeditor.edits.edit import Edit, ModuleEdit, WeightEdit

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def peft_adapter(edits: Sequence[Edit]) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Edits as one adapter of peft.

    Args:
        edits: Edits that all note themselves to be adapters.

    Returns:
        The configuration and the tensors, A (r, d_in) and B (d_out, r) of each module, with a scale of 1; None where
        an edit is something else.
    """
    if not all("adapter" in edit.notes for edit in edits):
        return None
    changes: dict[str, LowRank] = {}
    for edit in edits:
        for name, change in _factors(edit).items():
            both = plus(changes[name], change) if name in changes else change
            assert isinstance(both, LowRank)
            changes[name] = both
    ranks = {name: change.rank for name, change in changes.items()}
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": edits[0].model,
        "target_modules": sorted(changes),
        "r": max(ranks.values(), default=1),
        "lora_alpha": max(ranks.values(), default=1),
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        **edits[0].notes["adapter"],
    }
    tensors = {}
    for name, change in changes.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = _saved(change.right.T)
        tensors[f"base_model.model.{name}.lora_B.weight"] = _saved(change.left)
    return config, tensors


def _factors(edit: Edit) -> dict[str, LowRank]:
    if isinstance(edit, WeightEdit):
        found = {name.removesuffix(".weight"): delta for name, delta in edit.deltas.items()}
        return {name: delta for name, delta in found.items() if isinstance(delta, LowRank)}
    assert isinstance(edit, ModuleEdit)
    parts = {name: wrapper.tensors() for name, wrapper in edit.wrappers.items()}
    return {name: LowRank(tensors["left"], tensors["right"]) for name, tensors in parts.items()}


def _saved(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32).contiguous().clone()
