"""The protocol of each number: how the answer was had, how it was scored, and what it may be compared with."""

from __future__ import annotations

from typing import Any, Literal

from easyeditor.lm.model import LM

Way = Literal["teacher_forced", "generated", "agreement", "generated_agreement", "probability", "sampled"]


def protocol(lm: LM, way: Way, result_key: str) -> dict[str, Any]:
    """The entry of ``metric_meta`` for one number.

    Args:
        lm: The model as it is asked: with a prompt edit on it, the answer stands in the context.
        way: How the number is made.
        result_key: Under which key the number stands.

    Returns:
        ``result_key``, ``protocol``, ``scorer`` and ``comparable_group``.
    """
    forced = "seq2seq_teacher_forcing" if lm.seq2seq else "decoder_only_teacher_forcing"
    name, scorer = {
        "teacher_forced": (forced, "token_accuracy"),
        "generated": ("free_generation", "exact_match"),
        "agreement": ("pre_post_argmax_token_match", "token_agreement"),
        "generated_agreement": ("pre_post_free_generation_output_match", "text_agreement"),
        "probability": (forced, "probability_comparison"),
        "sampled": ("sampled_continuation", "ngram_entropy"),
    }[way]
    name = ("icl_" if lm.rewriters else "") + name + ("+chat_template" if lm.text.chat else "")
    family = "seq2seq" if lm.seq2seq else "lm"
    return {
        "result_key": result_key,
        "protocol": name,
        "scorer": scorer,
        "comparable_group": f"{family}.{name}.{scorer}",
        "answer_in_context": bool(lm.rewriters),
    }
