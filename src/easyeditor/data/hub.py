"""Records of a data set on the hub, by its id."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from easyeditor.data.reading import SUFFIXES
from easyeditor.errors import MissingExtra, UsageError

ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<config>[\w.-]+))?(:(?P<split>[\w.\[\]%-]+))?")
SPLITS = ("test", "validation", "train")


def is_hub_id(path: str | Path) -> bool:
    """Whether a name is that of a data set, ``owner/name[@config][:split]``, and not of a file."""
    text = str(path)
    return bool(ID.fullmatch(text)) and Path(text).suffix.lower() not in SUFFIXES and not Path(text).is_file()


def hub_rows(name: str) -> list[dict[str, Any]]:
    """Fetch the records of a data set.

    Args:
        name: ``owner/name``, with ``@config`` and ``:split`` where it has several. Without a split: the test split,
            else the validation split, else the training split.

    Returns:
        The records, in order.

    Raises:
        MissingExtra: What fetches them is not installed.
        UsageError: They cannot be had.
    """
    try:
        import datasets
    except ImportError:
        raise MissingExtra(
            f"There is no file '{name}', and to fetch it as a data set the extra is missing: "
            "pip install 'easyeditor[data]'. Or name a .json, .jsonl or .csv file."
        ) from None
    found = ID.fullmatch(name)
    if found is None:
        raise UsageError(
            f"'{name}' is no id of a data set. Expected owner/name, owner/name@config or owner/name:split."
        )
    try:
        loaded = datasets.load_dataset(found["name"], found["config"], split=found["split"])
    except Exception as error:  # what the client raises for no network, no such data set, no such split
        told = " ".join((str(error).strip() or type(error).__name__).split())[:300].rstrip(".")
        raise UsageError(
            f"The data set '{name}' cannot be fetched: {told}. Check its id and the network, or download one of its "
            "files and name that."
        ) from None
    if found["split"] is None:
        loaded = loaded[next((split for split in SPLITS if split in loaded), next(iter(loaded)))]
    return [dict(row) for row in loaded]
