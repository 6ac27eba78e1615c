"""The preset tables: they parse, they are complete, they say where each value is from, and their values have a type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

FOLDER = Path(__file__).parents[1] / "src" / "easyeditor" / "hparams"
TABLES = ("ROME", "FT", "GRACE", "ICE")

# The files that existing scripts name (for IKE and GRACE: those of models that read text).
EXISTING = {
    "ROME": "baichuan-7b chatglm2-6b chatglm4-9b gpt-j-6B gpt2-xl internlm-7b llama-7b llama3-8b llama3.2-3b "
    "mistral-7b qwen-7b qwen2-7b qwen2.5-7b qwen3.5-9b",
    "FT": "baichuan-7b chatglm2-6b chatglm4-9b gpt-j-6B gpt2-xl internlm-7b llama-7b llama3-8b llama3.2-3b "
    "mistral-7b qwen-7b qwen2-7b qwen2.5-7b qwen3.5-9b t5-3B",
    "GRACE": "gpt-j-6b gpt2-xl llama-7b llama3.2-3b qwen2-7b qwen2.5-7b qwen3.5-9b",
    "ICE": "baichuan-7b chatglm2-6b chatglm4-9b gpt-j-6B gpt2-xl internlm-7b llama-7b llama3-8b llama3.2-3b "
    "mistral-7b qwen-7b qwen2-7b qwen2.5-7b t5-3B",
}

# Field -> types that a value may have. A float is written as one: YAML reads 5e-1 as a text.
FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "ROME": {
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
        "context_template_length_params": (list,),
    },
    "FT": {
        "layers": (list,),
        "num_steps": (int,),
        "lr": (float,),
        "weight_decay": (float,),
        "kl_factor": (float,),
        "norm_constraint": (float, bool),
        "objective_optimization": (str,),
        "batch_size": (int,),
        "max_length": (int,),
    },
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
    "ICE": {"k": (int,), "use_icl_examples": (bool,)},
}
BY_DEPTH: dict[str, set[str]] = {
    "ROME": {"layers", "v_loss_layer"},
    "FT": {"layers"},
    "GRACE": {"inner_params"},
    "ICE": set(),
}


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
    assert name == "default" or name in read("models")
    expected = set(FIELDS[method]) - (BY_DEPTH[method] if name == "default" else set())
    chosen = {"depth"} if name == "default" and BY_DEPTH[method] else set()
    assert set(row) - {"source"} == expected | chosen
    for field in expected:
        assert type(row[field]) in FIELDS[method][field], f"{method}/{name}: {field} is {row[field]!r}"


def test_layers_lie_inside_the_model() -> None:
    depth = {name: shape["layers"] for name, shape in read("models").items()}
    for method, name, row in rows():
        for layer in [*row.get("layers", []), row.get("v_loss_layer", 0)]:
            assert name == "default" or 0 <= layer < depth[name], f"{method}/{name}: layer {layer}"
        if name != "default" and "v_loss_layer" in row:
            assert row["v_loss_layer"] == depth[name] - 1, f"{method}/{name}: the loss is read at the last block"


def test_choices_exist() -> None:
    for method, name, row in rows():
        assert row.get("objective_optimization", "target_new") in {"target_new", "prompt_last"}, name
        assert row.get("replacement", "replace_last") in {"replace_last", "replace_all", "replace_prompt"}, name
        assert row.get("norm_constraint") is not True, f"{method}/{name}"


def test_no_row_differs_from_what_official_sources_say() -> None:
    xl = read("ROME")["rows"]["gpt2-xl"]
    assert (xl["layers"], xl["v_num_grad_steps"], xl["v_weight_decay"], xl["mom2_adjustment"]) == ([17], 20, 0.5, True)
    assert read("FT")["rows"]["gpt2-xl"]["norm_constraint"] == 5e-4
    assert read("FT")["rows"]["chatglm4-9b"]["objective_optimization"] == "prompt_last"
    assert read("FT")["default"]["objective_optimization"] == "target_new"


def test_models_are_told_apart() -> None:
    models = read("models")
    keys = {"model_type", "layers", "width", "inner", "vocab", "rope_type"}
    for name, shape in models.items():
        assert {"model_type", "layers", "width"} <= set(shape) <= keys, name
        assert all(type(shape[key]) is int for key in ("layers", "width", "inner", "vocab") if key in shape), name
    seen: dict[str, str] = {}
    for name, shape in models.items():
        twin = seen.setdefault(repr(shape), name)
        assert twin == name or {twin, name} == {"qwen2.5-7b", "qwen2-7b"}, f"{twin} and {name} have one fingerprint"


@pytest.mark.parametrize("method", TABLES)
def test_rows_of_models_that_cannot_be_told_apart_agree(method: str) -> None:
    table = read(method)["rows"]
    first, second = ({k: v for k, v in table[name].items() if k != "source"} for name in ("qwen2.5-7b", "qwen2-7b"))
    assert first == second
