"""The preset tables: they parse, they are complete, they say where each value is from, and their values have a type."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from easyeditor.hparams import Part, complete, matching_row, preset, preset_rows
from easyeditor.registry import get_method, methods

FOLDER = Path(__file__).parents[1] / "src" / "easyeditor" / "hparams"
EASYEDIT = "-easyedit"  # ends the name of a row that holds EasyEdit's values where they are not the official ones

# The files that existing scripts name (for IKE and GRACE: those of models that read text).
EXISTING = {
    "ROME": "baichuan-7b chatglm2-6b chatglm4-9b gpt-j-6B gpt2-xl internlm-7b llama-7b llama3-8b llama3.2-3b "
    "mistral-7b qwen-7b qwen2-7b qwen2.5-7b qwen3.5-9b",
    "FT": "baichuan-7b chatglm2-6b chatglm4-9b gpt-j-6B gpt2-xl internlm-7b llama-7b llama3-8b llama3.2-3b "
    "mistral-7b qwen-7b qwen2-7b qwen2.5-7b qwen3.5-9b t5-3B",
    "GRACE": "gpt-j-6b gpt2-xl llama-7b llama3.2-3b qwen2-7b qwen2.5-7b qwen3.5-9b",
    "DEFER": "gpt-j-6b llama-7b mistral-7b",
    "MELO": "gpt2-xl",
    "ICE": "baichuan-7b chatglm2-6b chatglm4-9b gpt-j-6B gpt2-xl internlm-7b llama-7b llama3-8b llama3.2-3b "
    "mistral-7b qwen-7b qwen2-7b qwen2.5-7b t5-3B",
    "IKE": "baichuan-7b blip2 chatglm2-6b chatglm4-9b gpt-j-6B gpt2-xl internlm-7b llama-7b llama3-8b llama3.2-3b "
    "llavaov_7b minigpt4 mistral-7b qwen-7b qwen2-7b qwen2.5-7b qwen2vl_7b qwen3vl_4b t5-3B",
    "SCR": "",
    "MeLLo": "",
    "DeepEdit-Api": "chatglm_api",
    "DoLa": "llama",
    "DeCo": "llama-7b",
    "MEMIT": "baichuan-7b chatglm2-6b gpt-j-6B gpt2-xl internlm-7b llama-7b llama3.2-3b mistral-7b qwen-7b qwen2-7b "
    "qwen2.5-7b",
    "MEMIT-FE": "baichuan-7b chatglm2-6b gpt-j-6B gpt2-xl internlm-7b llama-7b llama3-8b llama3.2-3b mistral-7b "
    "qwen-7b qwen2-7b qwen2.5-7b",
    "EMMET": "gpt-j-6B gpt2-xl llama-7b llama3.2-3b",
    "PMET": "gpt-j-6B llama-7b llama3.2-3b",
    "AlphaEdit": "gpt-j-6B gpt2-xl llama3-8b llama3.1-8b qwen2.5-7b qwen3.5-9b",
    "SPHERE": "gpt-j-6B gpt2-xl llama3-8b llama3.1-8b qwen2.5-7b",
    "CORE": "",
    "EAMET": "qwen2.5-7b",
    "NAMET": "",
    "LocFT-BF": "",
    "LoRA": "chatglm2-6b chatglm4-9b gpt-j-6B gpt2-xl llama-7b llama3-8b llama3.1-8b llama3.2-3b qwen2.5-7b",
    "QLoRA": "llama-7b llama3-8b llama3.2-3b qwen2.5-7b",
    "DPO": "llama-7b llama3-8b",
    "FT_uns": "qwen2.5-7b",
    "LoRA_uns": "qwen2.5-7b",
    "UnKE": "llama3-8b qwen2.5-7b",
    "AnyEdit": "qwen2.5-7b",
    "DINM": "gpt2-xl llama-7b mistral-7b",
    "CrispEdit": "",
    "KN": "baichuan-7b chatglm2-6b gpt-j-6B gpt2-xl internlm-7b llama-7b llama3-8b llama3.2-3b mistral-7b qwen-7b "
    "qwen2-7b qwen2.5-7b t5-3B",
    "MEND": "baichuan-7b chatglm2-6b gpt-j-6B gpt2-xl gpt2-xl-instruct internlm-7b llama-7b llama-7b-instruct "
    "llama-7b-instruct-detoxifying llama3-8b mistral-7b mistral-7b-detoxifying qwen-7b qwen2-7b qwen2.5-7b t5-3B",
    "InstructEdit": "gpt2-xl llama-7b",
    "KE": "gpt-j-6B gpt2-xl t5-3B",
    "MALMEN": "gpt2-xl",
    "RLEdit": "",
    "SERAC": "baichuan baichuan-7b gpt-j-6B gpt2-xl llama-7b t5-3B",
    "UltraEdit": "gemma-3-27b gpt-j-6B llama3-8b-instruct mistral-7b phi-4 qwen2.5-7b",
    "StableEdit": "",
    "WISE": "gpt-j-6B gpt2-xl llama-7b llama3-8b llama3.1-8b llama3.2-3b mistral-7b qwen2.5-7b qwen3.5-9b",
    "MEMOIR": "",
    "T-Patcher": "",
    "SimIE": "gpt2-xl llama-7b llama3-8b mistral-7b",
    "R-ROME": "chatglm4-9b gpt-j-6B gpt2-xl llama-7b llama3.2-3b qwen2.5-7b qwen3.5-9b",
}

# Field -> types that a value may have. A float is written as one: YAML reads 5e-1 as a text.
Fields = dict[str, tuple[type, ...]]
VALUES: Fields = {
    "layers": (list,),
    "fact_token": (str,),
    "v_num_grad_steps": (int,),
    "v_lr": (float,),
    "v_loss_layer": (int,),
    "v_weight_decay": (float,),
    "clamp_norm_factor": (float,),
    "kl_factor": (float,),
    "mom2_adjustment": (bool,),
    "mom2_dataset": (str,),
    "mom2_n_samples": (int,),
    "mom2_dtype": (str,),
}
LEAST_SQUARES: Fields = {**VALUES, "mom2_update_weight": (float,)}
ALPHAEDIT: Fields = {**LEAST_SQUARES, "nullspace_threshold": (float,), "L2": (float,)}
FINE_TUNING: Fields = {
    "layers": (list,),
    "num_steps": (int,),
    "lr": (float,),
    "weight_decay": (float,),
    "norm_constraint": (float, bool),
    "objective_optimization": (str,),
}
FT: Fields = {**FINE_TUNING, "kl_factor": (float,), "batch_size": (int,)}
ADAPTERS: Fields = {
    "lora_type": (str,),
    "layers": (list,),
    "num_steps": (int,),
    "batch_size": (int,),
    "lr": (float,),
    "weight_decay": (float,),
    "rank": (int,),
    "lora_alpha": (float,),
    "lora_dropout": (float,),
    "target_modules": (list,),
    "with_end": (bool,),
}
QLORA: Fields = {
    **{name: kinds for name, kinds in ADAPTERS.items() if name not in ("layers", "rank", "with_end")},
    "lora_r": (int,),
    "quantization_bit": (int,),
    "double_quant": (bool,),
    "quant_type": (str,),
}
NAMET: Fields = {**LEAST_SQUARES, "mom2_update_weight": (list, float), "ks_bs": (int,)}
HYPERNETWORK: Fields = {
    **{name: (float,) for name in ("lr", "edit_lr", "lr_lr", "cedit", "cloc", "grad_clip")},
    **{name: (bool,) for name in ("norm", "combine", "shared")},
    **{name: (int,) for name in ("rank", "n_hidden", "rephrases", "probes", "batch_size", "accumulate_bs")},
    **{name: (int,) for name in ("max_iters", "val_interval", "val_batch_size", "val_steps")},
    "early_stop_patience": (int,),
    "early_stop_key": (str,),
    "inner_params": (list,),
}
NETWORK = ("norm", "combine", "shared", "rank", "n_hidden")  # of those, what the network of MEND looks like
SHIFTS: Fields = {
    **{name: (float,) for name in ("lr", "meta_lr", "lr_lr", "loc_coef", "max_grad_norm")},
    **{name: (int,) for name in ("rank", "n_blocks", "rephrases", "probes", "n_edits", "batch_size")},
    **{name: (int,) for name in ("batch_size_once", "editor_batch_size", "max_iters", "val_interval")},
    **{name: (int,) for name in ("val_batch_size", "val_steps", "early_stop_patience")},
    "token": (str,),
    "early_stop_key": (str,),
    "inner_params": (list,),
}
LIFELONG: Fields = {
    "inner_params": (list,),
    "lr": (float,),
    "token": (str,),
    "alpha": (float,),
    "batch_size": (int,),
    "batch_size_once": (int,),
    "warm_up": (int,),
    "warm_up_data": (str,),
}
UNKE: Fields = {
    "layers": (list,),
    "fact_token": (str,),
    "lr": (float,),
    "optim_num_step": (int,),
    "v_num_grad_steps": (int,),
    "v_lr": (float,),
    "v_loss_layer": (int,),
    "v_weight_decay": (float,),
    "clamp_norm_factor": (float,),
    "ex_data_num": (int,),
    "ex_dataset": (str,),
}
HOPS: Fields = {"procedure": (str,), "hops": (int,), "questions": (int,), "memory": (str,), "retriever": (str,)}
FIELDS: dict[str, Fields] = {
    "ROME": {**VALUES, "context_template_length_params": (list,)},
    "R-ROME": {
        **VALUES,
        "enable_prompt_keys": (bool,),
        "enable_random_prefix_keys": (bool,),
        "original_implementation": (bool,),
    },
    "MEMIT": LEAST_SQUARES,
    "MEMIT-FE": LEAST_SQUARES,
    "EMMET": {**LEAST_SQUARES, "emmet_lambda": (float,)},
    "PMET": {**LEAST_SQUARES, "nll_loss_factor": (float,)},
    "AlphaEdit": ALPHAEDIT,
    "SPHERE": {**ALPHAEDIT, "cumulative_ratio": (float,), "suppression_strength": (float,)},
    "CORE": {
        **LEAST_SQUARES,
        "context": (str,),
        "ctx_num": (int,),
        "ctx_len": (int,),
        "ctx_top_k": (int,),
        "reg_lambda": (float,),
        "layer_range": (int,),
        "lambda_": (float,),
    },
    "NAMET": NAMET,
    "EAMET": {
        **NAMET,
        "clamp_ks_factor": (float,),
        "cs_factor": (float,),
        "mse_factor": (float,),
        "tau": (float,),
        "norm_factor": (float,),
        "delta_init": (str,),
        "weight_decay_method": (str,),
    },
    "SimIE": {"base_method": (str,), "lamHyper": (float,), "init_model": (bool,), "solver": (str,), "fast": (bool,)},
    "FT": {**FT, "max_length": (int,)},
    "FT_uns": FT,
    "LocFT-BF": {**FINE_TUNING, "mini_batch": (int,), "whole_block": (bool,)},
    "LoRA": ADAPTERS,
    "LoRA_uns": ADAPTERS,
    "QLoRA": QLORA,
    "DPO": {**ADAPTERS, "alpha": (float,), "beta": (float,)},
    "GRACE": {
        "inner_params": (list,),
        "edit_lr": (float,),
        "n_iter": (int,),
        "eps": (float,),
        "dist_fn": (str,),
        "val_init": (str,),
        "val_train": (str,),
        "val_reg": (str,),
        "reg": (str,),
        "replacement": (str,),
        "eps_expand": (str,),
        "num_pert": (int,),
        "dropout": (float,),
    },
    "DEFER": {
        "inner_params": (list,),
        "edit_lr": (float,),
        "n_iter": (int,),
        "threshold": (float,),
        "margin": (float,),
    },
    "MELO": {
        "grace": (dict,),
        "model": (dict,),
        "lora": (dict,),
        "task": (str,),
        "lora_task_type": (str,),
        "check_dir": (str, type(None)),
        "max_length": (int,),
    },
    "ICE": {"k": (int,), "use_icl_examples": (bool,)},
    "WISE": {
        "inner_params": (list,),
        "edit_lr": (float,),
        "n_iter": (int,),
        "mask_ratio": (float,),
        "alpha": (float,),
        "beta": (float,),
        "gamma": (float,),
        "act_ratio": (float,),
        "norm_constraint": (float,),
        "save_freq": (int,),
        "merge_freq": (int,),
        "merge_alg": (str,),
        "weights": (float,),
        "densities": (float,),
        "retrieve": (bool,),
        "replay": (bool,),
        "per_length": (bool,),
        "objective_optimization": (str,),
        "context_template_length_params": (list,),
    },
    "MEMOIR": {
        "inner_params": (list,),
        "edit_lr": (float,),
        "n_iter": (int,),
        "top_k": (int, type(None)),
        "irr_threshold": (float,),
        "prompt_feature_agg": (str,),
        "objective_optimization": (str,),
        "context_template_length_params": (list,),
    },
    "T-Patcher": {
        "inner_params": (list,),
        "lr": (float,),
        "max_edit_step": (int,),
        "max_add_neuron_num": (int,),
        "alc": (float,),
        "mlc": (float,),
        "act_margin_val": (float,),
        "act_loss_thd": (float,),
        "margin_val1": (float,),
        "margin_val2": (float,),
        "memory_size": (int,),
        "amplify_con": (float,),
    },
    "IKE": {
        "k": (int,),
        "demonstrations": (str,),
        "retriever": (str,),
        "sentence_model_name": (str,),
        "use_icl_examples": (bool,),
    },
    "MeLLo": HOPS,
    "DeepEdit-Api": {**HOPS, "base_url": (str, type(None)), "endpoint_model": (str, type(None))},
    "SCR": {
        "k": (int,),
        "most": (int,),
        "confirm": (str,),
        "retriever": (str,),
        "fact_format": (str,),
        "prompt_format": (str,),
    },
    "DoLa": {
        "dola_layers": (str,),
        "final_layer": (int, type(None)),
        "relative_top": (float,),
        "exit_norm": (bool,),
    },
    "DeCo": {
        "alpha": (float,),
        "threshold_top_p": (float,),
        "threshold_top_k": (int,),
        "early_exit_layers": (list,),
    },
    "UnKE": UNKE,
    "AnyEdit": {**UNKE, "window_size": (int,), "overlap": (int,)},
    "DINM": {
        "layers": (list,),
        "num_steps": (int,),
        "lr": (float,),
        "weight_decay": (float,),
        "kl_factor": (float,),
        "norm_constraint": (float, bool),
        "suffix_system_prompt": (str,),
    },
    "CrispEdit": {
        "layers": (list,),
        "num_steps": (int,),
        "lr": (float,),
        "weight_decay": (float,),
        "objective_optimization": (str,),
        "mini_batch": (int,),
        "energy_threshold": (float,),
        "mom2_dataset": (str,),
        "mom2_n_samples": (int,),
        "mom2_dtype": (str,),
    },
    "KN": {
        "lr_scale": (float,),
        "n_toks": (int,),
        "refine": (bool,),
        "steps": (int,),
        "adaptive_threshold": (float,),
        "p": (float,),
    },
    "MEND": HYPERNETWORK,
    "InstructEdit": HYPERNETWORK,
    "KE": {
        **{name: kinds for name, kinds in HYPERNETWORK.items() if name not in NETWORK},
        **{name: (float,) for name in ("lr_alpha", "margin")},
        **{name: (int,) for name in ("lstm_dim", "condition_dim", "hidden_dim")},
    },
    "MALMEN": SHIFTS,
    "RLEdit": {
        **SHIFTS,
        **{name: (float,) for name in ("reg_coef", "time_decay")},
        **{name: (int,) for name in ("back_depth", "num_seq")},
    },
    "SERAC": {
        **{name: (float,) for name in ("lr", "cedit", "cloc", "grad_clip")},
        **{name: (bool,) for name in ("supervised", "soft_weighting", "cross_attend", "cos", "square")},
        **{name: (bool,) for name in ("bound_embeds", "use_all_negatives")},
        **{name: (int,) for name in ("width", "n_blocks", "dist_heads", "rephrases", "probes", "batch_size")},
        **{name: (int,) for name in ("accumulate_bs", "max_iters", "val_interval", "val_batch_size", "val_steps")},
        **{name: (str, type(None)) for name in ("cls_name", "small_name")},
        "early_stop_patience": (int,),
        "early_stop_key": (str,),
        "inner_params": (list,),
    },
    "UltraEdit": LIFELONG,
    "StableEdit": {**LIFELONG, "floor": (float,)},
}
TABLES = tuple(FIELDS)
BY_DEPTH: dict[str, set[str]] = {
    **{name: {"layers", "v_loss_layer"} for name in TABLES if "v_loss_layer" in FIELDS[name]},
    **{name: {"layers"} for name in ("FT", "FT_uns", "LocFT-BF", "CrispEdit")},
    **{name: set() for name in ("LoRA", "LoRA_uns", "QLoRA", "DPO")},
    **{name: {"inner_params"} for name in ("GRACE", "DEFER", "UltraEdit", "StableEdit", "WISE", "MEMOIR", "T-Patcher")},
    "MELO": set(),
    **{name: {"inner_params"} for name in ("MEND", "InstructEdit", "KE", "MALMEN", "RLEdit")},
    "SERAC": set(),
    "DINM": set(),
    "DoLa": set(),
    "DeCo": set(),
    "ICE": set(),
    "IKE": set(),
    "SCR": set(),
    "MeLLo": set(),
    "DeepEdit-Api": set(),
    "KN": set(),
    "SimIE": set(),
}
BANDS = {
    "MEMIT",
    "MEMIT-FE",
    "PMET",
    "AlphaEdit",
    "SPHERE",
    "CORE",
    "NAMET",
    "EAMET",
    "CrispEdit",
    "MEND",
    "MALMEN",
    "RLEdit",
    "InstructEdit",
    "KE",
}  # several blocks by depth


TWINS = ({"qwen2.5-7b", "qwen2-7b"}, {"llama3-8b", "llama3-8b-instruct"})  # one shape, and rows that agree


def read(name: str) -> dict[str, Any]:
    table: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    return table


def rows() -> list[tuple[str, str, dict[str, Any]]]:
    found = []
    for method in TABLES:
        table = read(method)
        found.append((method, "default", table["default"]))
        found.extend((method, name, row) for name, row in table["rows"].items())
    return found


def model_of(name: str, row: dict[str, Any]) -> str:
    """The model of a row, which its name is, unless it says otherwise."""
    found: str = row.get("model_name", name)
    return found


def test_every_table_belongs_to_a_method() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {*TABLES, "models"}
    assert set(TABLES) <= set(methods())


@pytest.mark.parametrize("method", TABLES)
def test_table_has_its_parts(method: str) -> None:
    table = read(method)
    assert table["method"] == method
    assert set(table) == {"method", "common", "default", "rows"}


@pytest.mark.parametrize("method", TABLES)
def test_every_name_of_existing_scripts_has_a_row(method: str) -> None:
    have = {name.casefold() for name in read(method)["rows"]}
    assert {name.casefold() for name in EXISTING[method].split()} | {"tinyfacts"} <= have


@pytest.mark.parametrize(("method", "name", "row"), rows(), ids=lambda value: value if isinstance(value, str) else "")
def test_row(method: str, name: str, row: dict[str, Any]) -> None:
    assert isinstance(row["source"], str) and len(row["source"]) > 10
    assert name == "default" or row.get("base_url") or model_of(name, row) in read("models")
    expected = set(FIELDS[method]) - (BY_DEPTH[method] if name == "default" else set())
    chosen = {"depth"} if name == "default" and BY_DEPTH[method] else set()
    chosen |= {"band"} if name == "default" and method in BANDS else set()
    own = {"context_template_length_params", "mom2_tokens", "train_data", "batch_size_once", "n_asked"}
    more = own if name == "tinyfacts" else set()
    assert set(row) - {"source", "model_name"} - (more - expected) == expected | chosen
    for field in expected:
        assert type(row[field]) in FIELDS[method][field], f"{method}/{name}: {field} is {row[field]!r}"
    weights = row.get("mom2_update_weight")
    assert not isinstance(weights, list) or len(weights) == len(row["layers"]), f"{method}/{name}: a weight per block"


@pytest.mark.parametrize("method", TABLES)
def test_easyedit_rows_are_reached_by_name_only(method: str) -> None:
    table, models = read(method)["rows"], read("models")
    for name, row in table.items():
        assert ("model_name" in row) == (name.endswith(EASYEDIT) or name not in models), name
        if name.endswith(EASYEDIT):
            base = name.removesuffix(EASYEDIT)
            differs = {key for key in FIELDS[method] if row[key] != table[base][key]}
            assert model_of(name, row) == base and name not in models and differs, f"{method}/{name}"
    facts = [{**shape, "model_type": kind} for shape in models.values() for kind in kinds(shape)]
    assert not any((matching_row(method, each) or "").endswith(EASYEDIT) for each in facts)


def kinds(shape: dict[str, Any]) -> list[str]:
    kind = shape["model_type"]
    return kind if isinstance(kind, list) else [kind]


@pytest.mark.parametrize("method", [name for name in methods() if preset_rows(name)])
def test_every_row_becomes_settings_that_make_sense(method: str) -> None:
    cls = get_method(method).hparams
    for name in preset_rows(method):
        values = preset(method, name)[1]
        found = cls.from_hparams(f"{method}/{name}")
        found.check()
        assert found.model_name == model_of(name, values) and set(values) <= found.given
        assert {key: plain(getattr(found, key), value) for key, value in values.items()} == values, f"{method}/{name}"


def plain(value: Any, written: Any) -> Any:
    """A value as it is written: of settings inside settings, the fields that are."""
    return {name: getattr(value, name) for name in written} if isinstance(value, Part) else value


@dataclass
class Unknown:
    """A model that no row is for."""

    layers: int

    def facts(self) -> dict[str, Any]:
        return {"model_type": "unknown", "layers": self.layers, "width": 64}

    def weight_name(self, layer: int) -> str:
        return f"blocks.{layer}.out"


@pytest.mark.parametrize("depth", [3, 24, 64])
@pytest.mark.parametrize("method", TABLES)
def test_a_model_without_a_row_gets_complete_settings(method: str, depth: int) -> None:
    default = read(method)["default"]
    found = complete(get_method(method).hparams(), Unknown(depth))
    fixed = {name: plain(getattr(found, name), default[name]) for name in set(FIELDS[method]) - BY_DEPTH[method]}
    assert all(default[name] == value for name, value in fixed.items())
    if "layers" in BY_DEPTH[method]:
        last, band = round(default["depth"] * depth), min(default.get("band", 1), depth // 3)
        assert found.to_dict()["layers"] == list(range(max(last - band + 1, 0), last + 1))


def test_layers_lie_inside_the_model() -> None:
    depth = {name: shape["layers"] for name, shape in read("models").items()}
    for method, name, row in rows():
        for layer in [*row.get("layers", []), row.get("v_loss_layer", 0)]:
            assert name == "default" or 0 <= layer < depth.get(model_of(name, row), 1), (
                f"{method}/{name}: layer {layer}"
            )
        if name != "default" and "v_loss_layer" in row:
            last = depth[model_of(name, row)] - 1
            assert row["v_loss_layer"] == last, f"{method}/{name}: the loss is read at the last block"


def test_choices_exist() -> None:
    for method, name, row in rows():
        assert row.get("objective_optimization", "target_new") in {
            "target_new",
            "prompt_last",
            "only_label",  # what WISE's files call the tokens of the answer
        }, name
        assert row.get("replacement", "replace_last") in {"replace_last", "replace_all", "replace_prompt"}, name
        assert row.get("norm_constraint") is not True, f"{method}/{name}"


def test_no_row_differs_from_what_official_sources_say() -> None:
    xl = read("ROME")["rows"]["gpt2-xl"]
    assert (xl["layers"], xl["v_num_grad_steps"], xl["v_weight_decay"], xl["mom2_adjustment"]) == ([17], 20, 0.5, True)
    assert read("FT")["rows"]["gpt2-xl"]["norm_constraint"] == 5e-4
    assert read("FT")["rows"]["chatglm4-9b"]["objective_optimization"] == "prompt_last"
    assert read("FT")["default"]["objective_optimization"] == "target_new"


@pytest.mark.parametrize(
    ("path", "official", "easyedit"),
    [
        ("AlphaEdit/llama3-8b", {"layers": [4, 5, 6, 7, 8], "v_lr": 0.1, "L2": 10.0}, {"v_lr": 0.1, "L2": 1.0}),
        ("AlphaEdit/qwen2.5-7b", {"clamp_norm_factor": 4.0, "L2": 10.0}, {"clamp_norm_factor": 4.0, "L2": 1.0}),
        ("SPHERE/llama3-8b", {"L2": 10.0, "suppression_strength": 0.5}, {"L2": 1.0, "cumulative_ratio": 0.5}),
        ("PMET/gpt-j-6B", {"mom2_update_weight": 6000.0, "kl_factor": 1.0}, {"mom2_update_weight": 15000.0}),
        ("EMMET/llama-7b", {"clamp_norm_factor": 0.75, "v_weight_decay": 0.5}, {"clamp_norm_factor": 4.0}),
        ("EAMET/qwen2.5-7b", {"layers": [3, 4], "v_lr": 0.04, "mse_factor": 8.0}, {"ks_bs": 1, "mse_factor": 1.0}),
        ("MEMIT-FE/llama3-8b", {"v_num_grad_steps": 35, "clamp_norm_factor": 0.75}, {"clamp_norm_factor": 4.0}),
        ("R-ROME/gpt2-xl", {"layers": [17], "mom2_adjustment": True}, {"mom2_adjustment": False}),
        ("SimIE/llama-7b", {"base_method": "MEMIT", "lamHyper": 10.0}, {"base_method": "ROME", "lamHyper": 10000.0}),
    ],
)
def test_official_values_and_those_of_easyedit(path: str, official: dict[str, Any], easyedit: dict[str, Any]) -> None:
    cls = get_method(path.split("/")[0]).hparams
    for suffix, expected in (("", official), (EASYEDIT, easyedit)):
        found = cls.from_hparams(f"./hparams/{path}{suffix}")
        assert {name: getattr(found, name) for name in expected} == expected
        assert found.model_name == path.split("/")[1]


def test_models_are_told_apart() -> None:
    models = read("models")
    keys = {"model_type", "layers", "width", "inner", "vocab", "rope_type"}
    for name, shape in models.items():
        assert {"model_type", "layers", "width"} <= set(shape) <= keys, name
        assert all(type(shape[key]) is int for key in ("layers", "width", "inner", "vocab") if key in shape), name
    seen: dict[str, str] = {}
    for name, shape in models.items():
        twin = seen.setdefault(repr(shape), name)
        assert twin == name or {twin, name} in TWINS, f"{twin} and {name} have one fingerprint"


@pytest.mark.parametrize("method", TABLES)
def test_rows_of_models_that_cannot_be_told_apart_agree(method: str) -> None:
    table = read(method)["rows"]
    twins = [
        {k: v for k, v in table[name].items() if k != "source"} for name in ("qwen2.5-7b", "qwen2-7b") if name in table
    ]
    assert all(row == twins[0] for row in twins)
