"""What can go wrong, said in sentences: what was seen, what was expected, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EasyEditError(Exception):
    """Base of every error that this library raises on purpose."""


class UsageError(EasyEditError, ValueError):
    """Something that was passed in is wrong; nothing has been done yet."""


class UnknownArgument(UsageError, TypeError):
    """A keyword argument that the call does not know."""


class UnknownSetting(UsageError, TypeError):
    """A setting that the method does not have."""


class NotEditable(UsageError):
    """The model has no place that a method could write to."""


class MissingExtra(EasyEditError, ImportError):
    """An optional dependency is not installed."""


class EditFailed(EasyEditError, RuntimeError):
    """The work was started and could not be finished; the model is as it was before."""


def unwritable(what: str, error: Exception) -> EditFailed:
    """The error for a file that could not be written, and was put in its place only when complete.

    Args:
        what: The file or folder, as the sentence begins with it.
        error: What the system said.
    """
    said = getattr(error, "strerror", None) or str(error)
    return EditFailed(
        f"{what} could not be written: {said}. What was there before is untouched; free some space or choose another "
        "place."
    )


class EditDidNothing(EditFailed):
    """An edit left every value of the model as it was."""


class NonFinite(EditFailed):
    """An edit left weights or logits that are not finite numbers."""


class WrongBase(EditFailed):
    """A saved edit was made for other weights than those of the model at hand."""


class DamagedFile(EditFailed):
    """A file exists but does not hold what it should."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence that names the nearest known name and then all of them.

    Args:
        name: What was asked for.
        known: What there is.

    Returns:
        Such as ``"Did you mean 'layers'? Known: layers, v_lr."``.
    """
    names = sorted(known)
    folded = {candidate.casefold(): candidate for candidate in names}
    near = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.5)
    guess = f"Did you mean '{folded[near[0]]}'? " if near else ""
    return f"{guess}Known: {', '.join(names) or 'none'}."
