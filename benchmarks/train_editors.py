"""MEND, SERAC and their like on tinyfacts: training, what it scores, what an edit costs.

    python benchmarks/train_editors.py
    python benchmarks/train_editors.py --method SERAC

Trains an archive on the tuning half of the fact table, with the packaged settings, into --out, where a training that
was stopped goes on; a tenth of the subjects validates. Then edits facts of the reporting half, each on the untouched
model, and asks freely: reliability, other wordings, locality. Last the seconds of an edit against those of a plain
forward and backward pass on the same prompt and answer, which gives every weight a gradient.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from easyeditor.core.likelihood import answers, token_log_probs
from easyeditor.data.tinyfacts import TinyFacts
from easyeditor.editors.perform import make_edit, prepared
from easyeditor.edits.ledger import applied
from easyeditor.hparams import complete
from easyeditor.lm.generate import answer
from easyeditor.lm.model import LM
from easyeditor.metrics.text import exact_match
from easyeditor.registry import get_method
from easyeditor.requests import EditRequest
from easyeditor.trainer import EditTrainer

Cells = list[str]
TARGETS = {  # of each method: reliability and locality on the reporting half
    "MEND": ("0.90 at least", "0.95 at least"),
    "SERAC": ("0.95 at least", "0.98 at least"),
}


def trained(method: str, out: Path, data: str, given: dict[str, Any]) -> tuple[float, dict[str, float]]:
    """Seconds of the training, and the scores of the best archive on the validation set."""
    settings: Any = get_method(method).hparams
    config = settings.training.from_hparams(f"{method}/tinyfacts")
    for name, value in given.items():
        setattr(config, name, value)
    start = time.perf_counter()
    scores = EditTrainer(config, data, out=out).run()
    return time.perf_counter() - start, scores


def scored(method: str, lm: LM, archive: Path, requests: Sequence[EditRequest]) -> dict[str, list[float]]:
    """What free answers say after each edit: the new answer, in other wordings, and the same as before elsewhere."""
    spec, found = get_method(method), {"reliability": [], "other wordings": [], "locality": []}
    hparams = complete(spec.hparams(archive=str(archive)), lm)
    state = prepared(lm, spec, hparams)
    for request in requests:
        near = [probe.prompt for group in request.locality.values() for probe in group]
        asked = [request.prompt, *request.rephrase_prompts, *near]
        before = answer(lm, near, 16) if near else []
        with applied(lm, make_edit(lm, spec, [request], hparams, state)):
            said = answer(lm, asked, 16)
        hits = [exact_match(text, [request.target_new]) or 0.0 for text in said[: len(asked) - len(near)]]
        found["reliability"].append(hits[0])
        found["other wordings"] += hits[1:]
        same = zip(said[len(asked) - len(near) :], before, strict=True)
        found["locality"] += [float(new == old) for new, old in same]
    return found


def seconds(work: Callable[[], Any], repeats: int) -> float:
    """The median of some repeats, after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return median(times[1:])


def cost(method: str, lm: LM, archive: Path, request: EditRequest, repeats: int) -> tuple[float, float]:
    """Seconds of an edit, and of a plain forward and backward pass."""
    spec = get_method(method)
    hparams = complete(spec.hparams(archive=str(archive)), lm)
    state = prepared(lm, spec, hparams)

    def plain() -> None:
        batch = answers(lm, [(request.prompt, request.target_new)])
        (-token_log_probs(lm, batch).mean()).backward()
        lm.model.zero_grad()

    return seconds(lambda: spec.run(lm, [request], hparams, state, []), repeats), seconds(plain, repeats)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="MEND", help="of those that are trained")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="else results/METHOD-tinyfacts")
    parser.add_argument("--data", default="tinyfacts:tuning:4", help="what to train from")
    parser.add_argument("--iterations", type=int, help="batches of the training; else the packaged setting")
    parser.add_argument("--asked", type=int, default=100, help="facts of the reporting half that are edited")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args(argv)
    method = get_method(args.method).name
    out = args.out or Path("results", f"{method.lower()}-tinyfacts")
    torch.set_num_threads(args.threads)
    given: dict[str, Any] = {"dtype": "float32"}  # faster on a CPU than the checkpoint's bf16; the weights are the same
    given |= {} if args.iterations is None else {"max_iters": args.iterations}
    time_, scores = trained(method, out, args.data, given)
    lm, requests = LM.load("tinyfacts"), TinyFacts().requests("reporting", args.asked)
    table = Table("what", "found", "target", title=f"{method} on tinyfacts, {args.threads} threads")
    table.add_row("seconds of this training", f"{time_:.0f}", "1200 at most")
    for name in ("edit/acc_val", "loc/acc_val", "loss/total_val"):
        table.add_row(f"validation, {name}", f"{scores[name]:.3f}", "0.90 at least" if name == "edit/acc_val" else "")
    targets = dict(zip(("reliability", "locality"), TARGETS.get(method, ("", "")), strict=True))
    for name, values in scored(method, lm, out, requests).items():
        mean = sum(values) / len(values)
        table.add_row(f"reporting half, {name}", f"{mean:.3f} of {len(values)}", targets.get(name, ""))
    edit, plain = cost(method, lm, out, requests[0], args.repeats)
    table.add_row("an edit, ms", f"{1000 * edit:.1f}", "")
    table.add_row("in forward and backward passes", f"{edit / plain:.2f}", "3 at most")
    size = sum(path.stat().st_size for path in out.glob("archive*"))
    table.add_row("archive, MB", f"{size / 1e6:.2f}", "4 at most, to be packaged")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
