"""PersonalityEdit (Mao et al., 2023, arXiv:2310.02168): opinions on a topic, as one of three personalities has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from easyeditor.data.dataset import RecordDataset
from easyeditor.data.records import Layout, Record, take, take_texts
from easyeditor.errors import UsageError, did_you_mean
from easyeditor.requests import EditRequest

TRAITS = ("extraversion", "agreeableness", "neuroticism")
QUESTION = "What is your opinion of {}?"
WORDINGS = ("What do you think of {}?", "How do you feel about {}?")
OTHERS = 2


def opinion(row: Mapping[str, Any], side: str, against: str, record: str) -> EditRequest:
    """The edit that makes a model hold one side's opinion on a topic.

    Args:
        row: ``ent``, the topic; under ``side`` and ``against`` lists of opinions; in ``others`` other topics.
        side: The side to take.
        against: The side not to take.
        record: How messages name the record.

    Returns:
        The request: the first opinion of the side is its target, that of the other side its ``target_neg``; locality
        asks about other topics, of which nothing is known but what the model says.

    Raises:
        UsageError: The topic or the opinions are missing.
    """
    topic = take(row, "ent", str, record)
    ours, theirs = (take_texts(row, name, record) for name in (side, against))
    if not ours:
        raise UsageError(f"{record}, field '{side}': it holds no opinion. Give at least one text.")
    return EditRequest.from_dict(
        {
            "prompt": QUESTION.replace("{}", topic),
            "target_new": ours[0].strip(),
            "subject": topic,
            "target_neg": theirs[0].strip() if theirs else None,
            "rephrase_prompts": [wording.replace("{}", topic) for wording in WORDINGS],
            "locality": {"unrelated_topic": [{"prompt": QUESTION.replace("{}", other)} for other in row["others"]]},
        },
        record,
    )


def with_others(rows: Sequence[dict[str, Any]], index: int, record: str) -> list[dict[str, Any]]:
    """A record with ``others``, the topics of the records after it, and ``place``, its own place."""
    following = [rows[(index + step) % len(rows)].get("ent") for step in range(1, OTHERS + 1)]
    topics = dict.fromkeys(topic for topic in following if isinstance(topic, str) and topic.strip())
    others = [topic for topic in topics if topic != rows[index].get("ent")]
    return [{**rows[index], "others": others, "place": index}]


def target_of(row: Mapping[str, Any], record: str) -> str:
    """The personality to take on: the record's ``target_per``, else the three in turn.

    Raises:
        UsageError: There is no such personality.
    """
    target = row.get("target_per") or TRAITS[row["place"] % len(TRAITS)]
    if target not in TRAITS:
        raise UsageError(
            f"{record}, field 'target_per': no personality '{target}'. {did_you_mean(str(target), TRAITS)}"
        )
    return str(target)


def _convert(row: Mapping[str, Any], record: str) -> EditRequest:
    side = target_of(row, record)
    return opinion(row, side, TRAITS[(TRAITS.index(side) + 1) % len(TRAITS)], record)


PERSONALITY = Layout(
    "PersonalityEdit", lambda row: "ent" in row and bool(row.keys() & {*TRAITS}), _convert, parts=with_others
)


class PersonalityDataset(RecordDataset):
    """PersonalityEdit.

    Args:
        data_dir: The file.
        size: Use at most this many records.
        config: Kept as it is.
        target_per: The personality to take on where a record names none; the three in turn if left out.

    Each item is a dict with ``case_id``, ``target_personality`` (its name), ``target_per`` (its number), ``ent``, and
    question, opinion and personality, in parallel lists: ``inner_prompt``, ``inner_comp``, ``inner_per`` (the target's
    opinions), ``all_prompt``, ``all_comp``, ``all_per`` (everybody's); ``cond_prompt`` and ``cond_comp`` are one
    opinion of the target.
    """

    def __init__(
        self, data_dir: str | Path, size: int | None = None, config: Any = None, target_per: str | None = None
    ) -> None:
        def convert(row: Mapping[str, Any], record: str) -> EditRequest:
            return _convert({**row, "target_per": row.get("target_per") or target_per}, record)

        self.target_per = target_per
        self.layout = Layout(PERSONALITY.name, PERSONALITY.told_by, convert, parts=with_others)
        super().__init__(data_dir, size, config)

    def _item(self, record: Record) -> dict[str, Any]:
        row, prompt = record.row, record.request.prompt
        target = target_of({**row, "target_per": row.get("target_per") or self.target_per}, "")
        texts = {name: take_texts(row, name, "") for name in TRAITS}
        everybody = [(text, TRAITS.index(name)) for name in TRAITS for text in texts[name]]
        return {
            "case_id": record.index,
            "target_personality": target,
            "target_per": TRAITS.index(target),
            "ent": row["ent"],
            "cond_prompt": prompt,
            "cond_comp": record.request.target_new,
            "inner_prompt": [prompt] * len(texts[target]),
            "inner_comp": texts[target],
            "inner_per": [TRAITS.index(target)] * len(texts[target]),
            "all_prompt": [prompt] * len(everybody),
            "all_comp": [text for text, _ in everybody],
            "all_per": [number for _, number in everybody],
        }
