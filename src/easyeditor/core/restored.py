"""Putting what an archive holds into a network that was built for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from easyeditor.core.archive import Archive, check_archive, command, read_archive
from easyeditor.errors import DamagedFile, UsageError, WrongBase
from easyeditor.lm.model import LM


def archive_of(path: str | Path | None, lm: LM, method: str) -> Archive:
    """The archive that settings name, read and checked.

    Args:
        path: What the settings say.
        lm: The model that it has to be of.
        method: The method that it has to be of.

    Raises:
        UsageError: None is named, there is none, or it is another method's.
        WrongBase: It was trained on another model.
        DamagedFile: It cannot be read.
    """
    if path is None:
        raise UsageError(
            f"{method} edits with a network that is trained once per model, and no archive is named. Train one: "
            f"{command(method, lm.name)}; then pass archive='DIR' (--set archive=DIR)."
        )
    archive = read_archive(path)
    check_archive(archive, lm, method)
    return archive


def fill(module: nn.Module, tensors: Mapping[str, Tensor], archive: Archive, lm: LM) -> None:
    """Load tensors into a module.

    Args:
        module: What was built by the settings.
        tensors: Its state, by name.
        archive: Where they come from.
        lm: The model.

    Raises:
        DamagedFile: A name is on one side only.
        WrongBase: A shape is another.
    """
    own = module.state_dict()
    if missing := sorted(set(own) ^ set(tensors)):
        raise DamagedFile(
            f"The archive '{archive.path}' does not fit the settings: '{missing[0]}' is in one of them only. "
            "Use the settings that it was trained with, or train again."
        )
    if odd := [name for name in own if own[name].shape != tensors[name].shape]:
        raise WrongBase(
            f"The archive '{archive.path}' holds '{odd[0]}' of shape {list(tensors[odd[0]].shape)}; {lm.name} and the "
            f"settings expect {list(own[odd[0]].shape)}. Load the model and the settings that it was trained with."
        )
    module.load_state_dict(dict(tensors))
