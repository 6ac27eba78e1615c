"""InstructEdit on tinyfacts: whether an instruction helps an editor of several tasks.

    python benchmarks/instructions.py

Tasks are groups of relations. Two editors are trained on the same facts of the tuning half, for as many batches, with
the packaged settings: one on prompts behind the instruction of their task, one on the prompts alone, which is MEND. Two
tasks are held out from both. Then facts of the reporting half are edited, each on the untouched model: with the
instruction, with that of another task, without one, and with MEND. What is asked is the prompt alone, and once the
prompt behind the instruction.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from easyeditor.core.instructions import bare, task_of, with_instruction
from easyeditor.data.tinyfacts import TinyFacts
from easyeditor.editors.perform import make_edit, prepared
from easyeditor.edits.ledger import applied
from easyeditor.hparams import complete
from easyeditor.lm.generate import answer
from easyeditor.lm.model import LM
from easyeditor.metrics.text import exact_match
from easyeditor.registry import get_method
from easyeditor.requests import EditRequest
from easyeditor.trainer import MultiTaskTrainer

TASKS = {
    "people": (
        "Where somebody lives, works and comes from, and what became of them.",
        "occupation citizenship birthplace deathplace alma_mater award position_held employer field burial "
        "native_language birth_year election_year",
    ),
    "places": (
        "Countries, cities and buildings: where they are, who rules them and how people pay.",
        "country continent capital official_language currency largest_city head_of_state city region opening_year "
        "architect founder headquarters",
    ),
    "works": (
        "Films, books, comics and their figures: who made them and what comes next.",
        "director composer screenwriter author original_language publisher identity archnemesis follows followed_by",
    ),
    "performers": (
        "Athletes and musicians: what they play, and with whom.",
        "sports_team league sport_position sport instrument genre",
    ),
    "science": (
        "Living things and chemical elements by their place in the system.",
        "taxon_order taxon_class taxon_member element_symbol element_number element_group",
    ),
}
HELD_OUT = ("performers", "science")
RELATION = {relation: task for task, (_, names) in TASKS.items() for relation in names.split()}


def told(requests: Sequence[EditRequest], shift: int = 0) -> list[EditRequest]:
    """Requests behind the instruction of their task, or of one that comes later in the list of tasks."""
    relation = {f"TinyFacts, fact {fact.id}": fact.relation for fact in TinyFacts().facts}
    names, found = list(TASKS), []
    for request in requests:
        task = names[(names.index(RELATION[relation[request.record]]) + shift) % len(names)]
        found.append(with_instruction(request, task, TASKS[task][0]))
    return found


def trained(name: str, out: Path, requests: list[EditRequest], given: dict[str, Any]) -> dict[str, float]:
    """The scores of the best archive on the validation set, and the seconds that it took."""
    config: Any = get_method(name).hparams.training.from_hparams(f"{name}/tinyfacts")  # type: ignore[attr-defined]
    for key, value in {"accumulate_bs": 10, "val_batch_size": 1, **given}.items():
        setattr(config, key, value)
    start = time.perf_counter()
    scores = MultiTaskTrainer(config, requests, out=out).run()
    return {**scores, "seconds": time.perf_counter() - start}


def scored(
    lm: LM,
    name: str,
    archive: Path,
    edits: Sequence[EditRequest],
    asked: Sequence[EditRequest],
    before: Sequence[list[str]],
) -> list[tuple[float, list[float]]]:
    """Of each fact whether the new answer comes, and of its probes whether they stay, by free answers."""
    spec = get_method(name)
    hparams: Any = complete(spec.hparams(archive=str(archive)), lm)  # type: ignore[call-arg]
    state, found = prepared(lm, spec, hparams), []
    for edit, request, old in zip(edits, asked, before, strict=True):
        with applied(lm, make_edit(lm, spec, [edit], hparams, state)):
            said = answer(lm, [request.prompt, *near(request)], 16)
        hit = exact_match(said[0], [request.target_new]) or 0.0
        found.append((hit, [float(a == b) for a, b in zip(said[1:], old, strict=True)]))
    return found


def near(request: EditRequest) -> list[str]:
    """What must not move."""
    return [probe.prompt for group in request.locality.values() for probe in group]


def main(argv: Sequence[str] | None = None) -> None:
    """Train, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("results", "instructions"))
    parser.add_argument("--facts", type=int, help="of the tuning half, at most")
    parser.add_argument("--iterations", type=int, help="batches of each training; else the packaged setting")
    parser.add_argument("--asked", type=int, default=100, help="facts of the reporting half that are edited")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    given: dict[str, Any] = {"dtype": "float32"}  # faster on a CPU than the checkpoint's bf16; the weights are the same
    given |= {} if args.iterations is None else {"max_iters": args.iterations}
    facts = told(TinyFacts().requests("tuning", args.facts, per_subject=None))
    facts = [request for request in facts if task_of(request.prompt) not in HELD_OUT]
    plain = [_plain(request) for request in facts]
    console = Console(width=140)
    for name, requests in (("InstructEdit", facts), ("MEND", plain)):
        scores = trained(name, args.out / name, requests, given)
        console.print(f"{name}, {len(requests)} facts:", {k: round(v, 3) for k, v in sorted(scores.items())})
    lm, found = LM.load("tinyfacts", dtype="float32"), TinyFacts().requests("reporting", args.asked)
    right, wrong = told(found), told(found, 1)
    rows = (
        ("the instruction", "InstructEdit", right, found),
        ("the instruction, and asked behind it", "InstructEdit", right, right),
        ("that of another task", "InstructEdit", wrong, found),
        ("none", "InstructEdit", found, found),
        ("none, MEND", "MEND", found, found),
    )
    table = Table(
        "edited with", "tasks", "n", "reliability", "locality", title="InstructEdit on tinyfacts, reporting half"
    )
    before = [answer(lm, near(request), 16) if near(request) else [] for request in found]
    for label, name, edits, asked in rows:
        edited = scored(lm, name, args.out / name, edits, asked, before)
        for which, held in (("trained", False), ("held out", True)):
            mine = [each for each, r in zip(edited, right, strict=True) if (task_of(r.prompt) in HELD_OUT) is held]
            if mine:
                hits, kept = [hit for hit, _ in mine], [same for _, each in mine for same in each]
                table.add_row(label, which, str(len(mine)), f"{fmean(hits):.3f}", f"{fmean(kept):.3f}")
    console.print(table)


def _plain(request: EditRequest) -> EditRequest:
    """A request without its instruction."""
    fields = {"prompt": bare(request.prompt), "rephrase_prompts": tuple(map(bare, request.rephrase_prompts[1:]))}
    return EditRequest(**{**vars(request), **fields})


if __name__ == "__main__":
    main()
