"""From the command line to a method's settings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from easyeditor.cli.common import device_of
from easyeditor.errors import UsageError

if TYPE_CHECKING:
    from easyeditor.hparams import HyperParams


@dataclass(frozen=True)
class Choice:
    """What a person said about how to edit.

    Args:
        method: The name of the method.
        model: The model, or None: what the settings file says, else the bundled one.
        file: A settings file, or METHOD/MODEL of a packaged row.
        pairs: ``key=value`` texts, which go before everything else.
        device: Where to put the model.
        dtype: In which precision.
        chat: Whether to go through the chat template.
        seed: For whatever the method draws.
    """

    method: str
    model: str | None = None
    file: Path | None = None
    pairs: tuple[str, ...] = ()
    device: str | None = None
    dtype: str | None = None
    chat: bool = False
    seed: int | None = None

    def hparams(self) -> HyperParams:
        """The method's settings.

        Raises:
            UsageError: The method, a setting or the settings file does not exist, or a value has the wrong type.
        """
        from easyeditor.registry import get_method

        cls = get_method(self.method).hparams
        said: dict[str, Any] = {
            "model_name": self.model,
            "device": device_of(self.device),
            "dtype": self.dtype,
            "use_chat_template": self.chat or None,
            "seed": self.seed,
        }
        values = {key: value for key, value in said.items() if value is not None} | parsed(self.pairs)
        if self.file is None:
            return cls(**{"model_name": "tinyfacts", **values})
        hparams = cls.from_hparams(self.file)
        for key, value in values.items():
            setattr(hparams, key, value)
        return hparams


def parsed(pairs: Iterable[str]) -> dict[str, Any]:
    """The values of ``key=value`` texts, read as YAML: ``layers=[5]``, ``fp16=true``, ``v_lr=5e-1``.

    Raises:
        UsageError: A text has no ``=``, or its value is not valid.
    """
    import yaml

    values: dict[str, Any] = {}
    for pair in pairs:
        key, sign, text = pair.partition("=")
        if not sign or not key.strip():
            raise UsageError(f"--set '{pair}' is not KEY=VALUE. Write it such as --set layers=[5] or --set v_lr=0.5.")
        try:
            values[key.strip()] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UsageError(f"--set '{pair}': the value is not valid. Quote it, such as --set 'layers=[5]'.") from None
    return values
