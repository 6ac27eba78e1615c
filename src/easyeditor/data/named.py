"""Facts by the name that a person gives: a data file, a hub id, or the bundled table."""

from __future__ import annotations

from pathlib import Path

from easyeditor.data.files import load_requests, no_layout
from easyeditor.data.tinyfacts import TinyFacts
from easyeditor.errors import UsageError
from easyeditor.requests import EditRequest


def named_facts(name: str, limit: int | None = None, layout: str | None = None) -> list[EditRequest]:
    """The facts of a file, or of the bundled table.

    ``tinyfacts`` is one fact of each subject of the reporting half, ``tinyfacts:tuning`` of the other;
    ``tinyfacts:tuning:6`` is every fact of a half, each with up to six new answers, for training.

    Args:
        name: Which.
        limit: At most this many.
        layout: The data set that a file is read as; None: told by its fields.

    Raises:
        UsageError: There is no such file or half, the number of answers is none, a record is not valid, or the bundled
            table is given a layout.
    """
    table, _, rest = name.partition(":")
    half, many, draws = rest.partition(":")
    if table == "tinyfacts" and not Path(name).is_file():
        no_layout(name, layout)
        if many and not (draws.isdecimal() and int(draws)):
            raise UsageError(
                f"'{name}' ends in '{draws}', which is no number of new answers. Write tinyfacts:tuning:6."
            )
        if many:
            return TinyFacts().drawn(half, int(draws))[:limit]
        return TinyFacts().requests(half or "reporting", limit)
    return load_requests(name, limit, layout)
