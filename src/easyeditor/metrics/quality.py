"""All scores of requests on a model as it is now: reliability, generalisation, locality, portability, and more.

Every probe of every request goes into two batches: one is answered freely, one is read with the answer given. Locality
has no score of its own in one measurement; `compare_locality` makes it from two.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from easyeditor.lm.generate import answer
from easyeditor.lm.model import LM
from easyeditor.metrics.divergence import jensen_shannon, next_token
from easyeditor.metrics.extra import fluency, judged, long_answers, robustness
from easyeditor.metrics.likelihood import Reading, read
from easyeditor.metrics.locality import kind
from easyeditor.metrics.old_scores import as_existing_scripts
from easyeditor.metrics.protocol import protocol
from easyeditor.metrics.robustness import questions
from easyeditor.metrics.scores import Scores
from easyeditor.metrics.text import exact_match, same_text, token_f1
from easyeditor.requests import EditRequest, Probe

log = logging.getLogger(__name__)

Pairs = dict[tuple[str, str], Reading]


def quality(
    lm: LM,
    requests: Sequence[EditRequest],
    *,
    max_new_tokens: int = 24,
    batch_size: int = 16,
    test_generation: bool = False,
    seed: int = 0,
    scores: Scores | None = None,
) -> list[dict[str, Any]]:
    """Measure requests.

    Args:
        lm: The model with whatever edits are on it.
        requests: What to measure, with their probes.
        max_new_tokens: The longest free answer.
        batch_size: Prompts per forward pass; it does not change the scores.
        test_generation: Whether to generate a longer text for fluency.
        seed: Of that text.
        scores: What to compute besides; None: nothing.

    Returns:
        One dict per request: ``rewrite_acc``, ``rewrite_gen``, ``rephrase_...``, ``locality``, ``portability``,
        ``probability`` (ES, PS, NS), ``fluency``, what `scores` asks for, and ``metric_meta``. What cannot be scored
        is None.

    Raises:
        MissingExtra: A score was asked for whose package is not installed.
    """
    wanted = scores or Scores()
    _warn_of_long_answers(lm, requests, max_new_tokens)
    asked = [questions(request, forms=wanted.robustness, prefix=wanted.prefix) for request in requests]
    core = [prompt for request in requests for prompt in _prompts(request)]
    prompts = list(dict.fromkeys([*core, *(question.prompt for listed in asked for question in listed)]))
    following: dict[str, str | None] = {}

    def watch(row: int, logits: Tensor) -> None:
        following[prompts[row]] = next_token(logits)

    texts = answer(lm, prompts, max_new_tokens, batch_size, watch=watch if wanted.divergence else None)
    said = dict(zip(prompts, texts, strict=True))
    own = [pair for request in requests for pair in _pairs(request)]
    pairs = read(lm, [*own, *(pair for listed in asked for q in listed for pair in q.pairs())], batch_size)
    out = [_one(lm, request, said, pairs) for request in requests]
    for request, listed, found in zip(requests, asked, out, strict=True):
        if wanted.divergence:
            for name, probes in request.locality.items():
                found["locality"][f"{name}_next"] = [following.get(probe.prompt) for probe in probes]
        if listed:
            robustness(lm, listed, said, pairs, found, wanted)
    if test_generation:
        fluency(lm, requests, out, batch_size, seed)
    if wanted.texts:
        long_answers(lm, requests, out, wanted, batch_size)
    if wanted.judge is not None:
        judged(lm, requests, out, wanted.judge)
    for request, found in zip(requests, out, strict=True):
        as_existing_scripts(lm, request, found, pairs, wanted)
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
        after: The later one; gets ``locality.<name>_acc`` (share of equal tokens), ``_gen`` (equal free answers) and,
            where both hold distributions, ``_js`` (Jensen-Shannon divergence of the next token, in bits).
    """
    old, new, meta = before["locality"], after["locality"], after["metric_meta"]
    for name in [key.removesuffix("_gen_content") for key in new if key.endswith("_gen_content")]:
        texts = zip(old[f"{name}_gen_content"], new[f"{name}_gen_content"], strict=True)
        new[f"{name}_gen"] = [same_text(a, b) for a, b in texts]
        if f"{name}_output" in old and f"{name}_output" in new:
            tokens = zip(old[f"{name}_output"], new[f"{name}_output"], strict=True)
            new[f"{name}_acc"] = [None if a is None or b is None else share_equal(a, b) for a, b in tokens]
            meta[f"locality.{name}"] = protocol(lm, "agreement", f"{name}_acc")
        else:
            new[f"{name}_acc"] = list(new[f"{name}_gen"])
            meta[f"locality.{name}"] = protocol(lm, "generated_agreement", f"{name}_acc")
        meta[f"locality.{name}_gen"] = protocol(lm, "generated_agreement", f"{name}_gen")
        following = new.pop(f"{name}_next", None)  # only what comes before is compared with again
        if following is not None and f"{name}_next" in old:
            both = zip(old[f"{name}_next"], following, strict=True)
            new[f"{name}_js"] = [None if a is None or b is None else jensen_shannon(a, b) for a, b in both]
            meta[f"locality.{name}_js"] = protocol(lm, "divergence", f"{name}_js")
        for key in (f"locality.{name}", f"locality.{name}_gen", f"locality.{name}_js"):
            if key in meta:
                meta[key]["kind"] = kind(name)


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
        scores[f"{name}_F1"] = [answer_f1(lm, prompt, said[prompt], request.target_new) for prompt in prompts]
        meta[f"{name}_F1"] = protocol(lm, "generated_tokens", f"{name}_F1")
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


def answer_f1(lm: LM, prompt: str, said: str, target: str) -> float | None:
    """Macro F1 of the tokens that an answer has behind its prompt, against those of the target; see `token_f1`."""
    asked = "" if lm.seq2seq else lm.rewrite(prompt)  # an encoder-decoder writes its answer behind nothing
    rows = [lm.text.encode_pair(asked, text) for text in (said, target)]
    mine, wanted = (row.ids[first:] for row, first in rows)
    return token_f1(mine, wanted)


def share_equal(a: Sequence[int], b: Sequence[int]) -> float:
    """The share of places at which two rows of tokens agree."""
    return sum(x == y for x, y in zip(a, b, strict=True)) / len(a)
