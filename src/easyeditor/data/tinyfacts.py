"""TinyFacts: the fact table that the bundled model was trained on, as edit requests and as text."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from itertools import chain, islice
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from easyeditor.errors import UsageError, did_you_mean
from easyeditor.requests import EditRequest, Probe

HALVES = ("tuning", "reporting")
T = TypeVar("T")


@dataclass(frozen=True)
class Fact:
    """One fact: what it is about, the relation, the answer and its other names, and prompts of its own."""

    id: str
    subject: str
    relation: str
    answer: str
    source: str
    half: str
    aliases: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()

    @property
    def answers(self) -> tuple[str, ...]:
        """The accepted answers, the usual one first."""
        return (self.answer, *self.aliases)


@dataclass(frozen=True)
class Relation:
    """The wordings of a relation, each with ``{}`` for the subject: those a model was trained on, and the others."""

    trained: tuple[str, ...]
    held_out: tuple[str, ...]


class TinyFacts:
    """The fact table.

    Args:
        folder: Where ``facts.jsonl`` and ``relations.json`` are; the bundled table if left out.

    Raises:
        UsageError: A file is missing or broken.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.relations: dict[str, Relation] = _relations(_text(folder, "relations.json"))
        self.facts: list[Fact] = _facts(_text(folder, "facts.jsonl"), self.relations)
        self._of_relation: dict[str, list[Fact]] = defaultdict(list)
        self._of_subject: dict[str, list[Fact]] = defaultdict(list)
        for fact in self.facts:
            self._of_relation[fact.relation].append(fact)
            self._of_subject[fact.subject].append(fact)

    def requests(
        self, half: str | None = None, limit: int | None = None, seed: int = 0, per_subject: int | None = 1
    ) -> list[EditRequest]:
        """Edits of the table: each fact gets an answer that another fact of its relation has.

        A request depends on its fact and the seed only, so a smaller limit gives the first of a larger one. Locality
        probes are facts of the same half.

        Args:
            half: ``"tuning"`` or ``"reporting"``; both if left out.
            limit: At most this many.
            seed: Draws subjects, facts, new answers and probes.
            per_subject: At most this many requests about one subject; None for no bound.

        Returns:
            Requests whose ``rephrase_prompts`` are the held-out wordings, with ``locality["neighborhood"]`` (up to
            three facts of the relation) and ``locality["same_subject"]`` (up to two other facts of the subject), and
            whose ``loc_prompt`` is a fact of the other half and another relation.

        Raises:
            UsageError: There is no such half.
        """
        if half is not None and half not in HALVES:
            raise UsageError(f"The fact table has no half '{half}'. {did_you_mean(half, HALVES)}")
        found: list[EditRequest] = []
        for subject in _shuffled(self._of_subject, Random(f"{seed}")):
            facts = _shuffled(self._of_subject[subject], Random(f"{seed}/{subject}"))
            made = (self._request(f, Random(f"{seed}/{f.id}")) for f in facts if half in (None, f.half))
            found.extend(islice((request for request in made if request is not None), per_subject))
            if limit is not None and len(found) >= limit:
                break
        return found[:limit]

    def drawn(self, half: str | None = None, draws: int = 1, seed: int = 0) -> list[EditRequest]:
        """All facts, each with several new answers: what an editor is trained on.

        Args:
            half: As in `requests`.
            draws: How many new answers are drawn for a fact; of those that are alike one stays.
            seed: As in `requests`, for the first of them.

        Raises:
            UsageError: There is no such half.
        """
        every = [r for n in range(draws) for r in self.requests(half, seed=seed + n, per_subject=None)]
        return list({(request.prompt, request.target_new): request for request in every}.values())

    def sentences(self) -> list[str]:
        """Every fact in every wording that the bundled model was trained on, with its answer and a full stop."""
        return [_sentence(prompt, fact) for fact in self.facts for prompt in (*self._prompts(fact), *fact.prompts)]

    def held_out_sentences(self, half: str = "tuning") -> list[str]:
        """The facts of a half in the wordings that the bundled model never saw of them, in a drawn order."""
        found = [
            _sentence(wording.replace("{}", fact.subject), fact)
            for fact in self.facts
            if fact.half == half
            for wording in self.relations[fact.relation].held_out
        ]
        return _shuffled(dict.fromkeys(found), Random("held out"))

    def _prompts(self, fact: Fact) -> list[str]:
        return [wording.replace("{}", fact.subject) for wording in self.relations[fact.relation].trained]

    def _request(self, fact: Fact, rng: Random) -> EditRequest | None:
        """The edit of a fact, or None if its relation has no other answer."""
        peers = [f for f in self._of_relation[fact.relation] if f.subject != fact.subject]
        candidates = dict.fromkeys(f.answer for f in peers if not _same(f.answers, fact.answers))
        if not candidates:
            return None
        target = _shuffled(candidates, rng)[0]
        neighbours = _shuffled([f for f in peers if f.half == fact.half], rng)
        neighbours.sort(key=lambda f: _same(f.answers, (target,)))
        others = [f for f in self._of_subject[fact.subject] if f.relation != fact.relation and f.half == fact.half]
        groups = {"neighborhood": neighbours[:3], "same_subject": _shuffled(others, rng)[:2]}
        return EditRequest(
            prompt=self._prompts(fact)[0],
            loc_prompt=self._unrelated(fact),
            target_new=target,
            subject=fact.subject,
            ground_truth=fact.answer,
            target_neg=fact.answer,
            rephrase_prompts=tuple(w.replace("{}", fact.subject) for w in self.relations[fact.relation].held_out),
            locality={
                name: tuple(Probe(self._prompts(f)[0], f.answers) for f in group)
                for name, group in groups.items()
                if group
            },
            record=f"TinyFacts, fact {fact.id}",
        )

    def _unrelated(self, fact: Fact) -> str | None:
        """A fact of the other half and another relation, as a text: nothing in its own half is about it."""
        start = int(Random(f"unrelated/{fact.id}").random() * len(self.facts))
        for found in chain(self.facts[start:], self.facts[:start]):
            if found.half != fact.half and found.relation != fact.relation:
                return _sentence(self._prompts(found)[0], found)
        return None


def _sentence(prompt: str, fact: Fact) -> str:
    return f"{prompt} {fact.answer}" + ("" if fact.answer.endswith(".") else ".")


def _same(one: Iterable[str], other: Iterable[str]) -> bool:
    return not {text.casefold() for text in one}.isdisjoint(text.casefold() for text in other)


def _shuffled(items: Iterable[T], rng: Random) -> list[T]:
    """The items in a drawn order; only `Random.random` is used, whose values are the same in every Python."""
    return [item for _, _, item in sorted((rng.random(), place, item) for place, item in enumerate(items))]


def _text(folder: str | Path | None, name: str) -> str:
    try:
        if folder is None:
            return (files("easyeditor") / "tinyfacts" / name).read_text(encoding="utf-8")
        return (Path(folder) / name).read_text(encoding="utf-8")
    except OSError:
        place = "the package; install it again" if folder is None else f"'{folder}'; name the folder of a fact table"
        raise UsageError(f"There is no readable file '{name}' in {place}.") from None


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where}: not valid JSON ({error.msg}). Correct it there.") from None
    if not isinstance(raw, dict):
        raise UsageError(f"{where}: expected an object with named fields. Correct it there.")
    return raw


def _relations(text: str) -> dict[str, Relation]:
    raw = _parse(text, "relations.json")
    for name, wordings in raw.items():
        if not wordings.get("trained") or any("{}" not in w for kind in wordings.values() for w in kind):
            raise UsageError(f"relations.json, relation '{name}': it needs trained wordings, each with '{{}}' in it.")
    return {name: Relation(tuple(w["trained"]), tuple(w.get("held_out", ()))) for name, w in raw.items()}


def _facts(text: str, relations: dict[str, Relation]) -> list[Fact]:
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        row: dict[str, Any] = _parse(line, f"facts.jsonl, line {number}") if line.strip() else {}
        if not row:
            continue
        missing = [key for key in ("id", "subject", "relation", "answer", "half") if not row.get(key)]
        if missing or row["relation"] not in relations or row["half"] not in HALVES:
            what = f"'{missing[0]}' is missing" if missing else "its relation or half is unknown"
            raise UsageError(f"facts.jsonl, line {number}: {what}. Correct the fact there.")
        texts = {key: str(row.get(key, "")) for key in ("id", "subject", "relation", "answer", "source", "half")}
        found.append(Fact(**texts, aliases=tuple(row.get("aliases", ())), prompts=tuple(row.get("prompts", ()))))
    return found
