"""Change what a language model knows, prove that the change holds and nothing else moved, and take it back.

Public names are imported when they are first used; `import easyeditor` needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from types import MappingProxyType
from typing import Any

NAMES = MappingProxyType(
    {
        "LM": "lm.model",
        "answer": "lm.generate",
        "EditRequest": "requests",
        "Probe": "requests",
        "HyperParams": "hparams",
        "GRACEHyperParams": "methods.melo",
        "MODELHyperParams": "methods.melo",
        "BaseEditor": "editors.base",
        "SteerEditor": "editors.steer",
        "ConceptEditor": "editors.concept",
        "SafetyEditor": "editors.safety",
        "PerEditor": "editors.per",
        "summarise": "editors.summary",
        "summary_metrics": "editors.summary",
        "BatchEditor": "editors.old_tables",
        "restore_after_edit": "editors.old_tables",
        "seed_everything": "editors.old_tables",
        "load_hparams_config": "editors.old_tables",
        "normalize_alg_name": "editors.old_names",
        "normalize_ground_truths": "editors.old_names",
        "make_logs": "editors.old_names",
        "LORA": "editors.old_names",
        "ULTRAEDIT": "editors.old_names",
        "attach_topk_locality_metrics": "evaluate.topk",
        "get_aligned_topk_token_ids": "evaluate.topk",
        "apply_ike_to_per_model": "evaluate.personality_ike",
        "GradientTransform": "core.hypernetwork",
        "Scores": "metrics.scores",
        "Judge": "metrics.judge",
        "quality": "metrics.quality",
        "perplexity": "metrics.perplexity",
        "capability": "metrics.capability",
        "compute_edit_quality": "evaluate",
        "compute_icl_edit_quality": "evaluate",
        "compute_rewrite_or_rephrase_quality": "evaluate",
        "compute_locality_quality": "evaluate",
        "compute_portability_quality": "evaluate",
        "finalize_locality_metrics": "evaluate",
        "compute_sent_metric": "evaluate",
        "compute_concept_edit_quality": "evaluate",
        "compute_safety_edit_quality": "evaluate",
        "eval_akew_unstructured": "evaluate",
        "test_prediction_acc": "evaluate",
        "test_generation_quality": "evaluate",
        "llm_judge": "evaluate",
        "F1": "evaluate",
        "OOD_PPL": "evaluate",
        "PPL": "evaluate",
        "LogitLens": "evaluate",
        "answer_match": "evaluate",
        "attach_metric_meta": "evaluate",
        "build_icl_metric_meta": "evaluate",
        "build_lm_metric_meta": "evaluate",
        "build_locality_metric_meta": "evaluate",
        "build_multimodal_metric_meta": "evaluate",
        "compute_freq": "evaluate",
        "compute_n_gram_entropy": "evaluate",
        "compute_per_ike_metric": "evaluate",
        "compute_per_metric": "evaluate",
        "es": "evaluate",
        "es_per_icl": "evaluate",
        "exact_match_score": "evaluate",
        "gather_log_probs": "evaluate",
        "generate_texts": "evaluate",
        "icl_lm_eval": "evaluate",
        "infer_model_family": "evaluate",
        "kl_loc_loss": "evaluate",
        "mask_hf_labels": "evaluate",
        "masked_mean": "evaluate",
        "merge_metric_meta": "evaluate",
        "merge_result_with_metric_meta": "evaluate",
        "n_gram_entropy": "evaluate",
        "normalize_answer": "evaluate",
        "per_generation": "evaluate",
        "slice_list": "evaluate",
        "test_batch_prediction_acc": "evaluate",
        "test_concept_gen": "evaluate",
        "test_generation_quality_serac": "evaluate",
        "test_instance_change": "evaluate",
        "test_prediction_acc_LLM_judge": "evaluate",
        "test_safety_gen": "evaluate",
        "test_seq2seq_batch_prediction_acc": "evaluate",
        "verify_answer": "evaluate",
        "BaseTrainer": "trainer",
        "EditTrainer": "trainer",
        "MultiTaskTrainer": "trainer",
        "PEREditTrainer": "trainer",
        "EarlyStopper": "trainer",
        "RunningStatAverager": "trainer",
        "MENDTrainingHparams": "methods.mend",
        "SERACTrainingHparams": "methods.serac",
        "SERACHparams": "methods.serac",
        "MALMENTrainingHparams": "methods.malmen",
        "RLEditTrainingHparams": "methods.rledit",
        "InstructEditTrainingHparams": "methods.instructedit",
        "KETrainingHparams": "methods.ke",
        "load_archive": "core.archive",
        "Edit": "edits.edit",
        "WeightEdit": "edits.edit",
        "ModuleEdit": "edits.edit",
        "PromptEdit": "edits.edit",
        "DecodingEdit": "edits.edit",
        "Ledger": "edits.ledger",
        "applied": "edits.ledger",
        "save_edits": "edits.store",
        "load_edits": "edits.store",
        "merge": "edits.store",
        "rect": "core.post",
        "prune": "core.post",
        "value_norm": "core.closed_form",
        "trace": "core.trace",
        "locate": "core.locate",
        "second_moments": "core.stats",
        "load_requests": "data.files",
        "CounterFactDataset": "data.counterfact",
        "ZsreDataset": "data.zsre",
        "KnowEditDataset": "data.knowedit",
        "WikiRecentDataset": "data.knowedit",
        "ConvSentDataset": "data.convsent",
        "SanitizationTrainDataset": "data.sanitation",
        "WikiBigEditDataset": "data.wikibigedit",
        "MQuAKEDataset": "data.mquake",
        "MultiTaskDataset": "data.multitask",
        "AKEWUnifiedDataset": "data.akew",
        "UnKEDataset": "data.unke",
        "HalluEditBenchDataset": "data.halluedit",
        "QAEditDataset": "data.qaedit",
        "CKnowEditDataset": "data.cknowedit",
        "ConceptEditDataset": "data.conceptedit",
        "SafetyDataset": "data.safeedit",
        "PersonalityDataset": "data.personality",
        "RelationsDataset": "data.relations",
        "ConflictEditDataset": "data.conflictedit",
        "LongFormEditDataset": "data.longform",
        "TinyFacts": "data.tinyfacts",
        "FactStore": "facts",
        "StoredFact": "facts",
        "encode_ike_facts": "methods.ike",
        "FTApiHyperParams": "methods.ft_api",
        "apply_ft_api_to_model": "methods.ft_api",
        "Endpoint": "lm.endpoint",
        "method": "registry",
        "methods": "registry",
        "get_method": "registry",
        "EasyEditError": "errors",
        "UsageError": "errors",
        "EditFailed": "errors",
        "EditDidNothing": "errors",
        "NonFinite": "errors",
        "NotEditable": "errors",
        "WrongBase": "errors",
        "DamagedFile": "errors",
        "MissingExtra": "errors",
    }
)

TABLES = ("ALG_DICT", "PER_ALG_DICT", "ALG_TRAIN_DICT", "DS_DICT", "PER_DS_DICT", "Safety_DS_DICT")


def __getattr__(name: str) -> Any:
    if name == "__all__":  # with what the registry knows, which `import easyeditor` does not load
        return [*NAMES, *TABLES, *import_module("easyeditor.editors.old_calls").names()]
    if name in NAMES:
        return getattr(import_module(f"easyeditor.{NAMES[name]}"), name)
    if name in TABLES:
        return import_module("easyeditor.editors.old_tables").table(name)
    if name.startswith("_"):
        raise AttributeError(name)
    for spec in import_module("easyeditor.registry").methods().values():
        if name == spec.hparams.__name__:
            return spec.hparams
    if (called := import_module("easyeditor.editors.old_calls").old_call(name)) is not None:
        return called
    raise AttributeError(f"module 'easyeditor' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__getattr__("__all__"))
