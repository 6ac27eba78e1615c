"""What EasyEdit's ``eval_metric`` and ``evaluation_type`` put into a record, under the keys that its scripts read.

Free generation stays beside it as ``rewrite_gen``; each number says in ``metric_meta`` how it was made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from easyeditor.lm.model import LM
from easyeditor.metrics.likelihood import Reading, read_texts
from easyeditor.metrics.perplexity import exp_mean_nll
from easyeditor.metrics.protocol import protocol
from easyeditor.metrics.scores import Scores
from easyeditor.requests import EditRequest

LIKELY = 0.8  # a prompt token counts as known from this probability on
Pairs = Mapping[tuple[str, str], Reading]


def as_existing_scripts(lm: LM, request: EditRequest, scores: dict[str, Any], pairs: Pairs, wanted: Scores) -> None:
    """Reshape a measurement for a script that asks for another ``eval_metric`` or ``evaluation_type``.

    Args:
        lm: The model.
        request: What was measured.
        scores: Its measurement; changed in place.
        pairs: Prompt and answer -> how it is read.
        wanted: What was asked for; nothing is changed by default.
    """
    if wanted.evaluation_type:
        _free_answers(lm, request, scores, wanted)
    elif wanted.eval_metric in ("ppl", "ood_ppl"):
        names = {"rewrite": (request.prompt,), "rephrase": request.rephrase_prompts}
        for name, prompts in names.items():
            if not prompts:
                continue
            del scores[f"{name}_acc"]
            if wanted.eval_metric == "ppl":
                scores[f"{name}_ppl"] = perplexity_of([pairs[prompt, request.target_new] for prompt in prompts])
                meta = protocol(lm, "perplexity", f"{name}_ppl")
            else:  # one key for both, as in EasyEdit: the other wordings count where there are some
                scores["ood_acc"] = known_share(lm, [lm.rewrite(prompt) for prompt in prompts])
                meta = protocol(lm, "prompt_tokens", "ood_acc")
            scores["metric_meta"][name] = scores["metric_meta"][meta["result_key"].removesuffix("_acc")] = meta


def _free_answers(lm: LM, request: EditRequest, scores: dict[str, Any], wanted: Scores) -> None:
    """``_acc`` from free answers: the judge's verdict, without a judge exact match, with ``generate-text`` nothing."""
    scored = wanted.evaluation_type == "LLM-judge"
    judge = wanted.judge.name if wanted.judge else ""
    places = [(scores, name, name) for name in ("rewrite", "rephrase") if f"{name}_gen" in scores]
    places += [(scores["portability"], name, f"portability.{name}") for name in request.portability]
    for where, name, key in places:
        if not scored:
            del where[f"{name}_acc"]
            scores["metric_meta"][key] = protocol(lm, "text_only", f"{name}_gen_content")
        elif judge:
            where[f"{name}_acc"] = list(where[f"{name}_judge"])
            scores["metric_meta"][key] = protocol(lm, "judged", f"{name}_acc", judge)
        else:
            where[f"{name}_acc"] = list(where[f"{name}_gen"])
            scores["metric_meta"][key] = protocol(lm, "not_judged", f"{name}_acc")
    for name in request.locality:
        del scores["locality"][f"{name}_output"]


def perplexity_of(readings: list[Reading]) -> float | None:
    """The perplexity over all answer tokens; never clipped, None where it is no number."""
    return exp_mean_nll([reading.log_prob for reading in readings for _ in reading.predicted])


def known_share(lm: LM, texts: list[str]) -> float | None:
    """The share of the tokens of texts (the first excepted) that get more than the probability 0.8."""
    found = [] if lm.seq2seq else [value for row in read_texts(lm, texts) for value in row]
    return sum(value > math.log(LIKELY) for value in found) / len(found) if found else None
