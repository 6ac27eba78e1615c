"""The folder of a run: `run.json`, which says what it is, the answers before, and one log per row and seed.

* ``run.json``: versions, machine, model, data, settings, protocol;
* ``before*.jsonl``: what the unedited model answers, one line per fact;
* ``rows/ROME/seed0/log*.jsonl``: one line per finished case, lines of checkpoints, and what the row cost once;
* ``rows/ROME/seed0/edits/000007/``: the edits of step 7, while a sequential row is not finished.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from easyeditor.bench.log import Line, locked, read, written
from easyeditor.errors import DamagedFile, UsageError

FORMAT, FORMAT_VERSION = "easyeditor-run", 1
HEADER = "run.json"
OWN = ("plan", "model", "protocol")  # what makes a run the run that it is


def header_of(folder: Path) -> dict[str, Any]:
    """What a run folder says of itself.

    Raises:
        UsageError: It is no run folder, or one of a newer version.
        DamagedFile: It is one, and cannot be read.
    """
    path = folder / HEADER
    if not path.is_file():
        raise UsageError(f"There is no run in '{folder}': it has no {HEADER}. Pass the folder given to bench as --out.")
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        header = None
    if not isinstance(header, dict) or header.get("format") != FORMAT or not all(key in header for key in OWN):
        raise DamagedFile(f"'{path}' is not the file of a run, or is damaged. Restore it from a copy.")
    if header.get("format_version", 0) > FORMAT_VERSION:
        raise UsageError(f"'{path}' was made by a newer version. Update: pip install -U easyeditor.")
    return header


def check_place(folder: Path, plan: Mapping[str, Any]) -> None:
    """See before any work that a folder is new, or that of the same run.

    Raises:
        UsageError: It belongs to another run, or to something else.
    """
    if (folder / HEADER).is_file():
        _check_same(folder, header_of(folder)["plan"], plan)
    elif folder.exists() and (not folder.is_dir() or any(p.name != ".lock" for p in folder.iterdir())):
        raise UsageError(f"'{folder}' holds something that is no run. Choose another --out.")


@contextmanager
def opened(folder: Path, header: Mapping[str, Any], session: Mapping[str, Any]) -> Iterator[Path]:
    """A run folder to work in: new, or that of the same run, to go on with it.

    Args:
        folder: The folder.
        header: What makes the run: plan, model, protocol, settings.
        session: Versions and machine of this process; a run that goes on elsewhere has several.

    Raises:
        UsageError: It holds another run, or somebody is working in it.
        EditFailed: It cannot be written.
    """
    with locked(folder):
        sessions: list[Any] = []
        if (folder / HEADER).is_file():
            there = header_of(folder)
            for part in OWN:
                _check_same(folder, there[part], json.loads(json.dumps(header[part])))
            sessions = there["sessions"]
        if not sessions or dict(sessions[-1], started=None) != dict(session, started=None):
            sessions = [*sessions, dict(session)]
        about = {"format": FORMAT, "format_version": FORMAT_VERSION, **header, "sessions": sessions}
        with written(folder / HEADER):
            temporary = folder / f".{HEADER}.partial"
            temporary.write_text(json.dumps(about, indent=1, ensure_ascii=False, default=str), encoding="utf-8")
            temporary.replace(folder / HEADER)
        yield folder


def place_of(folder: Path, row: str, seed: int) -> Path:
    """Where the log of a row and a seed is."""
    return folder / "rows" / re.sub(r"[^\w.-]+", "_", row).strip("_") / f"seed{seed}"


def lines_of(folder: Path, row: str, seed: int) -> list[Line]:
    """All lines of a row and a seed, whoever wrote them."""
    return [line for path in sorted(place_of(folder, row, seed).glob("log*.jsonl")) for line in read(path)]


def seeds_of(header: Mapping[str, Any]) -> Sequence[int]:
    """The seeds of a run."""
    return range(int(header["plan"]["seeds"]))


def _check_same(folder: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    for name in here:
        if there.get(name) != here[name]:
            raise UsageError(
                f"'{folder}' holds another run: its {name} is {_short(there.get(name))}, here it is "
                f"{_short(here[name])}. Choose another --out, or give the same arguments to go on with it."
            )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
