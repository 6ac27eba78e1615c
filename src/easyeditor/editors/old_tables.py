"""The tables and helpers that existing scripts import beside an editor; all of them ask the registry."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from easyeditor.data.counterfact import CounterFactDataset
from easyeditor.data.personality import PersonalityDataset
from easyeditor.data.safeedit import SafetyDataset
from easyeditor.data.zsre import ZsreDataset
from easyeditor.editors.base import BaseEditor
from easyeditor.editors.old_calls import apply_function
from easyeditor.edits.edit import Edit
from easyeditor.edits.ledger import Ledger
from easyeditor.evaluate.personality_ike import apply_ike_to_per_model
from easyeditor.hparams import read_settings
from easyeditor.registry import get_method, methods

DATA_SETS = (
    ("DS_DICT", "cf", CounterFactDataset),
    ("DS_DICT", "zsre", ZsreDataset),
    ("PER_DS_DICT", "personalityEdit", PersonalityDataset),
    ("Safety_DS_DICT", "safeEdit", SafetyDataset),
)


def table(name: str) -> dict[str, Any]:
    """A table of existing scripts by its name.

    Args:
        name: ``ALG_DICT``: method name -> its ``apply`` function; ``PER_ALG_DICT``: those for
            personalities; ``ALG_TRAIN_DICT``: method name -> the settings of its training, for methods that are
            trained; or one of the tables of data set classes.

    Returns:
        A new dict.
    """
    if name == "ALG_DICT":
        return {known: apply_function(spec) for spec in methods().values() for known in (spec.name, *spec.aliases)}
    if name == "ALG_TRAIN_DICT":
        trained = {known: getattr(spec.hparams, "training", None) for known, spec in methods().items()}
        return {known: settings for known, settings in trained.items() if settings is not None}
    if name == "PER_ALG_DICT":
        return {"IKE": apply_ike_to_per_model, "MEND": apply_function(get_method("MEND"))}
    return {known: found for where, known, found in DATA_SETS if where == name}


class BatchEditor:
    """Which methods take many facts per edit."""

    @staticmethod
    def is_batchable_method(alg_name: str) -> bool:
        """Whether a method takes many facts per edit.

        Args:
            alg_name: The method's name, in any case.

        Raises:
            UsageError: There is no such method.
        """
        return get_method(alg_name).requests == "many"


def restore_after_edit(
    editor: BaseEditor, edited_model: Any, weights_copy: Callable[[], Any] | Mapping[str, torch.Tensor] | Sequence[Edit]
) -> None:
    """Take back what an edit call left on the model.

    Args:
        editor: The editor.
        edited_model: The model that the call returned; it is the editor's own.
        weights_copy: The third value of an edit call, or what an ``apply`` function returned: edits, weights as they
            were, or a function.
    """
    if callable(weights_copy):
        weights_copy()
    elif isinstance(weights_copy, Mapping):
        with torch.no_grad():
            for name, weight in weights_copy.items():
                edited_model.get_parameter(name).copy_(weight)
    else:
        there = {edit.id for edit in Ledger.of(editor.lm).active}
        for edit in weights_copy:
            if edit.id in there:
                editor.rollback(edit)


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch, because the caller asks for it.

    Args:
        seed: The seed. Edits and scores do not depend on it: they draw from generators of their own.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def load_hparams_config(hparams_name_or_path: str | Path) -> dict[str, Any]:
    """The settings in a file, as they stand there.

    Args:
        hparams_name_or_path: A YAML or JSON file; ``.yaml`` may be left out.

    Raises:
        UsageError: It cannot be read, or holds no settings.
    """
    path = Path(hparams_name_or_path)
    return read_settings(path if path.suffix in (".yaml", ".yml", ".json") else path.with_name(path.name + ".yaml"))
