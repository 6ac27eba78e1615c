"""Getting a model and its tokenizer from a folder or a hub, with errors that say what is wrong with it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from easyeditor.errors import MissingExtra, UsageError

log = logging.getLogger(__name__)


def pretrained(
    name_or_path: str | Path,
    dtype: str | torch.dtype | None,
    device: str | int | torch.device | None,
    device_map: str | Mapping[str, Any] | None,
    quantization: int | Mapping[str, Any] | None,
    trust_remote_code: bool,
) -> tuple[nn.Module, Any]:
    """Load a model and its tokenizer; the arguments are those of `LM.load`.

    Raises:
        UsageError: There is no such model, or an argument is wrong.
        MissingExtra: Something that loading it needs is not installed.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    path = locate(name_or_path)
    options: dict[str, Any] = {"dtype": _dtype(dtype), "trust_remote_code": trust_remote_code}
    if device_map is not None:
        options["device_map"] = device_map
    if quantization is not None:
        options["quantization_config"] = _quantization(quantization)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model: nn.Module = auto.from_pretrained(path, **options)
    except ImportError as error:
        raise MissingExtra(f"'{name_or_path}' cannot be loaded here: {_first_line(error)}") from error
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UsageError(
            f"'{name_or_path}' cannot be loaded as a language model: {_first_line(error)} Expected a folder with "
            "config.json, tokenizer and weights, the id of a model that can be fetched, or 'tinyfacts'."
        ) from error
    if quantization is not None:
        _keep_layout(model)
    if device is not None and device_map is None and quantization is None:
        place = accelerator(device)
        try:
            model.to(place)
        except (RuntimeError, AssertionError) as error:
            raise UsageError(
                f"The model cannot be put on '{place}': {_first_line(error)} Pass another device."
            ) from None
    return model, tokenizer


def locate(name_or_path: str | Path) -> str:
    """The folder of the bundled model for ``tinyfacts``, else the path or hub id as it is.

    Raises:
        UsageError: It looks like a folder and there is none.
    """
    name = str(name_or_path)
    if Path(name).is_dir():
        return name
    bundled = files("easyeditor") / name
    if name.isidentifier() and (bundled / "config.json").is_file():
        return str(bundled)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UsageError(
            f"There is no model folder '{name}'. Expected a folder with config.json, tokenizer and weights; "
            "check the path, or use 'tinyfacts', the bundled model."
        )
    return name


def accelerator(device: str | int | torch.device) -> torch.device:
    """The device that is meant: a number is that accelerator, or the CPU where the machine has none.

    Raises:
        UsageError: There is no such device.
    """
    try:
        if not isinstance(device, int):
            return torch.device(device)
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        if found is None:
            log.info("device %d asked for; this machine has no accelerator, so the model stays on the CPU.", device)
            return torch.device("cpu")
        return torch.device(found.type, device)
    except RuntimeError as error:
        raise UsageError(
            f"There is no device '{device}': {_first_line(error)} Pass 'cpu' or a device number."
        ) from None


def _dtype(dtype: str | torch.dtype | None) -> Any:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype or "auto"
    short = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}
    found = getattr(torch, short.get(dtype, dtype), None)
    if dtype != "auto" and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise UsageError(f"Unknown dtype '{dtype}'. Pass float32, bfloat16 or float16, or leave it out.")
    return found or "auto"


def _quantization(asked: int | Mapping[str, Any]) -> Any:
    """Four bits are those of QLoRA: nf4, with quantised scales."""
    from transformers import BitsAndBytesConfig

    if asked not in (4, 8) and not isinstance(asked, Mapping):
        raise UsageError(f"quantization is {asked}. Pass 4 or 8, or leave it out.")
    if find_spec("bitsandbytes") is None:
        raise MissingExtra("A quantised base needs bitsandbytes. Install it: pip install 'easyeditor[quantised]'.")
    if isinstance(asked, Mapping):
        return BitsAndBytesConfig(**asked)
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True} if asked == 4 else {}
    return BitsAndBytesConfig(load_in_4bit=asked == 4, load_in_8bit=asked == 8, **options)


def _keep_layout(model: nn.Module) -> None:
    """Keep a base of 4 bits as it was loaded.

    On some processors bitsandbytes packs the weights anew in the first forward pass: not exactly the same ones, and
    without a gradient.
    """
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _first_line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".: ")
    return "there is no such folder, and it could not be fetched." if "://" in line else f"{line}."
