"""The scoring functions that are for every kind of edit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from easyeditor.editors.options import Wanted, judge_of
from easyeditor.hparams import HyperParams
from easyeditor.lm.generate import answer
from easyeditor.lm.model import LM
from easyeditor.metrics.extra import FLUENCY_TOKENS, drawn
from easyeditor.metrics.fluency import ngram_entropy
from easyeditor.metrics.judge import Case, Judge
from easyeditor.metrics.likelihood import read
from easyeditor.metrics.old_scores import known_share, perplexity_of
from easyeditor.metrics.quality import compare_locality, quality, share_equal
from easyeditor.metrics.scores import Scores
from easyeditor.metrics.text import exact_match, normalise
from easyeditor.requests import EditRequest, probes_of

Words = str | Sequence[str]


def compute_edit_quality(
    model: Any,
    model_name: str,
    hparams: HyperParams | None,
    tok: Any,
    record: Mapping[str, Any] | EditRequest,
    device: Any = None,
    eval_metric: str = "token_em",
    test_generation: bool = False,
) -> dict[str, Any]:
    """Every score of one request on a model as it is.

    Args:
        model: The transformers model.
        model_name: Not needed.
        hparams: Settings; ``use_chat_template``, ``max_new_tokens``, ``evaluation_type``, ``api_key`` count.
        tok: Its tokenizer.
        record: The request, in the dict layout of existing scripts.
        device: Not needed.
        eval_metric: ``token em``, ``ppl`` or ``ood_ppl``.
        test_generation: Whether to score fluency too.

    Returns:
        ``rewrite_acc``, ``rephrase_acc``, ``locality``, ``portability``, ``metric_meta`` and more; see
        `easyeditor.metrics.quality.quality`.
    """
    lm = wrapped(model, tok, hparams)
    request = record if isinstance(record, EditRequest) else EditRequest.from_dict(record, "The record")
    scores = Wanted(hparams).scores(Scores(eval_metric=eval_metric)) if hparams else Scores(eval_metric=eval_metric)
    length = hparams.max_new_tokens if hparams else 24
    seed = hparams.seed if hparams else 0
    return quality(lm, [request], max_new_tokens=length, test_generation=test_generation, seed=seed, scores=scores)[0]


def compute_icl_edit_quality(
    model: Any,
    model_name: str,
    hparams: HyperParams | None,
    tok: Any,
    icl_examples: Sequence[str],
    record: Mapping[str, Any] | EditRequest,
    device: Any = None,
    pre_edit: bool = False,
) -> dict[str, Any]:
    """`compute_edit_quality` with demonstrations and, after the edit, the new fact in front of every prompt.

    Args:
        model: The transformers model.
        model_name: Not needed.
        hparams: As in `compute_edit_quality`.
        tok: Its tokenizer.
        icl_examples: Demonstrations, joined as they are.
        record: The request.
        device: Not needed.
        pre_edit: Whether the new fact is left out.
    """
    request = record if isinstance(record, EditRequest) else EditRequest.from_dict(record, "The record")
    fact = "" if pre_edit else f"New Fact: {request.prompt} {request.target_new}\nPrompt: "
    lead = "".join(icl_examples) + fact
    lm = wrapped(model, tok, hparams)
    before = compute_edit_quality(model, model_name, hparams, tok, request)
    with behind(lm, lead):
        after = compute_edit_quality(model, model_name, hparams, tok, request)
    compare_locality(lm, before, after)
    return after


def compute_rewrite_or_rephrase_quality(
    model: Any,
    model_name: str,
    hparams: HyperParams | None,
    tok: Any,
    prompt: Words,
    target_new: Words,
    device: Any = None,
    test_rephrase: bool = False,
    eval_metric: str = "token_em",
) -> dict[str, Any]:
    """The scores of prompts with their new answers: ``rewrite_acc`` or ``rephrase_acc``, and what goes with it."""
    name = "rephrase" if test_rephrase else "rewrite"
    prompts, targets = columns(prompt, target_new)
    each = [
        compute_edit_quality(model, model_name, hparams, tok, EditRequest(p, t), device, eval_metric)
        for p, t in zip(prompts, targets, strict=True)
    ]
    out: dict[str, Any] = {"metric_meta": {}}
    for scores in each:
        for key, value in scores.items():
            if key.startswith("rewrite_") and isinstance(value, list):
                out.setdefault(key.replace("rewrite", name), []).extend(value)
        out["metric_meta"] |= {key.replace("rewrite", name): value for key, value in scores["metric_meta"].items()}
    for key in ("rewrite_ppl", "ood_acc"):
        if found := [scores[key] for scores in each if key in scores]:
            out[key.replace("rewrite", name)] = found[0] if len(found) == 1 else found
    return out


def compute_locality_quality(
    model: Any,
    model_name: str,
    hparams: HyperParams | None,
    tok: Any,
    locality_key: str,
    prompt: Words,
    locality_ground_truth: Any,
    device: Any = None,
) -> dict[str, Any]:
    """What the model says to locality probes: ``<key>_output`` (tokens) and ``<key>_gen_content`` (free answers)."""
    return _group("locality", locality_key, prompt, locality_ground_truth, model, hparams, tok)


def compute_portability_quality(
    model: Any,
    model_name: str,
    hparams: HyperParams | None,
    tok: Any,
    portability_key: str,
    prompt: Words,
    ground_truth: Any,
    device: Any = None,
) -> dict[str, Any]:
    """The scores of portability probes: ``<key>_acc``, ``<key>_gen``, ``<key>_gen_content``."""
    return _group("portability", portability_key, prompt, ground_truth, model, hparams, tok)


def finalize_locality_metrics(
    metric: dict[str, Any], request: Any = None, hparams: Any = None, model_name: Any = None
) -> dict[str, Any]:
    """Add ``<key>_acc`` to the locality of ``metric["post"]``: agreement with ``metric["pre"]``.

    Args:
        metric: A record with ``pre`` and ``post``.
        request: Not needed, like all that follow.
        hparams: Not needed.
        model_name: Not needed.
    """
    new, old = metric["post"]["locality"], metric["pre"]["locality"]
    for key in [key for key in new if key.endswith("_output")]:
        pairs = zip(old[key], new[key], strict=True)
        new[key.replace("_output", "_acc")] = [None if a is None or b is None else share_equal(a, b) for a, b in pairs]
    return metric


def test_prediction_acc(
    model: Any,
    tok: Any,
    hparams: HyperParams | None,
    prompts: Words,
    targets: Words,
    device: Any = None,
    locality: bool = False,
    vanilla_generation: bool = False,
) -> list[Any]:
    """Token accuracy with the answer given; with ``locality`` the tokens; with ``vanilla_generation`` exact match."""
    lm = wrapped(model, tok, hparams)
    listed, wanted = columns(prompts, targets)
    if vanilla_generation:
        said = answer(lm, listed, hparams.max_new_tokens if hparams else 24)
        return [exact_match(text, [target]) for text, target in zip(said, wanted, strict=True)]
    found = read(lm, list(zip(listed, wanted, strict=True)))
    pairs = zip(listed, wanted, strict=True)
    return [list(found[pair].predicted) if locality else found[pair].accuracy for pair in pairs]


def test_generation_quality(
    model: Any, tok: Any, prefixes: Words, max_out_len: int = FLUENCY_TOKENS, vanilla_generation: bool = False
) -> dict[str, float | None]:
    """Fluency of sampled continuations: ``{"ngram_entropy": float}``."""
    listed = [prefixes] if isinstance(prefixes, str) else list(prefixes)
    return {"ngram_entropy": ngram_entropy(drawn(wrapped(model, tok, None), listed, max_out_len, 0))}


def n_gram_entropy(gen_texts: Words, agg: str = "arith") -> float | None:
    """The weighted entropy of bigrams and trigrams; see `easyeditor.metrics.fluency.ngram_entropy`."""
    return ngram_entropy([gen_texts] if isinstance(gen_texts, str) else list(gen_texts))


def PPL(model: Any, tok: Any, prompt: Words, target_new: Words, device: Any = None) -> float | None:
    """The perplexity of answers after prompts, over all their tokens; never clipped."""
    pairs = list(zip(*columns(prompt, target_new), strict=True))
    found = read(wrapped(model, tok, None), pairs)
    return perplexity_of([found[pair] for pair in pairs])


def OOD_PPL(model: Any, tok: Any, prompt: Words, target_new: Any = None, device: Any = None) -> float | None:
    """The share of prompt tokens that the model gives more than 0.8."""
    return known_share(wrapped(model, tok, None), [prompt] if isinstance(prompt, str) else list(prompt))


def llm_judge(
    question: str, ground_truth: Words, prediction: str, api_key: str | None = None, judge: Judge | None = None
) -> float | None:
    """Whether a judge takes an answer: 1.0, 0.0, or None without a verdict. Without key and judge: exact match.

    Args:
        question: What was asked.
        ground_truth: The accepted answer or answers.
        prediction: What was said.
        api_key: Of the judge that `easyeditor.editors.options.judge_of` names.
        judge: Another judge.
    """
    answers = (ground_truth,) if isinstance(ground_truth, str) else tuple(ground_truth)
    asked = judge or (judge_of(api_key) if api_key else None)
    if asked is None:
        return exact_match(prediction, answers)
    return asked.verdicts([Case(question, answers, prediction)])[0]


def normalize_answer(s: str) -> str:
    """Lower case, without punctuation, articles and repeated space."""
    return normalise(s)


def exact_match_score(prediction: str, ground_truth: str) -> bool:
    """Whether two texts agree after `normalize_answer`."""
    return normalise(prediction) == normalise(ground_truth)


def _group(
    group: str, key: str, prompt: Words, truth: Any, model: Any, hparams: HyperParams | None, tok: Any
) -> dict[str, Any]:
    """What is said to one group of locality or portability probes."""
    probes = probes_of("The record", key, prompt, truth)
    request = EditRequest(probes[0].prompt, "-", **{group: {key: probes}})  # type: ignore[arg-type]
    return dict(compute_edit_quality(model, "", hparams, tok, request)[group])


@contextmanager
def behind(lm: LM, lead: str) -> Iterator[None]:
    """A context in which a text stands in front of every prompt."""
    lm.rewriters.append(lambda prompt: lead + prompt)
    try:
        yield
    finally:
        lm.rewriters.pop()


def wrapped(model: Any, tok: Any, hparams: HyperParams | None) -> LM:
    """A loaded model, to be asked."""
    lm = LM.wrap(model, tok, editable=False)
    lm.text.chat = bool(hparams and hparams.use_chat_template)
    return lm


def columns(prompts: Words, targets: Words) -> tuple[list[str], list[str]]:
    """Texts as lists; a single target serves all prompts."""
    listed = [prompts] if isinstance(prompts, str) else list(prompts)
    wanted = [targets] if isinstance(targets, str) else list(targets)
    return listed, wanted * len(listed) if len(wanted) == 1 else wanted
