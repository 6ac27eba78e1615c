"""Demonstrations of following a new fact: the sentences of a training set, found by what they are like.

Each record gives up to three: the fact with its own prompt (copy), with another wording (update), and with a prompt
that it says nothing about (retain).
"""

from __future__ import annotations

import json
import os
import pickle
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from easyeditor.core.retrieval import Retriever, SentenceModel, embed, normalised, retriever_over
from easyeditor.errors import DamagedFile, UsageError, unwritable
from easyeditor.requests import EditRequest

KINDS = ("copy", "update", "retain")
CYCLE = ("retain", "update", "retain", "update", "retain", "copy", "retain", "update")  # 1 : 3 : 4
ALIKE = 0.99  # the cosine from which on two embeddings of one text are of one model
NUMPY = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric", "numpy._core.numeric")
HARMLESS = ("dtype", "ndarray", "_reconstruct", "_frombuffer", "scalar")


@dataclass(frozen=True)
class Lesson:
    """One record of a training set: its fact and its demonstrations by kind."""

    fact: str
    texts: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class Demonstrations:
    """The demonstrations of a training set.

    Args:
        lessons: Its records.
        encode: A sentence model; None: they are found by words.
        vectors: The embeddings of all demonstrations, (n, d), if they are known.
    """

    lessons: tuple[Lesson, ...]
    encode: SentenceModel | None = None
    vectors: Tensor | None = None

    @cached_property
    def sentences(self) -> list[str]:
        """All demonstrations."""
        return sentences(self.lessons)

    @cached_property
    def _all(self) -> Retriever:
        return retriever_over(self.sentences, self.encode, self.vectors)

    @cached_property
    def _facts(self) -> Retriever:
        return retriever_over([lesson.fact for lesson in self.lessons], self.encode)

    def nearest(self, request: EditRequest, k: int) -> list[str]:
        """The k demonstrations most like a new fact, of whatever kind, the most like first."""
        query = f"New Fact: {request.prompt} {request.target_new}\nPrompt: {request.prompt}\n\n"
        return [self.sentences[i] for i, _ in self._all.nearest(query, k)]

    def mixed(self, request: EditRequest, k: int) -> list[str]:
        """One demonstration of each of the k facts most like a new one, the kinds in 1 : 3 : 4, the most like last."""
        hits = self._facts.nearest(f"{request.prompt} {request.target_new}", k)
        found = []
        for place, (i, _) in enumerate(hits):
            texts = self.lessons[i].texts
            found.append(texts.get(CYCLE[place % len(CYCLE)], texts["copy"]))
        return found[::-1]


def lessons_of(ds: Any) -> tuple[Lesson, ...]:
    """The records of a training set.

    Args:
        ds: A sequence of dicts or of requests.

    Raises:
        UsageError: It is empty, or a record has no prompt or answer.
    """
    found = tuple(_lesson(record, i) for i, record in enumerate(ds))
    if not found:
        raise UsageError("The training set is empty. Give at least one record with 'prompt' and 'target_new'.")
    return found


def sentences(lessons: Sequence[Lesson]) -> list[str]:
    """All demonstrations of some records, in order."""
    return [lesson.texts[kind] for lesson in lessons for kind in KINDS if kind in lesson.texts]


def demonstrations_of(ds: Any, encode: SentenceModel | None, results_dir: str, method: str) -> Demonstrations:
    """The demonstrations of a training set, with the embeddings on disk where there are some.

    Args:
        ds: The training set.
        encode: A sentence model; None: by words, and nothing is read from disk.
        results_dir: Where embeddings are kept.
        method: The name of the folder in it.

    Raises:
        UsageError: A record is none, or the embeddings on disk are of another data set or model.
        DamagedFile: They cannot be read.
    """
    lessons = lessons_of(ds)
    if encode is None:
        return Demonstrations(lessons)
    stem = place_of(ds, results_dir, method, encode.name)
    for path, read in ((stem + ".safetensors", _read), (stem + ".pkl", _unpickled)):
        if Path(path).is_file():
            kept, vectors, origin = read(Path(path))
            _check(Path(path), kept, vectors, origin, sentences(lessons), ds, encode)
            return Demonstrations(lessons, encode, vectors)
    return Demonstrations(lessons, encode)


def written(model: Any, ds: Any, results_dir: str, method: str, name: str) -> Path:
    """Embed the demonstrations of a training set and write them; see `easyeditor.methods.ike.encode_ike_facts`."""
    texts = sentences(lessons_of(ds))
    tensors = {"embeddings": embed(model, texts).contiguous()}
    about = {"sentences": json.dumps(texts, ensure_ascii=False), "model": name, "data_set": type(ds).__name__}
    path = Path(place_of(ds, results_dir, method, name) + ".safetensors")
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        save_file(tensors, temporary, metadata=about)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise unwritable(f"The embeddings '{path}'", error) from None
    finally:
        if temporary is not None and Path(temporary).exists():
            os.unlink(temporary)
    return path


def place_of(ds: Any, results_dir: str, method: str, model: str) -> str:
    """Where the embeddings of a training set are, without the ending."""
    return f"{results_dir}/{method}/embedding/{Path(model).name}_{type(ds).__name__}_{len(ds)}"


def _lesson(record: Any, index: int) -> Lesson:
    prompt: str | None = None
    target: str | None = None
    rephrased: str | None = None
    other: str | None = None
    if isinstance(record, EditRequest):
        probes = [probe for group in record.locality.values() for probe in group if probe.answers]
        prompt, target = record.prompt, record.target_new
        rephrased = next(iter(record.rephrase_prompts), None)
        other = f"{probes[0].prompt} {probes[0].answers[0]}" if probes else None
    elif isinstance(record, Mapping):
        prompt, target, rephrased, near, said = (
            _first(record.get(key))
            for key in ("prompt", "target_new", "rephrase_prompt", "locality_prompt", "locality_ground_truth")
        )
        other = f"{near} {said}" if near and said else None
    if not prompt or not target:
        raise UsageError(
            f"Record {index} of the training set has no 'prompt' and 'target_new', but is {str(record)[:60]!r}. "
            "Give dicts with these fields, and 'rephrase_prompt', 'locality_prompt' and 'locality_ground_truth' if any."
        )
    lead = f"New Fact: {prompt} {target}\nPrompt: "
    texts = {"copy": f"{lead}{prompt} {target}\n\n"}
    texts |= {"update": f"{lead}{rephrased} {target}\n\n"} if rephrased else {}
    texts |= {"retain": f"{lead}{other}\n\n"} if other else {}
    return Lesson(f"{prompt} {target}", texts)


def _first(value: Any) -> str | None:
    """A text, or the first of a list of texts."""
    while isinstance(value, list | tuple):
        value = value[0] if value else None
    return str(value) if value is not None and str(value).strip() else None


def _read(path: Path) -> tuple[list[str], Tensor, str]:
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            return list(json.loads(about["sentences"])), file.get_tensor("embeddings"), str(about.get("model", ""))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from None


def _unpickled(path: Path) -> tuple[list[str], Tensor, str]:
    """What an existing script wrote: a dict of texts and a numpy array. Nothing else can be in it."""
    try:
        with path.open("rb") as file:
            found = _Plain(file).load()
        kept, vectors = list(found["sentences"]), torch.as_tensor(np.asarray(found["embeddings"], dtype=np.float32))
    except UsageError:
        raise
    except Exception as error:  # a pickle can fail in any way
        raise _damaged(path, f"{type(error).__name__}: {error}") from None
    return kept, vectors, ""


class _Plain(pickle.Unpickler):
    """Reads texts, lists, dicts, numbers and numpy arrays."""

    def find_class(self, module: str, name: str) -> Any:
        if (module in NUMPY and name in HARMLESS) or (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise UsageError(
            f"The embedding file is a pickle that would run '{module}.{name}'; only texts and numpy arrays are read "
            "from one. Write the embeddings anew with encode_ike_facts, which pickles nothing."
        )


def _check(
    path: Path, kept: list[str], vectors: Tensor, origin: str, wanted: list[str], ds: Any, encode: SentenceModel
) -> None:
    """See that embeddings on disk belong to the training set and to the sentence model."""
    here = f"the training set {type(ds).__name__} ({len(wanted)} demonstrations, the first {wanted[0][:60]!r})"
    if kept != wanted:
        there = f"{len(kept)} demonstrations, the first {str(kept[0])[:60]!r}" if kept else "no demonstrations"
        raise UsageError(
            f"The embedding file '{path}' is of another data set ({there}) than {here}. "
            "Write it anew with encode_ike_facts, or choose another results_dir."
        )
    first = encode(wanted[:1])
    same = vectors.shape == (len(wanted), first.shape[1])
    if not same or float((normalised(vectors[:1]) * normalised(first)).sum()) < ALIKE:
        raise UsageError(
            f"The embedding file '{path}' is of another sentence model ({origin or 'not named'}, {vectors.shape[-1]} "
            f"dimensions) than '{encode.name}' ({first.shape[1]} dimensions). Write it anew with encode_ike_facts, or "
            "set sentence_model_name to the model that it is of."
        )


def _damaged(path: Path, said: str) -> DamagedFile:
    return DamagedFile(
        f"The embedding file '{path}' cannot be read ({' '.join(said.split())[:120]}). Delete it, and write it anew "
        "with encode_ike_facts."
    )
