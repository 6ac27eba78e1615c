"""What a run folder holds, as numbers: means over cases with their number and standard error, retention, cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from easyeditor.bench.before import before_of
from easyeditor.bench.controls import faults
from easyeditor.bench.folder import header_of, lines_of, seeds_of
from easyeditor.bench.log import Line
from easyeditor.bench.plan import Row
from easyeditor.bench.probes import without_edited
from easyeditor.bench.schedule import Schedule
from easyeditor.bench.verdicts import judged, known, unjudged
from easyeditor.editors.summary import summarise
from easyeditor.errors import UsageError
from easyeditor.metrics.retention import retention

HEADLINES: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("reliability", lambda name: name == "rewrite_gen"),
    ("judged", lambda name: name == "rewrite_judge"),
    ("generalisation", lambda name: name == "rephrase_gen"),
    ("locality", lambda name: name.startswith("locality.") and name.endswith("_gen")),
    ("portability", lambda name: name.startswith("portability.") and name.endswith("_gen")),
)
HELD = "still held"
ENDS = 5  # the first and the last fifth of the edits are compared

Scores = dict[str, float]


@dataclass(frozen=True)
class Mean:
    """A mean over cases.

    Args:
        mean: The mean.
        n: Over how many cases.
        stderr: Its standard error; None for fewer than two cases.
    """

    mean: float
    n: int
    stderr: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean | None:
        """The mean of values; None if there is none."""
        if not values:
            return None
        return cls(fmean(values), len(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None)

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + (f" ± {self.stderr:.3f}" if self.stderr is not None else "")


@dataclass
class RowResult:
    """What came of a row, over all seeds.

    Args:
        row: The row.
        expected: How many cases it has when it is finished.
        cases: The cases, with their seed.
        checkpoints: The cases at checkpoints, with their seed.
        about: What the row cost once.
        sequential: Whether edits stay.
        tasks: Scores of tasks, with their seed.
    """

    row: Row
    expected: int
    cases: list[Line] = field(default_factory=list)
    checkpoints: list[Line] = field(default_factory=list)
    about: list[Line] = field(default_factory=list)
    sequential: bool = False
    tasks: list[Line] = field(default_factory=list)

    def leave_out(self, schedule: Schedule) -> None:
        """Let probes that are edited themselves not count; see `easyeditor.bench.probes`."""
        seeds = list(dict.fromkeys(line["seed"] for line in self.cases))
        of = {
            seed: [[x for x in lines if x["seed"] == seed] for lines in (self.cases, self.checkpoints)]
            for seed in seeds
        }
        found = [without_edited(cases, checkpoints, schedule) for cases, checkpoints in of.values()]
        self.cases = [line for cases, _ in found for line in cases]
        self.checkpoints = [line for _, checkpoints in found for line in checkpoints]

    @property
    def failed(self) -> list[Line]:
        """The cases whose edit failed."""
        return [line for line in self.cases if "error" in line]

    @property
    def unscored(self) -> int:
        """How many cases could not be scored."""
        return sum("unscored" in line["post"] for line in self.cases)

    @property
    def error(self) -> str | None:
        """Why there is nothing, if the method could not be prepared."""
        return next((line["error"] for line in self.about if "error" in line), None) if not self.cases else None

    @property
    def remarks(self) -> list[str]:
        """What must be known to read the row."""
        found = ["answer in the context"] if self.row.in_context else []
        found += ["edited one by one: takes no batch"] if self.row.one_by_one else []
        found += [f"{len(self.failed)} failed"] if self.failed else []
        found += ["reads other text much worse"] if (self.perplexity or {}).get("alarm") else []
        found += [f"{self.unscored} unscored"] if self.unscored else []
        found += ["capability unscored"] if any("unscored" in line["scores"] for line in self.tasks) else []
        found += [f"unfinished: {len(self.cases)} of {self.expected}"] if len(self.cases) < self.expected else []
        return found + ([f"not run: {self.error}"] if self.error else [])

    @cached_property
    def _post(self) -> list[Scores]:
        return [_scores_of(line["post"]) for line in self.cases]

    @cached_property
    def ends(self) -> list[int]:
        """After how many edits there is a checkpoint."""
        return sorted({line["edited"] for line in self.checkpoints})

    def last(self) -> list[Line]:
        """The cases at the last checkpoint, with what was asked for."""
        asked = {(line["seed"], line["case"]): line["requested_rewrite"] for line in self.cases}
        lines = [line for line in self.checkpoints if line["edited"] == self.ends[-1]]
        found = [(line, asked.get((line["seed"], line["case"]))) for line in lines]
        return [{**line, "requested_rewrite": what} for line, what in found if what is not None]

    @cached_property
    def _at(self) -> dict[int, list[tuple[Line, Scores]]]:
        found: dict[int, list[tuple[Line, Scores]]] = {end: [] for end in self.ends}
        for line in self.checkpoints:
            found[line["edited"]].append((line, _scores_of(line["post"])))
        return found

    def scored(self, phase: str) -> list[Scores]:
        """The scores of each case.

        Args:
            phase: ``post``: right after its edit; ``final``: on the model with all edits.
        """
        if phase == "post" or (self.sequential and self.row.control in ("unedited", "prompt")):
            return self._post
        return [scores for _, scores in self._at[self.ends[-1]]] if self.ends else []

    def means(self, phase: str) -> dict[str, Mean]:
        """Score -> its mean over cases; a case with several probes counts once."""
        scored = self.scored(phase)
        names = dict.fromkeys(name for scores in scored for name in scores)
        found = {name: Mean.of([scores[name] for scores in scored if name in scores]) for name in names}
        return {name: mean for name, mean in found.items() if mean is not None}

    @property
    def perplexity(self) -> dict[str, Any] | None:
        """Perplexity on held-out text before and after; see `Scoring.damage`."""
        return next((line["perplexity"] for line in reversed(self.about) if line.get("perplexity")), None)

    def capability(self) -> dict[str, tuple[Mean, str]]:
        """Task and metric -> its mean over seeds with its protocol; n and standard error are those of the questions."""
        scored = [line["scores"] for line in self.tasks if "unscored" not in line["scores"]]
        found = {}
        for name in dict.fromkeys(name for scores in scored for name in scores):
            same = [scores[name] for scores in scored if name in scores]
            errors = [each["stderr"] for each in same if each["stderr"] is not None]
            mean = Mean(fmean(each["mean"] for each in same), same[0]["n"], fmean(errors) if errors else None)
            found[name] = mean, str(same[0]["protocol"])
        return found

    @cached_property
    def protocols(self) -> dict[str, str]:
        """Score -> under what it was made."""
        found: dict[str, str] = {}
        for line in self.cases:
            for name, score in summarise([{"post": line["post"]}]).get("post", {}).items():
                found.setdefault(name, score["protocol"])
        return found

    def headlines(self, phase: str) -> dict[str, Mean]:
        """Reliability, generalisation, locality and portability, as far as there are probes."""
        return _headlines(self.scored(phase))

    def retention(self) -> list[tuple[int, dict[str, Mean]]]:
        """At each checkpoint: after how many edits, and the headline scores of all facts edited so far.

        Beside them ``still held``: of the facts that held right after their edit, the share that holds then.
        """
        first = {(line["seed"], line["case"]): line["post"] for line in self.cases}
        found = []
        for end in self.ends:
            lines = [line for line, _ in self._at[end] if (line["seed"], line["case"]) in first]
            earlier = [first[line["seed"], line["case"]] for line in lines]
            held = [value for value in retention(earlier, [line["post"] for line in lines]) if value is not None]
            means = _headlines([scores for _, scores in self._at[end]])
            found.append((end, means | ({HELD: mean} if (mean := Mean.of(held)) is not None else {})))
        return found

    def first_and_last(self) -> dict[str, tuple[Mean, Mean]]:
        """Reliability of the first and of the last fifth of the edits: right after their edit, and at the end."""
        count = max(self.expected_per_seed // ENDS, 1)
        bounds = (range(count), range(self.expected_per_seed - count, self.expected_per_seed))
        right_after = [(line["case"], scores) for line, scores in zip(self.cases, self._post, strict=True)]
        final = [(line["case"], scores) for line, scores in self._at[self.ends[-1]]] if self.ends else []
        found = {}
        for name, scored in (("right after", right_after), ("at the end", final)):
            parts = [Mean.of([s["rewrite_gen"] for i, s in scored if i in b and "rewrite_gen" in s]) for b in bounds]
            if parts[0] is not None and parts[1] is not None:
                found[name] = (parts[0], parts[1])
        return found

    @property
    def expected_per_seed(self) -> int:
        """How many cases each seed has."""
        return self.expected // max(len({line["seed"] for line in self.cases}), 1) if self.cases else self.expected

    def cost(self) -> dict[str, float]:
        """Means per fact in seconds by part, what was spent once, memory at the peak, bytes per fact, and latency."""
        costs = [line["cost"] for line in self.cases if "cost" in line and "error" not in line]
        out: dict[str, float] = {}
        for part in dict.fromkeys(part for cost in costs for part in cost["seconds"]):
            out[part] = fmean(cost["seconds"].get(part, 0.0) for cost in costs)
        for name in ("cpu", "device"):
            known = [cost["memory"][name] for cost in costs if cost["memory"].get(name) is not None]
            out |= {f"memory_{name}": max(known)} if known else {}
        if costs:
            out["bytes"] = fmean(cost["bytes"] for cost in costs)
        once = [line["preparation"] for line in self.about if "preparation" in line]
        delays = [line["latency"] for line in self.about if line.get("latency")]
        out |= {"preparation": max(once)} if once and self.row.method else {}
        out |= {"latency": fmean(d["with"] - d["without"] for d in delays)} if delays else {}
        return out


@dataclass(frozen=True)
class Results:
    """What a run folder holds.

    Args:
        folder: The folder.
        header: Its `run.json`.
        rows: Its rows.
        faults: What is wrong with its controls.
        unjudged: How many answers a judge is asked about, and how many of them have no verdict.
    """

    folder: Path
    header: Mapping[str, Any]
    rows: list[RowResult]
    faults: list[str]
    unjudged: tuple[int, int] = (0, 0)

    @classmethod
    def of(cls, folder: str | Path) -> Results:
        """Read a run folder, finished or not.

        Raises:
            UsageError: There is no run in it.
            DamagedFile: A file in it cannot be read.
        """
        folder = Path(folder)
        header = header_of(folder)
        plan = header["plan"]
        rows = []
        for each in header["rows"]:
            stays = str(plan["schedule"]).startswith("sequential")
            found = RowResult(Row(**each), plan["n"] * plan["seeds"], sequential=stays)
            for seed in seeds_of(header):
                for line in lines_of(folder, found.row.name, seed):
                    kinds = {"case": found.cases, "checkpoint": found.checkpoints, "row": found.about}
                    {**kinds, "capability": found.tasks}[line["kind"]].append({**line, "seed": seed})
            rows.append(found)
        asked = _with_verdicts(folder, plan.get("judge"), rows)
        before = before_of(folder)
        zeros = [line for found in rows if found.row.control == "no-op" for line in found.cases]
        pairs = [(before[line["fact"]], line["post"]) for line in zeros if line["fact"] in before]
        for found in rows:
            found.leave_out(Schedule("single") if found.row.in_context else Schedule.parse(str(plan["schedule"])))
        return cls(folder, header, rows, faults(pairs), (len(asked), sum(asked)))

    @property
    def protocol(self) -> dict[str, str]:
        """Under what its numbers were made."""
        return dict(self.header["protocol"])

    def to_judge(self) -> Iterator[Line]:
        """Lines with answers that a judge is asked about: right after each edit, and at the end."""
        for found in self.rows:
            yield from found.cases
            yield from found.last()

    @property
    def phases(self) -> tuple[str, ...]:
        """The phases that it has scores of."""
        return ("post", "final") if any(found.checkpoints for found in self.rows) else ("post",)

    def records(self, row: str, seed: int = 0) -> list[dict[str, Any]]:
        """The cases of a row and a seed as an editor returns them: ``pre``, ``post``, ``final``, and the rest.

        Raises:
            UsageError: There is no such row.
        """
        found = next((each for each in self.rows if each.row.name == row), None)
        if found is None:
            raise UsageError(f"There is no row '{row}'. Known: {', '.join(each.row.name for each in self.rows)}.")
        before = before_of(self.folder)
        last = {
            line["case"]: line["post"]
            for line in found.checkpoints
            if line["seed"] == seed and line["edited"] == found.ends[-1]
        }
        out = []
        for line in sorted((line for line in found.cases if line["seed"] == seed), key=lambda line: int(line["case"])):
            record = {"pre": before.get(line["fact"], {}), **line}
            out.append({**record, "final": last[line["case"]]} if line["case"] in last else record)
        return out


def _with_verdicts(folder: Path, judge: str | None, rows: Sequence[RowResult]) -> list[bool]:
    """Put a judge's verdicts into the lines of rows; of each answer, whether it has none."""
    if judge is None:
        return []
    said, missing = known(folder, judge), []
    for found in rows:
        last = [judged(line, judge, said) for line in found.last()]
        found.cases = [judged(line, judge, said) for line in found.cases]
        found.checkpoints = [line for line in found.checkpoints if line["edited"] != found.ends[-1]] + last
        missing += [gone for line in (*found.cases, *last) for gone in unjudged(line)]
    return missing


def check_comparable(runs: Sequence[Results]) -> None:
    """See that runs may stand in one table.

    Raises:
        UsageError: Two have different protocols; the message names both.
    """
    for other in runs[1:]:
        if other.protocol != runs[0].protocol:
            raise UsageError(
                f"'{runs[0].folder}' and '{other.folder}' have different protocols and do not go into one table: "
                f"{_told(runs[0].protocol, other.protocol)}; against {_told(other.protocol, runs[0].protocol)}. "
                "Report them one by one."
            )


def _told(protocol: Mapping[str, str], other: Mapping[str, str]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in protocol.items() if other.get(name) != value)


def _scores_of(phase: Mapping[str, Any]) -> Scores:
    """The mean of each score of one case; what could not be scored is left out."""
    found = summarise([{"post": phase}]).get("post", {})
    return {name: float(score["mean"]) for name, score in found.items() if score["mean"] is not None}


def _headlines(scored: Iterable[Scores]) -> dict[str, Mean]:
    out: dict[str, Mean] = {}
    listed = list(scored)
    for headline, belongs in HEADLINES:
        values = []
        for scores in listed:
            own = [value for name, value in scores.items() if belongs(name)]
            values += [fmean(own)] if own else []
        if (mean := Mean.of(values)) is not None:
            out[headline] = mean
    return out
