"""Answers before any edit: measured once per model and fact, and shared by all methods, seeds and runs.

They are kept in the run folder, and in the user's cache under a key of everything that they depend on: the weights, the
tokenizer, how is measured, the code that measures and the versions of what computes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import transformers

from easyeditor.bench.log import Log, read
from easyeditor.bench.plan import key_of
from easyeditor.core.stats_keys import digest_of, tokenizer_key
from easyeditor.errors import DamagedFile, EditFailed
from easyeditor.lm.model import LM
from easyeditor.requests import EditRequest

Scores = dict[str, Any]
Measure = Callable[[Sequence[EditRequest]], list[Scores]]
PART = 64  # facts that are measured together, and lost together by a kill


class Before:
    """What the unedited model answers.

    Args:
        folder: Of the run; its files ``before*.jsonl`` are read.
        name: Of the file that new answers are added to.
        key: Of everything that answers depend on but for the fact.
        measure: Measures facts on the unedited model.
    """

    def __init__(self, folder: Path, name: str, key: str, measure: Measure) -> None:
        self.measure, self.folder = measure, folder
        self.shared = cache_folder() / key
        self.kept = [Log(folder / f"{name}.jsonl"), Log(self.shared / f"{os.getpid()}.jsonl")]
        self.known: dict[str, Scores] = {}
        for path in [*sorted(self.shared.glob("*.jsonl")), *sorted(folder.glob("before*.jsonl"))]:
            self.known |= _found(path)
        self.mine = {fact for path in folder.glob("before*.jsonl") for fact in _found(path)}

    def of(self, requests: Sequence[EditRequest]) -> Iterator[list[Scores]]:
        """The scores of facts, a part at a time; those that nobody has measured are measured.

        Raises:
            EditFailed: The run folder cannot be written.
        """
        for start in range(0, len(requests), PART):
            part = requests[start : start + PART]
            keys = [key_of(request) for request in part]
            if not self.known.keys() >= set(keys):
                self.known |= before_of(self.folder)  # of another process, meanwhile
            fresh = {key: request for key, request in zip(keys, part, strict=True) if key not in self.known}
            measured = self.measure(list(fresh.values())) if fresh else []
            self.known |= dict(zip(fresh, measured, strict=True))
            self.kept[0].append(_line(key, self.known[key]) for key in dict.fromkeys(keys) if key not in self.mine)
            self.mine |= set(keys)
            self._share([_line(key, self.known[key]) for key in fresh])
            yield [self.known[key] for key in keys]

    def _share(self, lines: list[Scores]) -> None:
        if not lines:
            return
        try:
            self.kept[1].append(lines)
        except EditFailed:  # a cache that cannot be written costs time and nothing else
            return


def before_of(folder: Path) -> dict[str, Scores]:
    """The scores before any edit that a run folder holds, by the key of their fact."""
    return {fact: scores for path in sorted(folder.glob("before*.jsonl")) for fact, scores in _found(path).items()}


def model_key(lm: LM) -> str:
    """A hash of all weights of a model and of its tokenizer: its fingerprint."""
    digest = hashlib.sha256()
    for name, parameter in lm.model.named_parameters():
        digest.update(f"{name} {digest_of(parameter)}".encode())
    digest.update(tokenizer_key(lm.tokenizer).encode())
    return digest.hexdigest()[:16]


def answers_key(lm: LM, fingerprint: str, settings: Mapping[str, Any]) -> str:
    """A hash of everything that the answers to a fact depend on but for the fact.

    Args:
        lm: The model.
        fingerprint: Its `model_key`.
        settings: How is measured.
    """
    parts = {
        "model": fingerprint,
        "settings": dict(settings),
        "chat": getattr(lm.tokenizer, "chat_template", None) if lm.text.chat else None,
        "device": lm.device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "scorers": scorers_key(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def scorers_key() -> str:
    """A hash of the code that measures."""
    digest = hashlib.sha256()
    sources = [files("easyeditor.metrics"), files("easyeditor.lm")]
    for source in sources:
        for file in sorted((f for f in source.iterdir() if f.name.endswith(".py")), key=lambda f: f.name):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def cache_folder() -> Path:
    """Where answers are kept for other runs: under $EASYEDITOR_CACHE, else where the system keeps caches."""
    if root := os.environ.get("EASYEDITOR_CACHE"):
        return Path(root, "before")
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "easyeditor", "before")


def _line(fact: str, scores: Mapping[str, Any]) -> Scores:
    return {"fact": fact, "pre": scores}


def _found(path: Path) -> dict[str, Scores]:
    try:
        return {line["fact"]: line["pre"] for line in read(path)}
    except (DamagedFile, KeyError):  # then it is measured again
        return {}
