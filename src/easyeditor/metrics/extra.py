"""Scores that are added to a measurement on request: fluency, robustness, long answers, verdicts of a judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from easyeditor.lm.generate import answer, continuations
from easyeditor.lm.model import LM
from easyeditor.metrics.fluency import ngram_entropy, repetition
from easyeditor.metrics.judge import Case, Judge
from easyeditor.metrics.likelihood import Reading
from easyeditor.metrics.overlap import bleu, rouge, similarity
from easyeditor.metrics.protocol import Way, protocol
from easyeditor.metrics.robustness import Question
from easyeditor.metrics.scores import Scores
from easyeditor.metrics.text import exact_match
from easyeditor.requests import EditRequest

Found = list[dict[str, Any]]
FOLLOWS = "portability."  # in front of the name of a group of such probes
FLUENCY_TOKENS, FLUENCY_TOP_K = 100, 5  # as in the ROME paper's code


def fluency(lm: LM, requests: Sequence[EditRequest], out: Found, batch_size: int, seed: int) -> None:
    """Add ``fluency``: n-gram entropy and repetition of a sampled continuation of each prompt.

    Args:
        lm: The model.
        requests: What is measured.
        out: Their measurements.
        batch_size: Prompts per forward pass; each draws from a generator of its own, so it does not change the texts.
        seed: Of every generator.
    """
    texts = drawn(lm, [lm.rewrite(request.prompt) for request in requests], FLUENCY_TOKENS, seed, batch_size)
    for text, scores in zip(texts, out, strict=True):
        scores["fluency"] = {"ngram_entropy": ngram_entropy([text]), "repetition": repetition([text])}
        meta = scores["metric_meta"]
        meta["fluency.ngram_entropy"] = protocol(lm, "sampled", "ngram_entropy")
        meta["fluency.repetition"] = {
            **meta["fluency.ngram_entropy"],
            "result_key": "repetition",
            "scorer": "repeated_4_grams",
            "comparable_group": meta["fluency.ngram_entropy"]["comparable_group"] + ".repeated_4_grams",
        }


def fluency_of(lm: LM, prompts: Sequence[str], seed: int, tokens: int = FLUENCY_TOKENS) -> dict[str, float | None]:
    """``ngram_entropy`` of sampled continuations of prompts; see `drawn`."""
    return {"ngram_entropy": ngram_entropy(drawn(lm, [lm.rewrite(prompt) for prompt in prompts], tokens, seed))}


def drawn(lm: LM, prompts: Sequence[str], max_new_tokens: int, seed: int, batch_size: int = 16) -> list[str]:
    """Random continuations, in batches, each as if it were drawn alone with the same seed.

    Args:
        lm: The model.
        prompts: Texts to go on from, as they are.
        max_new_tokens: How many tokens to draw.
        seed: Of the generator of each row.
        batch_size: Rows per forward pass.

    Returns:
        The prompts with their continuations.
    """
    rows = [list(lm.text.encode(prompt).ids) for prompt in prompts]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    out = list(prompts)
    size = batch_size if lm.pads_left else 1
    for start in range(0, len(order), size):
        part = order[start : start + size]
        found = continuations(lm, [rows[i] for i in part], max_new_tokens, size, _draw(len(part), seed))
        for i, ids in zip(part, found, strict=True):
            out[i] = prompts[i] + lm.text.decode(ids)
    return out


def _draw(rows: int, seed: int) -> Any:
    generators = [torch.Generator().manual_seed(seed) for _ in range(rows)]

    def draw(logits: Tensor) -> Tensor:
        best = logits.float().cpu().topk(min(FLUENCY_TOP_K, logits.shape[-1]), dim=-1)
        probs = best.values.softmax(-1)
        picks = [torch.multinomial(row[None], 1, generator=g) for row, g in zip(probs, generators, strict=True)]
        return best.indices.gather(-1, torch.cat(picks)).squeeze(-1)

    return draw


def robustness(
    lm: LM,
    questions: Sequence[Question],
    said: Mapping[str, str],
    pairs: Mapping[tuple[str, str], Reading],
    scores: dict[str, Any],
    wanted: Scores,
) -> None:
    """Add ``robustness``: per kind of question the answers, what they are worth, and which answer is likelier.

    Args:
        lm: The model.
        questions: Of one request.
        said: Prompt -> free answer.
        pairs: Prompt and answer -> how it is read.
        scores: The measurement of the request.
        wanted: What was asked for; names the text in front in the protocol.
    """
    group: dict[str, list[Any]] = {}
    for question in questions:
        text, name = said[question.prompt], question.kind
        group.setdefault(f"{name}_gen", []).append(question.score(exact_match(text, question.answers)))
        group.setdefault(f"{name}_gen_content", []).append(text)
        way: Way = "negated" if name == "negation" else "generated"
        by = f"behind_{len((wanted.prefix or '').split())}_words" if name == "behind_text" else ""
        scores["metric_meta"][f"robustness.{name}_gen"] = protocol(lm, way, f"{name}_gen", by)
        if question.against:
            right, wrong = (pairs[question.prompt, each].log_prob for each in (question.answers[0], question.against))
            group.setdefault(f"{name}_likelier", []).append(float(right > wrong))
            scores["metric_meta"][f"robustness.{name}_likelier"] = protocol(lm, "probability", f"{name}_likelier")
    scores["robustness"] = group


def long_answers(lm: LM, requests: Sequence[EditRequest], out: Found, wanted: Scores, batch_size: int) -> None:
    """Add ``text``: overlap of answers of any number of lines with the whole target, for prompt and other wordings.

    Args:
        lm: The model.
        requests: What is measured.
        out: Their measurements.
        wanted: Which scores, and how long an answer.
        batch_size: Prompts per forward pass.
    """
    prompts = list(dict.fromkeys(p for request in requests for p in (request.prompt, *request.rephrase_prompts)))
    answers = answer(lm, prompts, wanted.text_tokens, batch_size, one_line=False)
    said = dict(zip(prompts, answers, strict=True))
    for request, scores in zip(requests, out, strict=True):
        group: dict[str, list[Any]] = {}
        for name, asked in (("rewrite", (request.prompt,)), ("rephrase", request.rephrase_prompts)):
            texts = [said[prompt] for prompt in asked]
            for score, values in _overlaps(texts, request.target_new, wanted).items() if texts else ():
                group[f"{name}_{score}"] = values
                key = f"text.{name}_{score}"
                scores["metric_meta"][key] = protocol(lm, "long_text", f"{name}_{score}", _variant(score, wanted))
            if texts:
                group[f"{name}_gen_content"] = texts
        scores["text"] = group


def _overlaps(texts: Sequence[str], target: str, wanted: Scores) -> dict[str, list[float | None]]:
    out: dict[str, list[float | None]] = {}
    if "rouge" in wanted.texts:
        for text in texts:
            for name, value in rouge(text, target).items():
                out.setdefault(name, []).append(value)
    if "bleu" in wanted.texts:
        out["bleu"] = [bleu(text, target) for text in texts]
    if "similarity" in wanted.texts and wanted.encoder:
        out["similarity"] = similarity(texts, [target] * len(texts), wanted.encoder)
    return out


def _variant(score: str, wanted: Scores) -> str:
    """What a comparison of two such scores must share."""
    encoder = (wanted.encoder or "").rstrip("/").rsplit("/", 1)[-1]
    return f"{score}_{encoder}" if score == "similarity" else f"{score}_first_{wanted.text_tokens}_tokens"


def judged(lm: LM, requests: Sequence[EditRequest], out: Found, judge: Judge) -> None:
    """Add ``rewrite_judge``, ``rephrase_judge`` and ``portability.<name>_judge``: whether a judge takes the answers.

    Args:
        lm: The model that answered.
        requests: What is measured.
        out: Their measurements.
        judge: Who judges; None stands where there is no verdict.
    """
    listed = [to_judge(request, scores) for request, scores in zip(requests, out, strict=True)]
    verdicts = iter(judge.verdicts(case for groups in listed for cases in groups.values() for case in cases))
    for groups, scores in zip(listed, out, strict=True):
        for name, cases in groups.items():
            meta = protocol(lm, "judged", f"{name.removeprefix(FOLLOWS)}_judge", judge.name)
            put_verdicts(scores, name, [next(verdicts) for _ in cases], meta)


def to_judge(request: EditRequest, scores: Mapping[str, Any]) -> dict[str, list[Case]]:
    """What a judge is asked about a measurement.

    Args:
        request: What was measured.
        scores: Its measurement.

    Returns:
        ``rewrite``, ``rephrase`` and ``portability.<name>``, as far as there are such probes -> a case per probe.
    """
    target = (request.target_new,)
    groups: dict[str, list[tuple[str, tuple[str, ...]]]] = {"rewrite": [(request.prompt, target)]}
    groups["rephrase"] = [(prompt, target) for prompt in request.rephrase_prompts]
    said = {name: scores.get(f"{name}_gen_content", ()) for name in groups}
    for name, probes in request.portability.items():
        groups[FOLLOWS + name] = [(probe.prompt, probe.answers) for probe in probes]
        said[FOLLOWS + name] = scores["portability"][f"{name}_gen_content"]
    return {
        name: [Case(prompt, answers, text) for (prompt, answers), text in zip(asked, said[name], strict=True)]
        for name, asked in groups.items()
        if asked
    }


def put_verdicts(scores: dict[str, Any], name: str, verdicts: Sequence[float | None], meta: Mapping[str, Any]) -> None:
    """Add the verdicts on a group of `to_judge` to a measurement, with their protocol."""
    where, key = place_of_verdicts(scores, name)
    where[key] = list(verdicts)
    scores["metric_meta"][f"{name}_judge"] = dict(meta)


def place_of_verdicts(scores: dict[str, Any], name: str) -> tuple[dict[str, Any], str]:
    """Where the verdicts on a group of `to_judge` stand: in which dict, and under which key."""
    return scores["portability"] if name.startswith(FOLLOWS) else scores, f"{name.removeprefix(FOLLOWS)}_judge"
