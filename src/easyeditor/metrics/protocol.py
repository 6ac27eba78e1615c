"""The protocol of each number: how the answer was had, how it was scored, and what it may be compared with."""

from __future__ import annotations

from typing import Any, Literal

from easyeditor.lm.model import LM

Way = Literal[
    "teacher_forced", "generated", "generated_tokens", "agreement", "generated_agreement", "probability", "sampled",
    "divergence", "negated", "judged", "not_judged", "text_only", "long_text", "perplexity", "prompt_tokens"
]  # fmt: skip


def protocol(lm: LM, way: Way, result_key: str, by: str = "") -> dict[str, Any]:
    """The entry of ``metric_meta`` for one number.

    Args:
        lm: The model as it is asked: with a prompt edit on it, the answer stands in the context.
        way: How the number is made.
        result_key: Under which key the number stands.
        by: What else two numbers must share to be compared: the judge, the variant of a score.

    Returns:
        ``result_key``, ``protocol``, ``scorer``, ``comparable_group`` and ``answer_in_context``.
    """
    forced = "seq2seq_teacher_forcing" if lm.seq2seq else "decoder_only_teacher_forcing"
    name, scorer = {
        "teacher_forced": (forced, "token_accuracy"),
        "generated": ("free_generation", "exact_match"),
        "generated_tokens": ("free_generation", "macro_token_f1"),
        "agreement": ("pre_post_argmax_token_match", "token_agreement"),
        "generated_agreement": ("pre_post_free_generation_output_match", "text_agreement"),
        "probability": (forced, "probability_comparison"),
        "sampled": ("sampled_continuation", "ngram_entropy"),
        "divergence": ("pre_post_next_token_distribution", "jensen_shannon_bits"),
        "negated": ("free_generation", "target_not_said"),
        "judged": ("free_generation_judge", "llm_judge"),
        "not_judged": ("free_generation_exact_match_fallback", "exact_match"),
        "text_only": ("free_generation_raw_text", "none"),
        "long_text": ("free_generation_text", "overlap"),
        "perplexity": ("teacher_forcing_ppl", "perplexity"),
        "prompt_tokens": ("ood_ppl_threshold", "share_of_prompt_tokens_above_0.8"),
    }[way]
    scorer = f"{scorer}:{by}" if by else scorer
    name = ("icl_" if lm.rewriters else "") + name + ("+chat_template" if lm.text.chat else "")
    family = "seq2seq" if lm.seq2seq else "lm"
    return {
        "result_key": result_key,
        "protocol": name,
        "scorer": scorer,
        "comparable_group": f"{family}.{name}.{scorer}",
        "answer_in_context": bool(lm.rewriters),
    }
