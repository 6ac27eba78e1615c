"""The networks of SERAC before their training: drawn, or from folders that hold models of transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from easyeditor.core.archive import Archive
from easyeditor.core.counterfactual import Networks, networks
from easyeditor.core.deputy import built
from easyeditor.core.scope_classifier import Measure
from easyeditor.errors import DamagedFile, UsageError
from easyeditor.lm.model import LM

SHARED = 0.98  # of the tokens of the model, the part that a small model has to have; some are only there to fill up


def described(lm: LM, settings: Any) -> tuple[dict[str, Any], Networks]:
    """The networks that settings ask for.

    Args:
        lm: The model that is edited.
        settings: Those of SERAC.

    Returns:
        Their description, in a form that JSON can hold (see `easyeditor.core.counterfactual.networks`), and they.

    Raises:
        UsageError: A folder is not there, or holds something else.
    """
    spec: dict[str, Any] = {
        "embedded": int(lm.model.get_input_embeddings().weight.shape[1]),  # type: ignore[operator]
        "width": settings.width,
        "blocks": settings.n_blocks,
        "window": settings.max_length,
        "measure": {part.name: getattr(settings, part.name) for part in fields(Measure)},
    }
    weights: dict[str, Tensor] = {}
    if settings.cls_name is not None:
        spec["reader"], more = _encoder(settings.cls_name, lm)
        weights |= {f"scope.reader.{name}": tensor for name, tensor in more.items()}
    if settings.small_name is not None:
        spec["model"], more = _small(settings.small_name, lm)
        weights |= {f"counterfactual.{name}": tensor for name, tensor in more.items()}
    found = networks(spec, settings.seed)
    found.load_state_dict({**found.state_dict(), **weights})
    return spec, found


def _encoder(folder: str, lm: LM) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    config, tokenizer, model = _loaded(folder, "cls_name", lm, AutoModel)
    if not getattr(tokenizer, "is_fast", False) or tokenizer.pad_token is None:
        raise UsageError(
            f"Setting 'cls_name' of SERAC names '{folder}', whose tokenizer has no tokenizer.json or no pad "
            "token. Name an encoder such as distilbert-base-cased."
        )
    data = torch.frombuffer(bytearray(tokenizer.backend_tokenizer.to_str().encode()), dtype=torch.uint8)
    own = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    return {"config": config, "size": len(data), "pad": tokenizer.pad_token}, {**own, "tokenizer": data}


def _small(folder: str, lm: LM) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    auto = AutoModelForSeq2SeqLM if lm.seq2seq else AutoModelForCausalLM
    config, tokenizer, model = _loaded(folder, "small_name", lm, auto)
    theirs, ours = tokenizer.get_vocab(), lm.tokenizer.get_vocab()
    alike = sum(theirs.get(token) == number for token, number in ours.items())
    if alike < SHARED * len(ours):
        raise UsageError(
            f"Setting 'small_name' of SERAC names '{folder}', whose tokens are not those of {lm.name}, so what the two "
            "say cannot be mixed. Name a small model of the same family, or leave the setting out."
        )
    return config, {f"model.{name}": tensor for name, tensor in model.state_dict().items()}


def _loaded(folder: str, setting: str, lm: LM, auto: Any) -> tuple[dict[str, Any], Any, Any]:
    """Config, tokenizer and model of a folder; nothing is fetched."""
    if not (Path(folder) / "config.json").is_file():
        raise UsageError(
            f"Setting '{setting}' of SERAC names '{folder}', and no model is in such a folder. Put one there, or "
            f"leave the setting out (--set {setting}=null): a small network over the embeddings of {lm.name} serves."
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = auto.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UsageError(f"Setting '{setting}' of SERAC names '{folder}', which cannot be loaded: {first}.") from None
    return json.loads(config.to_json_string(use_diff=False)), tokenizer, model


def learnt(archive: Archive, lm: LM, settings: Any) -> tuple[dict[str, Any], Networks]:
    """The networks of an archive; of one of EasyEdit, whose base cannot be checked, those that the settings name."""
    if archive.header:
        spec = dict(archive.header["spec"])
        return spec, built(spec, archive.tensors)
    spec, module = described(lm, settings)
    own, found = module.state_dict(), dict[str, Tensor]()
    for old, new in (("classifier.", "scope.reader.model."), ("replacement.", "counterfactual.model.")):
        found |= {new + name.removeprefix(old): t for name, t in archive.tensors.items() if name.startswith(old)}
    needed = {name for name, tensor in own.items() if tensor.is_floating_point()}  # all but counters and a tokenizer
    if odd := sorted((found.keys() - own.keys()) | (needed - found.keys())):
        raise DamagedFile(
            f"The archive '{archive.path}' holds other networks than the settings name: '{odd[0]}' is in one of them "
            "only. Pass the cls_name and the small_name that it was trained with, or train again."
        )
    return spec, built(spec, {name: found.get(name, own[name]) for name in own})
