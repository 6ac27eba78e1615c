"""The facts that a person names: by flags, in a file, or from the bundled table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from easyeditor.requests import EditRequest


def one_fact(
    prompt: str,
    target: str,
    subject: str | None,
    ground_truth: str | None,
    target_neg: str | None,
    rephrase: Sequence[str],
    locality: Sequence[str],
) -> EditRequest:
    """The fact that flags describe.

    Raises:
        UsageError: A text is empty, or the subject does not occur in the prompt.
    """
    from easyeditor.requests import EditRequest

    raw: dict[str, Any] = {"prompt": prompt, "target_new": target, "rephrase_prompt": list(rephrase)}
    raw |= {"subject": subject, "ground_truth": ground_truth, "target_neg": target_neg}
    if locality:
        raw["locality"] = {"neighbourhood": {"prompt": list(locality), "ground_truth": None}}
    return EditRequest.from_dict(raw, record="The fact given by flags")


def many_facts(data: str, limit: int | None, layout: str | None = None) -> list[EditRequest]:
    """The facts of a file, or of the bundled table for ``tinyfacts`` and ``tinyfacts:tuning``.

    Args:
        data: Which.
        limit: At most this many.
        layout: The data set that a file is read as; None: told by its fields.

    Raises:
        UsageError: There is no such file or half, a record is not valid, or the bundled table is given a layout.
    """
    name, _, half = data.partition(":")
    if name == "tinyfacts" and not Path(data).is_file():
        from easyeditor.data.files import no_layout
        from easyeditor.data.tinyfacts import TinyFacts

        no_layout(data, layout)
        return TinyFacts().requests(half or "reporting", limit)
    from easyeditor.data.files import load_requests

    return load_requests(data, limit, layout)
