"""What is to be changed: `EditRequest`, validated when built, and the probes that go with it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from easyeditor.errors import UsageError, did_you_mean

REQUEST_KEYS = (
    "prompt",
    "target_new",
    "subject",
    "ground_truth",
    "target_neg",
    "rephrase_prompt",
    "rephrase_prompts",
    "locality",
    "portability",
    "loc_prompt",
    "case_id",
)


@dataclass(frozen=True)
class Probe:
    """A question that is asked before and after an edit.

    Args:
        prompt: The text in front of the answer.
        answers: The accepted answers, the usual one first. May be empty for a locality probe, whose reference is
            what the model said before the edit.
    """

    prompt: str
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class EditRequest:
    """One piece of knowledge to change.

    Args:
        prompt: The text in front of the answer, such as ``"The capital of France is"``.
        target_new: The answer that the edited model should give.
        subject: The part of the prompt that names the entity; some methods need it.
        ground_truth: The answer before the edit, if known.
        target_neg: An answer to move away from, for methods that learn from preferences.
        rephrase_prompts: Other wordings of the prompt.
        locality: Named groups of probes whose answers must not move.
        portability: Named groups of probes whose answers follow from the edit.
        loc_prompt: An unrelated text, for methods that train on one.
        case_id: The number of the record in its data set.
        record: Where the request came from, for error messages.

    Raises:
        UsageError: A text is missing or empty, or the subject does not occur in the prompt.
    """

    prompt: str
    target_new: str
    subject: str | None = None
    ground_truth: str | None = None
    target_neg: str | None = None
    rephrase_prompts: tuple[str, ...] = ()
    locality: Mapping[str, tuple[Probe, ...]] = field(default_factory=dict)
    portability: Mapping[str, tuple[Probe, ...]] = field(default_factory=dict)
    loc_prompt: str | None = None
    case_id: int | None = None
    record: str = field(default="The request", compare=False, repr=False)

    def __post_init__(self) -> None:
        _text(self.record, "prompt", self.prompt, "Give the text that stands in front of the answer.")
        _text(self.record, "target_new", self.target_new, "Give the answer that the edited model should produce.")
        object.__setattr__(
            self, "rephrase_prompts", _texts(self.record, "rephrase_prompt", self.rephrase_prompts)
        )  # one text is one wording, not one per letter
        if self.subject is not None:
            _text(self.record, "subject", self.subject, "Name the entity, or leave the field out.")
            if self.subject not in self.prompt:
                raise UsageError(
                    f"{self.record}, field 'subject': '{self.subject}' does not occur in the prompt '{self.prompt}'. "
                    "Copy the subject exactly as the prompt spells it."
                )

    def require(self, names: Iterable[str], method: str) -> None:
        """Check that the fields that a method needs are there.

        Raises:
            UsageError: A field is missing; the message names record, field and remedy.
        """
        for name in names:
            if not getattr(self, name):
                raise UsageError(
                    f"{self.record}, field '{name}': {method} needs it and it is missing. "
                    f"Add '{name}' to the record, or choose a method that does without ('easyedit methods' lists them)."
                )

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], record: str = "The request") -> EditRequest:
        """Build a request from the dict layout of existing scripts.

        Args:
            raw: Keys ``prompt``, ``target_new`` and optionally ``subject``, ``ground_truth``, ``target_neg``,
                ``rephrase_prompt`` (text or list), ``locality`` and ``portability``
                (``{name: {"prompt": ..., "ground_truth": ...}}``, or a list of such dicts under each name),
                ``loc_prompt``, ``case_id``.
            record: How error messages name this record.

        Returns:
            The validated request.

        Raises:
            UsageError: A key is unknown, missing or of the wrong kind.
        """
        if not isinstance(raw, Mapping):
            raise UsageError(f"{record} is a {type(raw).__name__}; a request is a dict with 'prompt' and 'target_new'.")
        for key in raw:
            if key not in REQUEST_KEYS:
                raise UsageError(f"{record}: unknown field '{key}'. {did_you_mean(str(key), REQUEST_KEYS)}")
        for key in ("prompt", "target_new"):
            if key not in raw:
                raise UsageError(
                    f"{record}, field '{key}': it is missing. Every request has 'prompt' and 'target_new'."
                )
        rephrase = raw.get("rephrase_prompts") or raw.get("rephrase_prompt") or ()
        return cls(
            prompt=raw["prompt"],
            target_new=raw["target_new"],
            subject=raw.get("subject"),
            ground_truth=_first_answer(raw.get("ground_truth")),
            target_neg=raw.get("target_neg"),
            rephrase_prompts=_texts(record, "rephrase_prompt", rephrase),
            locality=_groups(record, "locality", raw.get("locality") or {}),
            portability=_groups(record, "portability", raw.get("portability") or {}),
            loc_prompt=raw.get("loc_prompt"),
            case_id=raw.get("case_id"),
            record=record,
        )

    def to_dict(self) -> dict[str, Any]:
        """The request in the dict layout of existing scripts, as it stands in a metric record."""
        out: dict[str, Any] = {
            "prompt": self.prompt,
            "target_new": self.target_new,
            "ground_truth": self.ground_truth,
            "portability": {name: _probe_dict(probes) for name, probes in self.portability.items()},
            "locality": {name: _probe_dict(probes) for name, probes in self.locality.items()},
        }
        for key in ("subject", "target_neg", "loc_prompt"):
            if getattr(self, key) is not None:
                out[key] = getattr(self, key)
        if self.rephrase_prompts:
            out["rephrase_prompt"] = (
                self.rephrase_prompts[0] if len(self.rephrase_prompts) == 1 else list(self.rephrase_prompts)
            )
        return out


def subject_span(prompt: str, subject: str) -> tuple[int, int]:
    """Where the subject stands in a prompt.

    The last occurrence counts, because only there has the model read everything about it; an occurrence that is a
    whole word goes before one inside a word.

    Args:
        prompt: The text.
        subject: The entity, spelt as in the text.

    Returns:
        Start and end in characters, end exclusive.

    Raises:
        UsageError: The subject does not occur.
    """
    whole = list(re.finditer(rf"(?<!\w){re.escape(subject)}(?!\w)", prompt))
    start = whole[-1].start() if whole else prompt.rfind(subject)
    if start < 0 or not subject:
        raise UsageError(
            f"The subject '{subject}' does not occur in the prompt '{prompt}'. Copy it exactly as the prompt spells it."
        )
    return start, start + len(subject)


def probes_of(record: str, field_name: str, prompt: Any, answer: Any) -> tuple[Probe, ...]:
    """Build the probes of one group from a text or a list of texts and the answers beside them.

    Args:
        record: How error messages name the record.
        field_name: The field, for error messages.
        prompt: One prompt, or a list of them.
        answer: For one prompt: an answer or a list of accepted answers. For a list: one of these per prompt.

    Returns:
        One probe per prompt.

    Raises:
        UsageError: Lists of different lengths, or something that is no text.
    """
    if isinstance(prompt, str):
        return (Probe(prompt, _answers(answer)),)
    prompts = _texts(record, field_name, prompt)
    if answer is None:
        return tuple(Probe(text) for text in prompts)
    answers = [answer] if isinstance(answer, str) else list(answer)
    if len(answers) != len(prompts):
        raise UsageError(
            f"{record}, field '{field_name}': {len(prompts)} prompts but {len(answers)} answers. "
            "Give one 'ground_truth' (or one list of accepted answers) per prompt."
        )
    return tuple(Probe(text, _answers(each)) for text, each in zip(prompts, answers, strict=True))


def _groups(record: str, field_name: str, raw: Any) -> dict[str, tuple[Probe, ...]]:
    if not isinstance(raw, Mapping):
        raise UsageError(
            f"{record}, field '{field_name}': expected {{name: {{'prompt': ..., 'ground_truth': ...}}}}, "
            f"got a {type(raw).__name__}."
        )
    out: dict[str, tuple[Probe, ...]] = {}
    for name, group in raw.items():
        items = [group] if isinstance(group, Mapping) else group
        where = f"{field_name}.{name}"
        if items is None:
            continue
        if isinstance(items, str) or not isinstance(items, Sequence):
            raise UsageError(f"{record}, field '{where}': expected a dict with 'prompt' and 'ground_truth'.")
        found: list[Probe] = []
        for item in items:
            if isinstance(item, Probe):
                found.append(item)
                continue
            if not isinstance(item, Mapping) or "prompt" not in item:
                raise UsageError(f"{record}, field '{where}': a probe without 'prompt'. Add it, or drop the probe.")
            if item["prompt"] is not None:
                found.extend(probes_of(record, where, item["prompt"], item.get("ground_truth")))
        if found:
            out[str(name)] = tuple(found)
    return out


def _text(record: str, field_name: str, value: Any, remedy: str) -> None:
    if not isinstance(value, str):
        raise UsageError(f"{record}, field '{field_name}': expected a text, got {value!r}. {remedy}")
    if not value.strip():
        raise UsageError(f"{record}, field '{field_name}': it is empty. {remedy}")


def _texts(record: str, field_name: str, value: Any) -> tuple[str, ...]:
    items = tuple(value) if isinstance(value, list | tuple) else (value,)
    for item in items:
        _text(record, field_name, item, "Give a text or a list of texts.")
    return items


def _answers(value: Any) -> tuple[str, ...]:
    """All accepted answers in a text or in lists nested to any depth, in order."""
    if value is None:
        return ()
    if isinstance(value, str | int | float):
        return (str(value),) if str(value).strip() else ()
    return tuple(text for item in value for text in _answers(item))


def _first_answer(value: Any) -> str | None:
    found = _answers(value)
    return found[0] if found else None


def _probe_dict(probes: tuple[Probe, ...]) -> dict[str, Any]:
    if len(probes) == 1:
        answers = probes[0].answers
        return {"prompt": probes[0].prompt, "ground_truth": answers[0] if len(answers) == 1 else list(answers)}
    return {"prompt": [p.prompt for p in probes], "ground_truth": [list(p.answers) for p in probes]}
