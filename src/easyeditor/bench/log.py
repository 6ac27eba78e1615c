"""The log of a run: JSON lines that are on the disk before the next is made, and what is left of them after a kill."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from easyeditor.errors import DamagedFile, EditFailed, UsageError
from easyeditor.plain import plain

Line = dict[str, Any]


class Log:
    """A file that lines are added to, all of a call or none.

    Args:
        path: The file; it and its folder are made with the first line. A line that a kill has torn is dropped then.

    Raises:
        EditFailed: It cannot be written; what was in it before is still there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._checked = False

    def append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Add lines; they are on the disk when this returns."""
        content = "".join(encoded(line) + "\n" for line in lines).encode("utf-8")
        with written(self.path):
            if not self._checked:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                _drop_torn(self.path)
                self._checked = True
            with self.path.open("ab") as file:
                before = file.tell()
                try:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    os.truncate(self.path, before)
                    raise


def read(path: Path) -> list[Line]:
    """The lines of a log; a last one that was torn is left out.

    Raises:
        DamagedFile: A line is not valid.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return []
    whole = text[: text.rfind(b"\n") + 1]
    out = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise DamagedFile(
                f"'{path}', line {number}, is not a line of a run log. Restore the file from a copy, or delete the "
                "line and run the same command again: what is missing is then made again."
            )
        out.append(found)
    return out


def encoded(line: Mapping[str, Any]) -> str:
    """A line as JSON; numbers that JSON does not have become null."""
    return json.dumps(plain(line), ensure_ascii=False, allow_nan=False)


@contextmanager
def written(path: Path) -> Iterator[None]:
    """A context whose disk errors are told in a sentence.

    Raises:
        EditFailed: The disk is full, or the place is not writable.
    """
    try:
        yield
    except OSError as error:
        raise EditFailed(
            f"'{path}' could not be written: {error.strerror or error}. All finished cases are safe; free some space "
            "or correct the permissions, and run the same command again: it goes on where it was."
        ) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A context in which nobody else works in a run folder.

    Raises:
        UsageError: Somebody does.
    """
    try:
        import fcntl
    except ImportError:  # not on this system
        yield
        return
    with written(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"Another process is working in '{folder}'. Wait, or choose another --out.") from None
        yield


def _drop_torn(path: Path) -> None:
    if not path.exists():
        return
    with path.open("rb+") as file:
        text = file.read()
        end = text.rfind(b"\n") + 1
        if end < len(text):
            file.truncate(end)
