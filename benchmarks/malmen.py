"""MALMEN and RLEdit on tinyfacts: training, many facts in one model, and what a thousand at once cost.

    python benchmarks/malmen.py
    python benchmarks/malmen.py --method RLEdit

Trains an archive on the tuning half of the fact table, with the packaged settings, into --out, where a training that
was stopped goes on; a tenth of the subjects validates. Then edits facts of the reporting half, MALMEN all at once and
RLEdit one packaged batch after the other, and asks freely: reliability, other wordings, locality of questions that are
not edited themselves. Last the seconds of one edit of a thousand facts, and for several numbers of facts the peak of
memory over the loaded model and network, each in a process of its own.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table

from easyeditor.data.named import named_facts
from easyeditor.data.tinyfacts import TinyFacts
from easyeditor.editors.perform import make_edit, prepared
from easyeditor.edits.ledger import Ledger
from easyeditor.hparams import complete
from easyeditor.lm.generate import answer
from easyeditor.lm.model import LM
from easyeditor.metrics.text import exact_match
from easyeditor.registry import get_method
from easyeditor.requests import EditRequest
from easyeditor.trainer import EditTrainer
from run import status

METHODS = ("MALMEN", "RLEdit")


def facts(n: int) -> list[EditRequest]:
    """So many facts of the reporting half, no more of one subject than it takes."""
    table = TinyFacts()
    tried = (table.requests("reporting", n, per_subject=most) for most in (1, 2, 4, None))
    found: list[EditRequest] = []
    for found in tried:
        if len(found) >= n:
            break
    return found


def trained(
    method: str, out: Path, data: Sequence[EditRequest], given: dict[str, Any]
) -> tuple[float, dict[str, float]]:
    """Seconds of the training, and the scores of the best archive on the validation set."""
    config: Any = get_method(method).hparams.training.from_hparams(f"{method}/tinyfacts")  # type: ignore[attr-defined]
    for name, value in given.items():
        setattr(config, name, value)
    start = time.perf_counter()
    scores = EditTrainer(config, data, out=out).run()
    return time.perf_counter() - start, scores


class Editor:
    """The model with a method and its archive."""

    def __init__(self, method: str, archive: Path) -> None:
        self.lm, self.spec = LM.load("tinyfacts", dtype="float32"), get_method(method)
        hparams: Any = self.spec.hparams
        self.hparams = complete(hparams(archive=str(archive)), self.lm)
        self.state = prepared(self.lm, self.spec, self.hparams)

    def edit(self, requests: Sequence[EditRequest]) -> None:
        """Edit some facts together, for good."""
        Ledger.of(self.lm).apply(make_edit(self.lm, self.spec, requests, self.hparams, self.state))


def scored(editor: Editor, requests: Sequence[EditRequest], size: int) -> dict[str, list[float]]:
    """What free answers say after all facts were edited, so many together."""
    lm, edited = editor.lm, {request.prompt for request in requests}
    near = sorted({probe.prompt for request in requests for group in request.locality.values() for probe in group})
    near = [prompt for prompt in near if prompt not in edited]
    before = answer(lm, near, 16, 32)
    for start in range(0, len(requests), size):
        editor.edit(requests[start : start + size])
    found: dict[str, list[float]] = {}
    asked = {
        "reliability": [(request.prompt, request) for request in requests],
        "other wordings": [(prompt, request) for request in requests for prompt in request.rephrase_prompts],
    }
    for name, questions in asked.items():
        said = answer(lm, [prompt for prompt, _ in questions], 16, 32)
        found[name] = [
            exact_match(text, [request.target_new]) or 0.0 for text, (_, request) in zip(said, questions, strict=True)
        ]
    found["locality"] = [float(a == b) for a, b in zip(answer(lm, near, 16, 32), before, strict=True)]
    return found


def peak(method: str, archive: Path, n: int, threads: int) -> int:
    """Bytes that one edit of so many facts needs over what is loaded; for a process of its own. Linux only."""
    torch.set_num_threads(threads)
    editor, requests = Editor(method, archive), facts(n)
    make_edit(editor.lm, editor.spec, requests[:1], editor.hparams, editor.state)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else what was freed hides what is needed
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    make_edit(editor.lm, editor.spec, requests, editor.hparams, editor.state)
    return status("VmHWM") - before


def apart(*args: Any) -> int | None:
    """`peak` in a new process; None where the system does not say."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak, *args).result()


def main(argv: Sequence[str] | None = None) -> None:
    """Train, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="MALMEN", choices=METHODS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="else results/METHOD-tinyfacts")
    parser.add_argument("--data", default="tinyfacts:tuning:8", help="what to train from")
    parser.add_argument("--learn", type=int, help="at most so many facts of it")
    parser.add_argument("--iterations", type=int, help="batches of the training; else the packaged setting")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="other settings of the training")
    parser.add_argument("--facts", type=int, default=500, help="of the reporting half, in one model")
    parser.add_argument("--most", type=int, default=1000, help="facts of the edit whose seconds are taken")
    parser.add_argument("--memory", type=int, nargs="*", default=[250, 500, 1000], help="facts of one edit")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    out = args.out or Path("results", f"{args.method.lower()}-tinyfacts")
    given: dict[str, Any] = {"dtype": "float32"}  # faster on a CPU than the checkpoint's bf16; the weights are the same
    given |= {} if args.iterations is None else {"max_iters": args.iterations}
    given |= {name: yaml.safe_load(value) for name, _, value in (each.partition("=") for each in args.set)}
    seconds, scores = trained(args.method, out, named_facts(args.data, args.learn), given)
    table = Table("what", "found", "target", title=f"{args.method} on tinyfacts, {args.threads} threads")
    table.add_row("seconds of this training", f"{seconds:.0f}", "")
    for name in ("edit/acc_val", "loc/acc_val", "loss/total_val"):
        table.add_row(f"validation, {name}", f"{scores[name]:.3f}", "")
    editor = Editor(args.method, out)
    size = args.facts if args.method == "MALMEN" else editor.hparams.batch_size
    for name, values in scored(editor, facts(args.facts), size).items():
        mean = f"{sum(values) / len(values):.3f} of {len(values)}" if values else "no question"
        table.add_row(f"{args.facts} facts, {name}", mean, "0.85 at least" if name == "reliability" else "")
    editor, many = Editor(args.method, out), facts(args.most)
    start = time.perf_counter()
    editor.edit(many)
    table.add_row(f"one edit of {len(many)} facts, s", f"{time.perf_counter() - start:.1f}", "60 at most")
    for n in args.memory:
        found = apart(args.method, out, n, args.threads)
        table.add_row(f"peak of an edit of {n}, MB", "not measured" if found is None else f"{found / 1e6:.0f}", "flat")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
