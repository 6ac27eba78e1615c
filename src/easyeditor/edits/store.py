"""Saving and loading edits: one folder with `edit.json`, which says what it is, and `edit.safetensors`.

Files are written into a new folder beside the final one and moved there when complete, so that a full disk or a
killed process loses nothing that was there before. Nothing is pickled, and no path is read from a file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from easyeditor.edits.delta import from_tensors
from easyeditor.edits.edit import DecodingEdit, Edit, LogitBias, ModuleEdit, PromptEdit, WeightEdit
from easyeditor.edits.ledger import Ledger
from easyeditor.edits.peft import CONFIG, WEIGHTS, peft_adapter
from easyeditor.errors import DamagedFile, UsageError, unwritable
from easyeditor.lm.model import LM
from easyeditor.registry import get_method

FORMAT, PLAIN, SHARING = "easyeditor-edit", 1, 2  # the second version has tensors that stand for several edits
FORMAT_VERSION = SHARING
HEADER, TENSORS = "edit.json", "edit.safetensors"
COMMON = tuple(f.name for f in dataclasses.fields(Edit))


def save_edits(edits: Edit | Sequence[Edit], folder: str | Path, force: bool = False) -> Path:
    """Save edits into a folder; adapters also in the format of peft, which loads the folder as its own.

    Args:
        edits: One edit, or several in the order in which they were made.
        folder: Where to; it must not exist yet.
        force: Whether to replace a folder that holds saved edits.

    Returns:
        The folder.

    Raises:
        UsageError: There is nothing to save, or the folder exists.
        EditFailed: It could not be written; what was there before is still there.
    """
    found = [edits] if isinstance(edits, Edit) else list(edits)
    if not found:
        raise UsageError("There is no edit to save. Pass at least one.")
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}  # what several edits have in common, such as a trained network, is written once
    entries, places = [], dict[tuple[Any, ...], tuple[str, Tensor]]()  # with the tensor, so that no other is put there
    for i, edit in enumerate(found):
        for part, tensor in edit.tensors().items():
            name, place = f"{i}/{part}", (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
            if (first := places.setdefault(place, (name, tensor))[0]) != name and tensor.numel():
                shared[name] = first
            else:
                tensors[name] = tensor.detach().cpu().contiguous().clone()
        common = {name: getattr(edit, name) for name in COMMON}
        entries.append({"id": edit.id, "kind": edit.kind, **common, "config": edit.config()})
    with replacing(Path(folder), force, HEADER) as temporary:
        save_file(tensors, temporary / TENSORS)
        if (adapter := peft_adapter(found)) is not None:
            (temporary / CONFIG).write_text(json.dumps(adapter[0], indent=1), encoding="utf-8")
            save_file(adapter[1], temporary / WEIGHTS, metadata={"format": "pt"})
        header = {
            "format": FORMAT,
            "format_version": SHARING if shared else PLAIN,
            "library_version": library_version(),
            "tensors_sha256": _sha256(temporary / TENSORS),
            **({"shared": shared} if shared else {}),
            "edits": entries,
        }
        (temporary / HEADER).write_text(json.dumps(header, indent=1, ensure_ascii=False, default=str), encoding="utf-8")
    return Path(folder)


def read_header(folder: str | Path) -> dict[str, Any]:
    """What a saved edit says of itself, without reading its tensors.

    Raises:
        UsageError: There is no saved edit.
        DamagedFile: There is one, and it cannot be read.
    """
    path = Path(folder) / HEADER
    if not path.is_file():
        raise UsageError(f"There is no saved edit in '{folder}': it has no {HEADER}. Pass a folder made with --save.")
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise _damaged(folder, f"{HEADER} is not valid JSON") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT or not isinstance(header.get("edits"), list):
        raise _damaged(folder, f"{HEADER} is not the header of a saved edit")
    if not isinstance(header.get("format_version"), int):
        raise _damaged(folder, f"{HEADER} does not say its format_version")
    if header["format_version"] > FORMAT_VERSION:
        raise UsageError(
            f"'{folder}' has format {header['format_version']}, made by version {header.get('library_version')}; this "
            f"version reads up to format {FORMAT_VERSION}. Update: pip install -U easyeditor."
        )
    return header


def load_edits(folder: str | Path) -> list[Edit]:
    """Load saved edits, in the order in which they were made.

    Raises:
        UsageError: There is no saved edit.
        DamagedFile: There is one, and it is incomplete or was changed.
    """
    header = read_header(folder)
    path = Path(folder) / TENSORS
    try:
        if _sha256(path) != header.get("tensors_sha256"):
            raise DamagedFile(f"{TENSORS} is not the file that was saved with it")
        tensors = load_file(path)
        tensors |= {name: tensors[first] for name, first in header.get("shared", {}).items()}
        return [_restore(entry, i, tensors) for i, entry in enumerate(header["edits"])]
    except UsageError:  # a method that is not installed here
        raise
    except DamagedFile as error:
        raise _damaged(folder, str(error).rstrip(".")) from None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(folder, f"{type(error).__name__}: {error}") from None


def merge(lm: LM, folder: str | Path, force: bool = False) -> Path:
    """Write the model with its edits as a plain transformers folder, which loads without this library.

    Args:
        lm: The model, with weight edits on it.
        folder: Where to; it must not exist yet.
        force: Whether to replace a model folder that is there.

    Returns:
        The folder.

    Raises:
        UsageError: An edit on the model changes no weight and cannot be merged, or the folder exists.
        EditFailed: It could not be written.
    """
    other = [edit for edit in Ledger.of(lm).active if not isinstance(edit, WeightEdit)]
    if other:
        raise UsageError(
            f"The edit {other[0].id} ({other[0].method}) changes the {other[0].kind}, not the weights: a plain model "
            "folder cannot hold it. Use it with --edits, or make the edit with a method that changes weights."
        )
    with replacing(Path(folder), force, "config.json") as temporary:
        lm.model.save_pretrained(temporary)  # type: ignore[operator]
        lm.tokenizer.save_pretrained(temporary)
    return Path(folder)


@contextmanager
def replacing(folder: Path, force: bool, mark: str) -> Iterator[Path]:
    """A new folder that takes the place of another when all is written, or disappears if something goes wrong.

    Args:
        folder: The final folder.
        force: Whether it may exist; then it must hold `mark`, so that nothing else is ever deleted.
        mark: A file that tells that the folder is ours.
    """
    if folder.exists() and (not force or not (folder.is_dir() and (folder / mark).is_file())):
        remedy = "it holds something else; choose another name" if force else "choose another name, or pass --force"
        raise UsageError(f"'{folder}' exists already: {remedy}.")
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        yield temporary
        for file in temporary.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)
        temporary.chmod(0o755)
        old = temporary.with_name(f"{temporary.name}.old")
        if folder.exists():
            os.replace(folder, old)
        try:
            os.replace(temporary, folder)
        except OSError:
            if old.exists():
                os.replace(old, folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise unwritable(f"'{folder}'", error) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def library_version() -> str:
    """The version of this library."""
    try:
        return version("easyeditor")
    except PackageNotFoundError:
        return "unknown"


def _restore(entry: Mapping[str, Any], index: int, tensors: Mapping[str, Tensor]) -> Edit:
    prefix = f"{index}/"
    own = {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    common = {name: entry[name] for name in COMMON} | {"requests": tuple(entry["requests"])}
    config = entry["config"]
    if entry["kind"] == WeightEdit.kind:
        deltas = {name: from_tensors(parts) for name, parts in _grouped(own, "delta/").items()}
        keys, residuals, factors = (_under(own, f"{what}/") for what in ("key", "residual", "factor"))
        return WeightEdit(**common, deltas=deltas, keys=keys, residuals=residuals, factors=factors)
    if entry["kind"] == PromptEdit.kind:
        return PromptEdit(**common, **_prompt_config(entry["method"], config, own))
    wrapper: Any = get_method(entry["method"]).wrapper if entry["method"] else LogitBias
    if wrapper is None:
        raise KeyError(f"{entry['method']} has no state to restore")
    if entry["kind"] == ModuleEdit.kind:
        parts = _grouped(own, "wrapper/")
        return ModuleEdit(
            **common, wrappers={name: wrapper.restore(parts.get(name, {}), config[name]) for name in config}
        )
    if entry["kind"] == DecodingEdit.kind:
        return DecodingEdit(**common, rule=wrapper.restore(_under(own, "rule/"), config))
    raise KeyError(f"unknown kind of edit {entry['kind']!r}")


def _prompt_config(method: str, config: Mapping[str, Any], own: Mapping[str, Tensor]) -> dict[str, Any]:
    found = {**config, "context": tuple((p, t) for p, t in config["context"])}
    found["demonstrations"] = tuple(str(text) for text in config.get("demonstrations", ()))
    if "rule" in config:
        rule: Any = get_method(method).wrapper
        found["rule"] = rule.restore(_under(own, "rule/"), config["rule"])
    return found


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _grouped(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, dict[str, Tensor]]:
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in _under(tensors, prefix).items():
        place, _, part = name.rpartition("/")
        groups.setdefault(place, {})[part] = tensor
    return groups


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _damaged(folder: str | Path, what: str) -> DamagedFile:
    return DamagedFile(
        f"The saved edit in '{folder}' is damaged: {what}. Restore the folder from a copy, or edit again."
    )
