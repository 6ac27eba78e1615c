"""The folder of a training: what in it would be missed, and where that goes."""

from __future__ import annotations

import json
from pathlib import Path

from easyeditor.core.archive import Archive, read_archive
from easyeditor.errors import DamagedFile

CHECKPOINT, RESULTS = "checkpoint", "results.json"
CUT_SHORT = (".", f"{CHECKPOINT}-")  # begins what a kill leaves of a file that was not finished


def checkpoint_in(folder: Path, run: str) -> Archive | None:
    """The checkpoint of a training, if the folder holds one of that training.

    Args:
        folder: The folder.
        run: What tells the training from others.

    Raises:
        DamagedFile: It cannot be read.
    """
    if not (folder / f"{CHECKPOINT}.json").is_file():
        return None
    try:
        found = read_archive(folder, CHECKPOINT)
    except DamagedFile as error:
        raise DamagedFile(
            f"{error} Or begin anew, with --force (fresh=True); what the folder holds is moved aside then."
        ) from None
    return found if found.header.get("run") == run else None


def would_be_missed(folder: Path) -> bool:
    """Whether a folder holds more than the beginning of a training, before its first step."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if f"{CHECKPOINT}.json" in names and "archive.json" not in names:
        return _steps(folder / f"{CHECKPOINT}.json") != 0
    return any(not name.startswith(CUT_SHORT) for name in names)


def move_aside(folder: Path) -> Path:
    """Give a folder another name, which is returned."""
    names = (folder.with_name(f"{folder.name}.bk{number or ''}") for number in range(1000))
    aside = next(path for path in names if not path.exists())
    folder.rename(aside)
    return aside


def _steps(header: Path) -> int | None:
    try:
        done: int | None = json.loads(header.read_text(encoding="utf-8"))["done"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return done
