"""What a model can do besides the edited facts: any task of EleutherAI's lm-evaluation-harness, on the model in memory.

Gao et al., "The Language Model Evaluation Harness". Run it on the model before and after the edits.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from easyeditor.errors import MissingExtra, UsageError
from easyeditor.lm.model import LM


def capability(
    lm: LM,
    tasks: str | Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    include_path: str | Path | None = None,
    packaged: bool = True,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Score tasks of the harness on the edited model.

    Args:
        lm: The model with whatever edits of weights and modules are on it.
        tasks: Names of tasks or groups, such as ``["mmlu", "gsm8k"]``.
        limit: Questions per task; None: all.
        num_fewshot: Examples in the prompt; None: what the task says.
        batch_size: Questions per forward pass.
        include_path: A folder with tasks of your own (YAML files of the harness).
        packaged: Whether the harness's own tasks are known; reading their list takes seconds.
        seed: For the choice of examples.

    Returns:
        ``<task>.<metric>`` (behind it ``.<filter>``, where the task reads answers in several ways) -> ``mean``,
        ``stderr``, ``n``, ``unscored`` and ``protocol``, as `summarise` gives them.

    Raises:
        MissingExtra: lm-evaluation-harness is not installed.
        UsageError: A task is unknown or its data cannot be had here, or an edit is on that the harness cannot see.
    """
    if lm.rewriters or lm.processors:
        raise UsageError(
            "Capability is measured on weights and modules, and an edit of the prompt or of the decoding is on this "
            "model; the harness would not see it. Take that edit back first."
        )
    harness, models, found = (_part(name) for name in ("lm_eval", "lm_eval.models.huggingface", "lm_eval.tasks"))
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    if not names:
        raise UsageError("No task was named. Name tasks of the harness, such as 'mmlu'.")
    folder = str(include_path) if include_path is not None else None
    was = lm.model.training
    try:
        wrapped = models.HFLM(
            pretrained=lm.model,
            tokenizer=copy.deepcopy(lm.tokenizer),  # the harness sets a padding token
            batch_size=batch_size,
            device=str(lm.device),
        )
        result = harness.simple_evaluate(
            wrapped,
            tasks=names,
            num_fewshot=num_fewshot,
            limit=limit,
            bootstrap_iters=1000,
            log_samples=False,
            random_seed=None,  # the global generators are not ours
            numpy_random_seed=None,
            torch_random_seed=None,
            fewshot_random_seed=seed,
            task_manager=found.TaskManager(include_path=folder, include_defaults=packaged),
        )
    except (KeyError, ValueError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"The harness cannot run {', '.join(names)}: {reason}. Check the names ('lm-eval ls tasks' lists them) and "
            "whether their data is on this machine; include_path names a folder of tasks of your own."
        ) from error
    finally:
        lm.model.train(was)
    return _scores(result, limit)


def check_installed() -> None:
    """See that the harness is there, before any work.

    Raises:
        MissingExtra: It is not installed.
    """
    if find_spec("lm_eval") is None:
        raise _missing()


def _scores(result: Mapping[str, Any], limit: int | None) -> dict[str, dict[str, Any]]:
    out: dict[str, dict[str, Any]] = {}
    shots, versions, counts = (result.get(key, {}) for key in ("n-shot", "versions", "n-samples"))
    release = getattr(_part("lm_eval"), "__version__", "?")
    for task, values in result["results"].items():
        for key, value in values.items():
            metric, _, way = key.partition(",")
            if not isinstance(value, int | float) or metric.endswith("_stderr") or not way:
                continue
            error = values.get(f"{metric}_stderr,{way}")
            out[f"{task}.{metric}" + ("" if way == "none" else f".{way}")] = {
                "mean": float(value),
                "stderr": float(error) if isinstance(error, int | float) else None,
                "n": counts.get(task, {}).get("effective"),
                "unscored": 0,
                "protocol": f"lm_eval_{release}.{task}_v{versions.get(task)}.{shots.get(task)}_shot.{way}"
                + (f".first_{limit}" if limit else ""),
            }
    return out


def _part(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise _missing() from error


def _missing() -> MissingExtra:
    return MissingExtra(
        "Capability scores need the lm-evaluation-harness. Install it: pip install 'easyeditor[capability]'."
    )
