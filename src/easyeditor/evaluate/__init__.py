"""The scoring functions of EasyEdit by name, for scripts that call them without an editor.

Arguments and keys are those of existing scripts; what is measured is what `easyeditor.metrics` measures. ``model_name``
and ``device`` are taken and not needed: a model says itself what it is and where.
"""

from __future__ import annotations

from easyeditor.editors.summary import summarise, summary_metrics
from easyeditor.evaluate.core import (
    OOD_PPL,
    PPL,
    compute_edit_quality,
    compute_icl_edit_quality,
    compute_locality_quality,
    compute_portability_quality,
    compute_rewrite_or_rephrase_quality,
    exact_match_score,
    finalize_locality_metrics,
    llm_judge,
    n_gram_entropy,
    normalize_answer,
    test_generation_quality,
    test_prediction_acc,
)
from easyeditor.evaluate.kinds import (
    F1,
    compute_concept_edit_quality,
    compute_safety_edit_quality,
    compute_sent_metric,
    eval_akew_unstructured,
)

__all__ = [
    "F1",
    "OOD_PPL",
    "PPL",
    "compute_concept_edit_quality",
    "compute_edit_quality",
    "compute_icl_edit_quality",
    "compute_locality_quality",
    "compute_portability_quality",
    "compute_rewrite_or_rephrase_quality",
    "compute_safety_edit_quality",
    "compute_sent_metric",
    "eval_akew_unstructured",
    "exact_match_score",
    "finalize_locality_metrics",
    "llm_judge",
    "n_gram_entropy",
    "normalize_answer",
    "summarise",
    "summary_metrics",
    "test_generation_quality",
    "test_prediction_acc",
]
