"""All core scores of requests on a model as it is now: reliability, generalisation, locality, portability, fluency.

Every probe of every request goes into two batches: one is answered freely, one is read with the answer given. Locality
has no score of its own in one measurement; `compare_locality` makes it from two.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from easyeditor.lm.generate import answer, sample
from easyeditor.lm.model import LM
from easyeditor.metrics.fluency import ngram_entropy
from easyeditor.metrics.likelihood import Reading, read
from easyeditor.metrics.protocol import protocol
from easyeditor.metrics.text import exact_match, same_text
from easyeditor.requests import EditRequest, Probe

log = logging.getLogger(__name__)

Pairs = dict[tuple[str, str], Reading]
FLUENCY_TOKENS = 100


def quality(
    lm: LM,
    requests: Sequence[EditRequest],
    *,
    max_new_tokens: int = 24,
    batch_size: int = 16,
    test_generation: bool = False,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Measure requests.

    Args:
        lm: The model with whatever edits are on it.
        requests: What to measure, with their probes.
        max_new_tokens: The longest free answer.
        batch_size: Prompts per forward pass; it does not change the scores.
        test_generation: Whether to generate a longer text for fluency.
        seed: Of that text.

    Returns:
        One dict per request: ``rewrite_acc``, ``rewrite_gen``, ``rephrase_...``, ``locality``, ``portability``,
        ``probability`` (ES, PS, NS), ``fluency`` and ``metric_meta``. What cannot be scored is None.
    """
    _warn_of_long_answers(lm, requests, max_new_tokens)
    prompts = list(dict.fromkeys(prompt for request in requests for prompt in _prompts(request)))
    said = dict(zip(prompts, answer(lm, prompts, max_new_tokens, batch_size), strict=True))
    pairs = read(lm, [pair for request in requests for pair in _pairs(request)], batch_size)
    out = [_one(lm, request, said, pairs) for request in requests]
    for request, scores in zip(requests, out, strict=True) if test_generation else ():
        text = sample(lm, [lm.rewrite(request.prompt)], FLUENCY_TOKENS, seed)
        scores["fluency"] = {"ngram_entropy": ngram_entropy(text)}
        scores["metric_meta"]["fluency.ngram_entropy"] = protocol(lm, "sampled", "ngram_entropy")
    return out


def _warn_of_long_answers(lm: LM, requests: Sequence[EditRequest], max_new_tokens: int) -> None:
    """Say if an answer cannot be generated in full; what is generated does not depend on it."""
    answers = {request.target_new for request in requests}
    longest = max(answers, key=len)
    tokens = len(lm.text.encode(longest).ids)
    if tokens > max_new_tokens:
        log.warning(
            "'%s' has %d tokens and free answers end after %d: it cannot be matched. Raise max_new_tokens.",
            longest,
            tokens,
            max_new_tokens,
        )


def compare_locality(lm: LM, before: Mapping[str, Any], after: dict[str, Any]) -> None:
    """Add to a measurement how far its locality probes agree with an earlier one.

    Args:
        lm: The model of the later measurement.
        before: The measurement on the pristine model.
        after: The later one; gets ``locality.<name>_acc`` (share of equal tokens) and ``_gen`` (equal free answers).
    """
    old, new = before["locality"], after["locality"]
    for name in [key.removesuffix("_gen_content") for key in new if key.endswith("_gen_content")]:
        tokens = zip(old[f"{name}_output"], new[f"{name}_output"], strict=True)
        texts = zip(old[f"{name}_gen_content"], new[f"{name}_gen_content"], strict=True)
        new[f"{name}_acc"] = [None if a is None or b is None else _share(a, b) for a, b in tokens]
        new[f"{name}_gen"] = [same_text(a, b) for a, b in texts]
        after["metric_meta"][f"locality.{name}"] = protocol(lm, "agreement", f"{name}_acc")
        after["metric_meta"][f"locality.{name}_gen"] = protocol(lm, "generated_agreement", f"{name}_gen")


def _prompts(request: EditRequest) -> list[str]:
    groups = [*request.locality.values(), *request.portability.values()]
    return [request.prompt, *request.rephrase_prompts, *(probe.prompt for group in groups for probe in group)]


def _pairs(request: EditRequest) -> list[tuple[str, str]]:
    """Prompts with the answers under which they are read."""
    own = [request.prompt, *request.rephrase_prompts]
    out = [(prompt, request.target_new) for prompt in own]
    if request.ground_truth:
        out += [(prompt, request.ground_truth) for prompt in own]
    for probe in (probe for group in request.locality.values() for probe in group if probe.answers):
        out += [(probe.prompt, probe.answers[0]), (probe.prompt, request.target_new)]
    return out + [(p.prompt, p.answers[0]) for group in request.portability.values() for p in group if p.answers]


def _one(lm: LM, request: EditRequest, said: Mapping[str, str], pairs: Pairs) -> dict[str, Any]:
    meta: dict[str, Any] = {}
    scores: dict[str, Any] = {"metric_meta": meta}
    wordings = {"rewrite": (request.prompt,), "rephrase": request.rephrase_prompts}
    for name, prompts in wordings.items():
        if not prompts:
            continue
        scores[f"{name}_acc"] = [pairs[prompt, request.target_new].accuracy for prompt in prompts]
        scores[f"{name}_gen"] = [exact_match(said[prompt], [request.target_new]) for prompt in prompts]
        scores[f"{name}_gen_content"] = [said[prompt] for prompt in prompts]
        meta[name] = protocol(lm, "teacher_forced", f"{name}_acc")
        meta[f"{name}_gen"] = protocol(lm, "generated", f"{name}_gen")
    scores["locality"] = _locality(request, said, pairs)
    scores["portability"] = _portability(lm, request, said, pairs, meta)
    scores["probability"] = _probability(request, pairs)
    for name in scores["probability"]:
        meta[f"probability.{name}"] = protocol(lm, "probability", name)
    return scores


def _locality(request: EditRequest, said: Mapping[str, str], pairs: Pairs) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, probes in request.locality.items():
        read = [pairs[p.prompt, p.answers[0]].predicted if p.answers else None for p in probes]
        out[f"{name}_output"] = [None if tokens is None else list(tokens) for tokens in read]
        out[f"{name}_gen_content"] = [said[probe.prompt] for probe in probes]
    return out


def _portability(
    lm: LM, request: EditRequest, said: Mapping[str, str], pairs: Pairs, meta: dict[str, Any]
) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, probes in request.portability.items():
        out[f"{name}_acc"] = [pairs[p.prompt, p.answers[0]].accuracy if p.answers else None for p in probes]
        out[f"{name}_gen"] = [exact_match(said[p.prompt], p.answers) for p in probes]
        out[f"{name}_gen_content"] = [said[p.prompt] for p in probes]
        meta[f"portability.{name}"] = protocol(lm, "teacher_forced", f"{name}_acc")
        meta[f"portability.{name}_gen"] = protocol(lm, "generated", f"{name}_gen")
    return out


def _probability(request: EditRequest, pairs: Pairs) -> dict[str, list[float | None]]:
    """ES and PS: the new answer is likelier than the old; NS: a neighbour's own answer is likelier than the new one.

    As in the ROME paper; likelihoods are means over an answer's tokens, as in its code.
    """
    new, old = request.target_new, request.ground_truth
    out: dict[str, list[float | None]] = {}
    if old:
        out["ES"] = [_likelier(pairs, request.prompt, new, old)]
        if request.rephrase_prompts:
            out["PS"] = [_likelier(pairs, prompt, new, old) for prompt in request.rephrase_prompts]
    near: list[Probe] = [p for group in request.locality.values() for p in group if p.answers and p.answers[0] != new]
    if near:
        out["NS"] = [_likelier(pairs, probe.prompt, probe.answers[0], new) for probe in near]
    return out


def _likelier(pairs: Pairs, prompt: str, a: str, b: str) -> float:
    return float(pairs[prompt, a].log_prob > pairs[prompt, b].log_prob)


def _share(a: Sequence[int], b: Sequence[int]) -> float:
    return sum(x == y for x, y in zip(a, b, strict=True)) / len(a)
