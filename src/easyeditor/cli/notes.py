"""What each setting of a method means, read from the comments beside the fields of its settings class."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import NamedTuple

FIELD = re.compile(r"^    (?P<name>\w+): [^#]*(?:#\s*(?P<note>.*))?$")


class Setting(NamedTuple):
    """One setting of a method.

    Args:
        name: As in settings files.
        kind: Its type.
        default: Its value where nothing else is said.
        note: What it means.
        common: Whether every method has it.
    """

    name: str
    kind: str
    default: object
    note: str
    common: bool


def settings_of(cls: type) -> list[Setting]:
    """The settings of a method: its own, those that only keep old files readable, and those that every method has.

    Args:
        cls: Its settings class.
    """
    from easyeditor.hparams import HyperParams

    notes: dict[str, str] = {}
    for owner in reversed(cls.__mro__):
        if dataclasses.is_dataclass(owner):
            notes.update(_notes(owner))
    shared = {field.name for field in dataclasses.fields(HyperParams)}
    found = [
        Setting(field.name, str(field.type), _default(field), notes.get(field.name, ""), field.name in shared)
        for field in dataclasses.fields(cls)
    ]
    return sorted(found, key=lambda each: (each.common, each.note.startswith("kept for existing files")))


def _notes(owner: type) -> dict[str, str]:
    """The comments of one class; comment lines below a field continue its comment."""
    notes: dict[str, str] = {}
    last = ""
    for line in inspect.getsource(owner).splitlines():
        match = FIELD.match(line)
        if match:
            last = match["name"] if match["note"] else ""
            if match["note"]:
                notes[last] = match["note"].strip()
        elif last and re.match(r"^\s{8,}#", line):
            notes[last] += " " + line.strip(" #")
        else:
            last = ""
    return notes


def _default(field: dataclasses.Field[object]) -> object:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else None
