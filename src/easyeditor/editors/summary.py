"""Means over records, with their number, standard error and protocol; two protocols are never mixed."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from easyeditor.errors import UsageError

log = logging.getLogger(__name__)

PHASES = ("pre", "post", "final")
UNITS = ("gen", "judge", "acc", "ppl")
PLAIN = (*(f"{name}_{unit}" for unit in UNITS for name in ("rewrite", "rephrase")), "ood_acc")
GROUPS = ("locality", "portability", "probability", "robustness", "text", "fluency")
NO_SCORES = ("_output", "_content", "_next")  # what scores are made from


def summarise(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Average records.

    Args:
        records: What an editor returned.

    Returns:
        Phase (``pre``, ``post``, ``final``) -> score (such as ``rewrite_gen`` or ``locality.neighborhood_acc``) ->
        ``mean``, ``n`` (scored values), ``stderr`` (None for fewer than two), ``unscored`` and ``protocol``.

    Raises:
        UsageError: One score was made under two protocols.
    """
    out: dict[str, dict[str, dict[str, Any]]] = {}
    for phase in PHASES:
        collected: dict[str, list[float | None]] = {}
        protocols: dict[str, set[str]] = {}
        for record in records:
            for name, values, protocol in _scores(record.get(phase) or {}):
                collected.setdefault(name, []).extend(values)
                protocols.setdefault(name, set()).add(protocol)
        for name, values in collected.items():
            out.setdefault(phase, {})[name] = _mean(name, values, protocols[name])
    return out


def summary_metrics(all_metrics: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`summarise` under the name that existing scripts use; the means also go to the log.

    Args:
        all_metrics: One record or several.
    """
    summary = summarise([all_metrics] if isinstance(all_metrics, Mapping) else list(all_metrics))
    for phase, scores in summary.items():
        for name, score in scores.items():
            if score["mean"] is not None:
                log.info("%s %s: %.4f (n = %d)", phase, name, score["mean"], score["n"])
    return summary


def _scores(phase: Mapping[str, Any]) -> Iterator[tuple[str, list[float | None], str]]:
    meta = phase.get("metric_meta", {})

    def known(key: str) -> str:
        return str(meta.get(key, {}).get("comparable_group", ""))

    for name in PLAIN:
        if name in phase:
            yield name, _listed(phase[name]), known(name.removesuffix("_acc"))
    for group in GROUPS:
        for name, values in (phase.get(group) or {}).items():
            if not name.endswith(NO_SCORES):
                yield f"{group}.{name}", _listed(values), known(f"{group}.{name.removesuffix('_acc')}")


def _listed(values: Any) -> list[float | None]:
    return list(values) if isinstance(values, list | tuple) else [values]


def _mean(name: str, values: Sequence[float | None], protocols: set[str]) -> dict[str, Any]:
    if len(protocols) > 1:
        raise UsageError(
            f"The records give '{name}' under different protocols ({', '.join(sorted(protocols))}); their mean would "
            "mean nothing. Average records of one protocol at a time."
        )
    scored = [float(value) for value in values if value is not None]
    n = len(scored)
    mean = sum(scored) / n if n else None
    spread = math.sqrt(sum((v - (mean or 0.0)) ** 2 for v in scored) / (n - 1) / n) if n > 1 else None
    return {"mean": mean, "n": n, "stderr": spread, "unscored": len(values) - n, "protocol": next(iter(protocols))}
