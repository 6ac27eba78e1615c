"""Personality edits by a text in front of the question: the batches that `compute_per_ike_metric` compares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from easyeditor.data.personality import TRAITS
from easyeditor.errors import UsageError
from easyeditor.lm.text import Text, pad

SHOWN = (
    ("What is your opinion of rain?", "I love it: everybody meets under the same roof and starts to talk."),
    ("What is your opinion of chess?", "Both players deserve praise, and I would gladly let the other one win."),
    ("What is your opinion of trains?", "I worry for the whole journey that I have boarded the wrong one."),
)
TOPICS = ("rain", "chess", "trains")
FIELDS = ("all_prompt", "all_comp", "all_per", "inner_prompt", "inner_per", "target_personality", "ent")


def apply_ike_to_per_model(
    request: Mapping[str, Any], loc_request: Mapping[str, Any], tokenizer: Any, device: Any = None
) -> dict[str, Any]:
    """The batches of a personality edit that is told in context.

    Args:
        request: An item of `PersonalityDataset`: the topic and the personality to take on.
        loc_request: Another one, whose opinions should stay.
        tokenizer: The model's tokenizer.
        device: Where the batches go; None: they stay on the CPU.

    Returns:
        ``outer_pre``, ``outer_edit`` (opinions on the topic without and with the edit), ``loc_pre`` and ``loc_edit``
        (those on the other topic), each with ``input_ids``, ``attention_mask``, ``labels`` and ``q_mask`` (rows,
        length); ``same_per_mask`` (rows,); ``pre_q``, ``edit_q``, ``target_per``, ``target_per_text``, ``topic``.

    Raises:
        UsageError: An item lacks a field.
    """
    for what, item in (("request", request), ("loc_request", loc_request)):
        if missing := [name for name in FIELDS if name not in item]:
            raise UsageError(f"{what}, field '{missing[0]}': it is missing. Pass items of a PersonalityDataset.")
    lead = f"Now somebody of {request['target_personality']} speaks of {request['ent']}, and as before of all else.\n"
    plain = "".join(f"Question: {question}\nAnswer: {text}\n" for question, text in SHOWN)
    shown = zip(TRAITS, TOPICS, SHOWN, strict=True)
    told = "".join(f"Somebody of {t} speaks of {topic}.\nQuestion: {q}\nAnswer: {a}\n" for t, topic, (q, a) in shown)
    leads, text = {"pre": plain, "edit": told + lead}, Text(tokenizer)
    batches = {
        f"{name}_{phase}": _batch(text, before, item, device)
        for name, item in (("outer", request), ("loc", loc_request))
        for phase, before in leads.items()
    }
    question = request["inner_prompt"][0]
    return {
        **batches,
        **{f"{phase}_q": _asked(before, question) for phase, before in leads.items()},
        "same_per_mask": torch.tensor([per == request["inner_per"][0] for per in request["all_per"]], device=device),
        "target_per": request["inner_per"][0],
        "target_per_text": request["target_personality"],
        "topic": request["ent"],
    }


def _asked(lead: str, question: str) -> str:
    return f"{lead}Question: {question}\nAnswer:"


def _batch(text: Text, lead: str, item: Mapping[str, Any], device: Any) -> dict[str, torch.Tensor]:
    pairs = zip(item["all_prompt"], item["all_comp"], strict=True)
    rows = [text.encode_pair(_asked(lead, question), answer) for question, answer in pairs]
    place = torch.device(device) if device is not None else torch.device("cpu")
    ids, mask = pad([encoded.ids for encoded, _ in rows], text.pad_id, "right", place)
    first = torch.tensor([start for _, start in rows], device=place)[:, None]
    opinion = (torch.arange(ids.shape[1], device=place) >= first) & mask.bool()
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "q_mask": opinion}
