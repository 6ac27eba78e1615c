"""Archives: what was trained, in safetensors, with a JSON header that names the base model.

A process killed at any moment leaves the old archive or the new one: the header, which names its tensors, is moved in
place last. Archives that EasyEdit wrote with ``torch.save`` are read with weights-only loading; nothing of them is
executed.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import pickle
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from easyeditor.edits.edit import fingerprint
from easyeditor.edits.ledger import Ledger
from easyeditor.edits.store import library_version
from easyeditor.errors import DamagedFile, UsageError, WrongBase, unwritable
from easyeditor.lm.model import LM

FORMAT, FORMAT_VERSION = "easyeditor-archive", 1
SAMPLE, ROUNDING = 64, 2**-7  # numbers of a weight, and the share by which they may differ in another precision
GLANCE = 4  # numbers of each weight that is not edited
CONFIG = re.compile(r"transformers\.models\.\w+\.configuration_\w+\.\w+Config")


@dataclass(frozen=True, eq=False)
class Archive:
    """Something that was trained.

    Args:
        header: What it says of itself: ``method``, ``model``, ``base`` (fingerprints), ``settings`` and more; empty
            for an archive of ``torch.save``.
        tensors: What was trained, by name.
        path: Where it was read.
    """

    header: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    path: Path


def write_archive(
    folder: str | Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str = "archive"
) -> Path:
    """Write an archive, or replace the one of that name.

    Args:
        folder: Where to; made if it is not there.
        header: What it says of itself, in a form that JSON can hold.
        tensors: What was trained.
        name: Begins the names of its two files.

    Returns:
        The header's path.

    Raises:
        EditFailed: It could not be written; what was there before is untouched.
    """
    folder = Path(folder)
    file = folder / f".{name}.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}, file)
        digest = _sha256(file)
        data = folder / f"{name}-{digest[:16]}.safetensors"
        _move(file, data)
        whole = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "library_version": library_version(),
            "tensors": data.name,
            "tensors_sha256": digest,
            **header,
        }
        file.write_text(json.dumps(whole, indent=1, ensure_ascii=False), encoding="utf-8")
        _move(file, folder / f"{name}.json")
    except (OSError, SafetensorError) as error:
        raise unwritable(f"The archive in '{folder}'", error) from error
    finally:
        file.unlink(missing_ok=True)
    for old in folder.glob(f"{name}-*.safetensors"):
        if old != data:
            old.unlink(missing_ok=True)
    return folder / f"{name}.json"


def read_archive(path: str | Path, name: str = "archive") -> Archive:
    """Read an archive.

    Args:
        path: A folder that the trainer wrote, the header in it, or a file of ``torch.save`` by EasyEdit.
        name: Begins the names of the two files in a folder.

    Raises:
        UsageError: There is none.
        DamagedFile: There is one, and it is incomplete or was changed.
    """
    path = Path(path).expanduser()
    header = path / f"{name}.json" if path.is_dir() else path
    if not header.is_file():
        where = f"'{path}' has no {name}.json" if path.is_dir() else f"there is no '{path}'"
        raise UsageError(f"There is no trained archive: {where}. Name the folder that 'easyedit train --out' wrote.")
    if header.suffix != ".json":
        return Archive({}, _saved_by_torch(header), header)
    return _checked(header)


def load_archive(path: str | Path) -> tuple[dict[str, Any], str]:
    """Read an archive in the layout of existing scripts.

    Args:
        path: See `read_archive`.

    Returns:
        The archive, ``{"model": {name: tensor}, ...}`` with the header's fields beside, and where it was read.
    """
    found = read_archive(path)
    return {**found.header, "model": dict(found.tensors)}, str(found.path)


def base_of(lm: LM, names: Sequence[str]) -> dict[str, Any]:
    """What tells untouched weights from others: their precision, of each a fingerprint and some of its numbers.

    Args:
        lm: The model.
        names: The weights that count most; of all others a few numbers are kept.
    """
    ledger = Ledger.of(lm)
    weights = {name: ledger.base(name).detach() for name in names}
    others = [name for name, weight in lm.model.named_parameters() if name not in weights and not weight.is_meta]
    return {
        "dtype": str(next(iter(weights.values())).dtype).removeprefix("torch.") if weights else None,
        "weights": {
            name: {"fingerprint": fingerprint(weight), "sample": _sample(weight)} for name, weight in weights.items()
        },
        "others": {name: _sample(ledger.base(name).detach(), GLANCE) for name in others},
    }


def check_archive(archive: Archive, lm: LM, method: str) -> None:
    """See that an archive is of a method and was trained on the weights of this model.

    Raises:
        UsageError: It is another method's.
        WrongBase: It was trained on another model.
    """
    other = archive.header.get("method")
    if other is not None and other != method:
        raise UsageError(
            f"The archive '{archive.path}' was trained for {other}, not for {method}. Use method {other}, or train one "
            f"for {method}: {command(method, lm.name)}."
        )
    base = archive.header.get("base", {"weights": {}})
    parameters = dict(lm.model.named_parameters())
    now = base_of(lm, [name for name in base["weights"] if name in parameters])
    exact = base.get("dtype") == now["dtype"]
    for name, there in base["weights"].items():
        here = now["weights"].get(name, {"fingerprint": "none", "sample": []})
        if here["fingerprint"] != there["fingerprint"] and (exact or not _close(here["sample"], there["sample"])):
            raise WrongBase(
                f"The archive '{archive.path}' was trained on {archive.header.get('model')}: '{name}' had the "
                f"fingerprint {there['fingerprint']} there, and has {here['fingerprint']} in {lm.name}. Load that "
                f"model, or train an archive for this one: {command(method, lm.name)}."
            )
    for name, sample in base.get("others", {}).items():
        own = now["others"].get(name)
        if own and sample and own != sample and (exact or not _close(own, sample)):
            raise WrongBase(
                f"The archive '{archive.path}' was trained on {archive.header.get('model')}, whose '{name}' has other "
                f"numbers than that of {lm.name}. Load that model, or train an archive for this one: "
                f"{command(method, lm.name)}."
            )


def command(method: str, model: str) -> str:
    """The command that trains an archive."""
    return f"easyedit train --method {method} --model {model} --data FACTS.json --out DIR"


def _sample(weight: Tensor, most: int = SAMPLE) -> list[float]:
    """Some numbers of a weight, from all over it; none of one that is held in a few bits."""
    if not weight.is_floating_point():
        return []
    places = torch.linspace(0, weight.numel() - 1, most, dtype=torch.double).long()
    return [float(value) for value in weight.reshape(-1)[places.to(weight.device)].float()]


def _close(here: Sequence[float], there: Sequence[float]) -> bool:
    """Whether two samples are one but for rounding to another precision."""
    if len(here) != len(there):
        return False
    return all(abs(a - b) <= ROUNDING * max(abs(a), abs(b)) + 1e-6 for a, b in zip(here, there, strict=True))


def _checked(header: Path) -> Archive:
    try:
        raw = json.loads(header.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise _damaged(header, "its header is not valid JSON") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT or not isinstance(raw.get("format_version"), int):
        raise _damaged(header, "its header is not that of an archive")
    if raw["format_version"] > FORMAT_VERSION:
        raise UsageError(
            f"'{header}' has format {raw['format_version']}, made by version {raw.get('library_version')}; this "
            f"version reads up to format {FORMAT_VERSION}. Update: pip install -U easyeditor."
        )
    data = header.parent / Path(str(raw.get("tensors"))).name  # never outside its folder
    try:
        if _sha256(data) != raw.get("tensors_sha256"):
            raise _damaged(header, f"{data.name} is not the file that was saved with it")
        return Archive(raw, load_file(data), header)
    except (OSError, SafetensorError) as error:
        raise _damaged(header, f"{data.name}: {getattr(error, 'strerror', None) or error}") from None


def _saved_by_torch(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``torch.save`` file: those under ``model``, or all; see `_harmless` for what else is let in."""
    try:
        with ExitStack() as stack:
            if allowed := _harmless(path):
                stack.enter_context(torch.serialization.safe_globals(allowed))
            raw = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError, ImportError, AttributeError):
        raise DamagedFile(
            f"'{path}' cannot be read as an archive: it is damaged, or it holds objects that only executing it would "
            "restore. Save its tensors alone, torch.save({'model': tensors}, path), where it was made; or train again."
        ) from None
    model = raw.get("model", raw) if isinstance(raw, Mapping) else {}
    tensors = {str(name): value for name, value in model.items() if isinstance(value, Tensor)}
    if not tensors:
        raise DamagedFile(f"'{path}' holds no tensors, so it is no archive. Name the file that the training wrote.")
    return tensors


def _harmless(path: Path) -> list[Any]:
    """What restores, and runs nothing, of the classes that a file of ``torch.save`` names: configs and numbers."""
    wanted = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    configs = [_named(name) for name in wanted if CONFIG.fullmatch(name)]
    if not any(name.startswith("numpy.") for name in wanted):
        return configs
    scalar: Any = np.float64(0).__reduce__()[0]
    kinds = [type(np.dtype(kind)) for kind in ("float64", "float32", "int64")]
    return [*configs, np.dtype, *kinds, scalar, (scalar, "numpy.core.multiarray.scalar")]


def _named(name: str) -> Any:
    module, _, cls = name.rpartition(".")
    return getattr(importlib.import_module(module), cls)


def _move(source: Path, target: Path) -> None:
    with source.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(source, target)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _damaged(path: Path, what: str) -> DamagedFile:
    return DamagedFile(f"The archive '{path}' is damaged: {what}. Restore the folder from a copy, or train again.")
