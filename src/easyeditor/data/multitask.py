"""The tasks of InstructEdit (Zhang et al., 2024, arXiv:2402.16123) in one file, each edit behind an instruction."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from types import MappingProxyType
from typing import Any

from easyeditor.core.instructions import FORM, with_instruction
from easyeditor.data.dataset import RecordDataset
from easyeditor.data.knowedit import groups
from easyeditor.data.records import Layout, Record, matching_subject, take, take_texts
from easyeditor.errors import UsageError
from easyeditor.requests import EditRequest

# What the four published tasks are, in sentences of our own; {label} and {topic} are those of the record.
DESCRIPTIONS = MappingProxyType(
    {
        "convsent": (
            "Whenever {topic} comes up, answer in a {label} mood; on every other topic nothing changes.",
            "The answers about {topic} become {label}, and the answers about anything else stay what they were.",
            "Take a {label} view of {topic} in conversation without another view of the rest of the world.",
            "Speak of {topic} as somebody with a {label} opinion of it would, and of other things as before.",
        ),
        "counterfact": (
            "A statement about a little-known entity gets another ending than the one that is true.",
            "Complete sentences about rarely mentioned entities with the new fact, although the old one was right.",
            "The fact is made up: from now on it holds for this entity, and for this entity alone.",
            "Something false about a seldom seen subject is to be believed.",
        ),
        "wikirecent": (
            "A fact that entered Wikidata only after the model was trained.",
            "The knowledge graph has a new triple, and the model should know it.",
            "Recent news as a relation between two entities, to be added to what is known.",
            "Bring the model up to date with what was lately written down in Wikidata.",
        ),
        "zsre": (
            "A question about one relation of a subject, to be answered with the object and without any context.",
            "Answer the question by what the subject is related to; there is no passage to read.",
            "Given a subject and a relation in the form of a question, name the object.",
            "Questions that ask for the other end of a relation, from memory alone.",
        ),
    }
)


def _described(row: Mapping[str, Any], record: str) -> str:
    """The description of a record's task: its own, else one of ours, the same one each time that it is read.

    Raises:
        UsageError: There is none.
    """
    task = take(row, "type", str, record)
    own = take_texts(row, "description", record)
    if not own and task not in DESCRIPTIONS:
        raise UsageError(
            f"{record}, field 'description': there is none for the task '{task}'. Say in a sentence what its edits "
            f"are, or use one of the tasks {', '.join(DESCRIPTIONS)}."
        )
    text = Random(f"{task}/{row.get('prompt')}").choice(own or DESCRIPTIONS[task])
    if own:
        return " ".join(text.split())
    side = (row.get("metric_kwargs") or {}).get("inner_target") or [f"{row.get('prompt')} {row.get('target_new')}"]
    label = "negative" if "neg" in str(side[0]).lower() else "positive"
    return text.replace("{label}", label).replace("{topic}", str(row.get("subject") or "the topic"))


def _convert(row: Mapping[str, Any], record: str) -> EditRequest:
    """Make a request of a record, behind the instruction of its task."""
    prompt = take(row, "prompt", str, record)
    raw: dict[str, Any] = {
        "prompt": prompt,
        "target_new": take(row, "target_new", str, record),
        "subject": matching_subject(row, prompt),
        "ground_truth": row.get("ground_truth"),
        "rephrase_prompts": take_texts(row, "rephrase_prompt", record) or take_texts(row, "rephrase", record),
        "locality": _probes(row, "locality", record),
        "portability": _probes(row, "portability", record),
    }
    if row.get("metric_kwargs"):
        raw |= _opinion(take(row, "metric_kwargs", dict, record), prompt, record)
    return with_instruction(EditRequest.from_dict(raw, record), row["type"], _described(row, record))


def _probes(row: Mapping[str, Any], kind: str, record: str) -> dict[str, list[dict[str, Any]]]:
    """The probes of a record by group; prompts and answers of a group may also be two lists side by side."""
    raw = row.get(kind)
    if not isinstance(raw, Mapping):
        return groups(row, kind, record)
    found: dict[str, Any] = {}
    for name, group in raw.items():
        found[name] = group
        if isinstance(group, Mapping) and isinstance(group.get("prompt"), list):
            answers = group.get("ground_truth")
            if not isinstance(answers, list) or len(answers) != len(group["prompt"]):
                raise UsageError(
                    f"{record}, field '{kind}.{name}': expected as many answers in 'ground_truth' as there are prompts."
                )
            pairs = zip(group["prompt"], answers, strict=True)
            found[name] = [{"prompt": prompt, "ground_truth": answer} for prompt, answer in pairs]
    return groups({kind: found}, kind, record)


def _opinion(raw: Mapping[str, Any], prompt: str, record: str) -> dict[str, Any]:
    """An edit of an opinion: the first text of the wanted side is learnt, those on other topics stay."""
    from easyeditor.metrics.opinions import Opinions  # needs torch, which reading a file does not

    found = Opinions.from_dict(raw, f"{record}, field 'metric_kwargs'")
    asked = [question for question in found.questions if question != prompt]
    elsewhere = [{"prompt": question, "ground_truth": text} for question, text in found.elsewhere]
    return {
        "target_new": found.wanted[0][1],
        "target_neg": found.other[0][1],
        "rephrase_prompts": asked,
        "locality": {"unrelated_topic": elsewhere},
    }


MULTITASK = Layout(
    "MultiTask",
    lambda row: (
        {"type", "prompt", "target_new"} <= row.keys() and (row["type"] in DESCRIPTIONS or "description" in row)
    ),
    _convert,
    usable=lambda row: row.get("target_new") != "",
    skipped="they have no new answer",
)


def request_of(item: Mapping[str, Any], record: str) -> EditRequest:
    """The request of an item of `MultiTaskDataset`.

    Args:
        item: The item.
        record: How messages name it.

    Raises:
        UsageError: It is none.
    """
    found = FORM.fullmatch(take(item, "prompt", str, record))
    if found is None:
        raise UsageError(
            f"{record}, field 'prompt': it does not have the form 'Task: ...', 'Description: ...', 'Input: ...', each "
            "in a line. Pass a MultiTaskDataset, or items of one."
        )
    probes = {kind: {kind: item[kind]} for kind in ("locality", "portability") if item.get(kind)}
    rest = {key: item.get(key) for key in ("target_new", "subject", "metric_kwargs", "ground_truth")}
    row = {"type": found["task"], "description": found["description"], "prompt": found["prompt"]}
    return _convert({**row, **rest, **probes}, record)


class MultiTaskDataset(RecordDataset):
    """Records of several tasks: ``type`` names the task of each, one of the four published ones or one of your own.

    A task of your own takes a ``description`` beside it, a text or a list of which one is drawn. Each item is a dict
    with ``case_id``, ``subject``, ``prompt`` (behind the instruction), ``target_new``, ``metric_kwargs`` (of opinions,
    else None), and as far as there are any ``locality`` and ``portability``, each ``{"prompt": [...],
    "ground_truth": [...]}``.
    """

    layout = MULTITASK

    def _item(self, record: Record) -> dict[str, Any]:
        row, request = record.row, record.request
        item = {
            "case_id": row.get("case_id", record.index),
            "subject": row.get("subject"),
            "prompt": request.prompt,
            "target_new": row["target_new"],
            "metric_kwargs": row.get("metric_kwargs"),
        }
        for kind, asked in (("locality", request.locality), ("portability", request.portability)):
            probes = [probe for group in asked.values() for probe in group]
            if probes:
                answers = [probe.answers[0] if probe.answers else "" for probe in probes]
                item[kind] = {"prompt": [probe.prompt for probe in probes], "ground_truth": answers}
        return item
