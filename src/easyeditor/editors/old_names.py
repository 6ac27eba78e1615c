"""Small helpers that existing scripts import beside an editor."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from easyeditor.editors.old_calls import apply_function
from easyeditor.errors import UsageError
from easyeditor.registry import get_method


def normalize_alg_name(
    config: Mapping[str, Any],
    expected_alg_name: str,
    *,
    aliases: Mapping[str, str] | None = None,
    legacy_key: str = "alg",
    keep_legacy: bool = False,
    legacy_value: str | None = None,
) -> dict[str, Any]:
    """Settings as a mapping, with the method's name under ``alg_name``.

    Args:
        config: The settings; not changed.
        expected_alg_name: The name that they should have.
        aliases: Other name -> name.
        legacy_key: The other field that the name may stand in.
        keep_legacy: Whether that field stays.
        legacy_value: What it then holds where it is not there; None: the name.

    Raises:
        UsageError: There is no name, or another one.
    """
    said = {key: config[key] for key in ("alg_name", legacy_key) if config and config.get(key) is not None}
    if not said:
        raise UsageError(f"The settings name no method. Write alg_name: {expected_alg_name}.")
    for key, value in said.items():
        if (aliases or {}).get(str(value), str(value)) != expected_alg_name:
            raise UsageError(f"The settings say {key} '{value}', and {expected_alg_name} was expected. Correct them.")
    rest = {key: value for key, value in config.items() if key not in ("alg_name", legacy_key)}
    legacy = {legacy_key: config.get(legacy_key) or legacy_value or expected_alg_name} if keep_legacy else {}
    return {**rest, "alg_name": expected_alg_name, **legacy}


def normalize_ground_truths(ground_truth: Any, count: int | None = None) -> list[str | None]:
    """The answers before some edits, one each.

    Args:
        ground_truth: One answer, or one for each edit; of a list of accepted answers the first counts; None: unknown.
        count: How many edits there are; None: as many as there are answers.

    Raises:
        UsageError: There are more answers or fewer.
    """
    items = list(ground_truth) if isinstance(ground_truth, list | tuple) else [ground_truth]
    found = [each[0] if isinstance(each, list | tuple) and each else each or None for each in items]
    if count is not None and len(found) != count:
        if ground_truth is not None:
            raise UsageError(f"There are {len(found)} answers for {count} edits. Give one answer for each edit.")
        found = [None] * count
    return found


def make_logs(folder: str | Path = "logs", name: str = "run.log") -> logging.Logger:
    """Write what the library logs to a file and to stderr, because the caller asks for it.

    Args:
        folder: Where the file goes; made if it is not there.
        name: The file's name.

    Returns:
        The library's logger. Called again, it gets no second handler.
    """
    logger, path = logging.getLogger("easyeditor"), Path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    known = {getattr(handler, "baseFilename", type(handler).__name__) for handler in logger.handlers}
    form = logging.Formatter("%(asctime)s - %(levelname)s - %(name)s - %(message)s")
    for key, handler in (
        (str(path.absolute()), logging.FileHandler(path, delay=True)),
        ("StreamHandler", logging.StreamHandler()),
    ):
        if key not in known:
            handler.setFormatter(form)
            logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    return logger


class Wrapped:
    """A model, to be edited with one method, in the class that existing scripts wrap it in.

    Args:
        model: The transformers model; it is edited in place.
        config: The method's settings.
        model_constructor: Not needed.
        tokenizer: The model's tokenizer.
    """

    method: ClassVar[str]

    def __init__(self, model: Any, config: Any, model_constructor: Any = None, tokenizer: Any = None) -> None:
        self.model, self.config, self.tokenizer = model, config, tokenizer

    def edit(self, requests: Sequence[Mapping[str, Any]] | Mapping[str, Any], tok: Any = None) -> Wrapped:
        """Edit the model; see `easyeditor.editors.old_calls.apply_function`.

        Args:
            requests: One request or several.
            tok: The tokenizer, where none was given before.

        Raises:
            UsageError: There is no tokenizer, or a request is wrong.
        """
        tokenizer = tok if tok is not None else self.tokenizer
        if tokenizer is None:
            raise UsageError(f"{type(self).__name__} has no tokenizer to read requests with. Pass tokenizer=.")
        apply_function(get_method(self.method))(self.model, tokenizer, requests, self.config)
        return self

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """What the model generates."""
        return self.model.generate(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model says."""
        return self.model(*args, **kwargs)


class LORA(Wrapped):
    """A model that MELO edits."""

    method = "MELO"


class ULTRAEDIT(Wrapped):
    """A model that UltraEdit edits."""

    method = "UltraEdit"
