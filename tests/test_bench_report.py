"""Reports of runs: means over cases, tables that refuse to mix protocols, a page that needs nothing else, the verbs."""

from __future__ import annotations

import csv
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from easyeditor.bench.page import page
from easyeditor.bench.plan import Row
from easyeditor.bench.plots import Bar, Dot, Pair, Track, bars, lines, pairs, scatter
from easyeditor.bench.probes import without_edited
from easyeditor.bench.results import Mean, Results, RowResult, _scores_of, check_comparable
from easyeditor.bench.schedule import Schedule
from easyeditor.bench.tables import as_csv, cost_sheet, markdown, notes, quality_sheets, retention_sheet
from easyeditor.cli import application
from easyeditor.cli.bench import by_method
from easyeditor.errors import DamagedFile, UsageError


def case(i: int, good: float, **more: Any) -> dict[str, Any]:
    """A line of a log: one fact with two paraphrases and two neighbours, one of them unscored."""
    meta = {
        name: {"comparable_group": f"lm.{name}"}
        for name in ("rewrite", "rewrite_gen", "rephrase_gen", "locality.near_gen", "portability.hop_gen")
    }
    post = {
        "rewrite_acc": [1.0],
        "rewrite_gen": [good],
        "rephrase_gen": [good, 0.0],
        "locality": {"near_gen": [1.0, None], "near_gen_content": ["a", "b"]},
        "portability": {},
        "probability": {},
        "metric_meta": meta,
    }
    cost = {"seconds": {"values": 0.5, "edit": 1.0}, "memory": {"cpu": 2**20 * (i + 1), "device": None}, "bytes": 10}
    return {
        "kind": "case",
        "case": i,
        "seed": 0,
        "step": i,
        "fact": f"f{i}",
        "post": post,
        "edits": [],
        "cost": cost,
    } | more


def run_of(name: str, schedule: str = "single", stays: bool = False, **protocol: str) -> Results:
    cases = [case(i, float(i % 2)) for i in range(10)]
    cases[3]["error"] = "It <diverged>."
    again = [
        {**case(i, 1.0 if i < end - 2 else 0.0), "kind": "checkpoint", "edited": end}
        for end in (5, 10)
        for i in range(end)
    ]
    read = {"before": {"median": 3.0}, "after": {"median": 4.0}, "alarm": None}
    about = [{"kind": "row", "preparation": 2.0, "latency": {"with": 0.003, "without": 0.001}, "perplexity": read}]
    method = RowResult(Row("ROME", "ROME"), 10, cases, again if stays else [], about, stays)
    prompt = RowResult(Row("ICE", "ICE", "", True), 12, cases[:2], [], [], stays)
    control = RowResult(Row("unedited", None, "unedited"), 10, cases, [], [], stays)
    header = {
        "model": {"name": "m", "fingerprint": "1"},
        "plan": {"data": "d", "data_hash": "2", "schedule": schedule},
        "protocol": {"schedule": schedule, "answers": "free", **protocol},
    }
    return Results(Path("runs") / name, header, [control, method, prompt], [])


def test_a_case_counts_once_however_many_probes_it_has() -> None:
    found = run_of("x").rows[1].headlines("post")
    assert found["reliability"] == Mean(0.5, 10, pytest.approx(0.1667, abs=1e-3))
    assert found["generalisation"].mean == 0.25
    assert found["generalisation"].n == 10
    assert found["locality"] == Mean(1.0, 10, 0.0)
    assert "portability" not in found
    assert str(Mean.of([1.0])) == "1.000"
    assert Mean.of([]) is None


def test_costs_are_those_of_edits_that_succeeded() -> None:
    cost = run_of("x").rows[1].cost()
    assert cost["edit"] == 1.0
    assert cost["memory_cpu"] == 10 * 2**20
    assert cost["preparation"] == 2.0
    assert cost["latency"] == pytest.approx(0.002)
    assert run_of("x").rows[0].cost().get("preparation") is None


def test_retention_and_the_first_and_last_edits() -> None:
    row = run_of("x", stays=True).rows[1]
    assert [(end, means["reliability"].mean) for end, means in row.retention()] == [(5, 0.6), (10, 0.8)]
    first, last = row.first_and_last()["at the end"]
    assert (first.mean, last.mean) == (1.0, 0.0)
    assert row.headlines("final")["reliability"].mean == 0.8


def test_runs_with_different_protocols_do_not_go_into_one_table() -> None:
    a, b = run_of("a"), run_of("b", prompts="chat template")
    check_comparable([a, run_of("c")])
    for make in (quality_sheets, markdown, page):
        with pytest.raises(UsageError, match=r"'runs/a' and 'runs/b' have different protocols.*chat template"):
            make([a, b])


def test_the_tables() -> None:
    (sheet,) = quality_sheets([run_of("x")])
    rows = {row[0]: dict(zip(sheet.columns, row, strict=True)) for row in sheet.rows}
    assert rows["ROME"]["reliability"] == "0.500 ± 0.167"
    assert rows["ROME"]["remarks"] == "1 failed"
    assert rows["ICE *"]["remarks"] == "answer in the context; unfinished: 2 of 12"
    assert rows["unedited"]["s per fact"] is None
    assert [rows[name]["perplexity"] for name in ("unedited", "ROME", "ICE *")] == ["3.000", "4.000", None]
    assert "row" not in sheet.numbers
    assert retention_sheet([run_of("x")]) is None
    assert cost_sheet([run_of("x")]).rows[1][0] == "ROME"
    assert any("stands in the context" in note for note in notes([run_of("x")]))
    two = quality_sheets([run_of("x", stays=True), run_of("y", stays=True)])
    assert [each.title for each in two] == ["Quality right after its edit", "Quality at the end"]
    assert two[0].columns[:2] == ("run", "row")


def test_markdown_and_csv() -> None:
    text = markdown([run_of("x", stays=True)])
    assert "| ROME | 10 | 0.500 ± 0.167 |" in text
    assert "- ROME, seed 0, case 3: It <diverged>." in text
    assert "## Retention" in text
    table = list(csv.DictReader(io.StringIO(as_csv([run_of("x", stays=True)]))))
    kinds = {line["kind"] for line in table}
    assert kinds == {"post", "final", "retention", "cost"}
    (line,) = (t for t in table if (t["row"], t["kind"], t["name"]) == ("ROME", "post", "rephrase_gen"))
    assert (float(line["mean"]), int(line["n"])) == (0.25, 10)
    assert "schedule: single" in line["protocol"]
    assert "lm.rephrase_gen" in line["protocol"]


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not {"src", "href"} & {name for name, _ in attrs}, "the page needs something else"
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else() -> None:
    run = run_of("x", stays=True)
    run.faults.append("THE NO-OP CONTROL FAILS")
    text = page([run])
    parsed = _Page()
    parsed.feed(text)
    assert not parsed.open
    assert parsed.tags.count("svg") == 5  # quality, retention, first and last, time, memory
    assert "url(" not in text
    assert not re.search(r"https?://", text)
    assert '<p class="fault">THE NO-OP CONTROL FAILS</p>' in text
    assert "It &lt;diverged&gt;." in text
    for svg in re.findall(r"<svg.*?</svg>", text, re.S):
        ElementTree.fromstring(svg)
    single = page([run_of("x"), run_of("y")])
    assert single.count("<svg") == 3
    assert "y: ROME" in single


def test_plots() -> None:
    dots = [Dot(f"row {i}", i, 1.0, 1.0, 0.5) for i in range(12)]
    drawn = ElementTree.fromstring(scatter(dots, "x", "y", "z"))
    heights = sorted(float(t.get("y", 0)) for t in drawn.iter("text") if (t.text or "").startswith("row"))
    assert all(b - a >= 14.9 for a, b in pairwise(heights))  # no label stands on another
    drawn = ElementTree.fromstring(scatter([Dot("a name of thirty-three characters", 0, 1.0, 1.0)], "x", "y", "z"))
    (label,) = [t for t in drawn.iter("text") if (t.text or "").startswith("a name")]
    assert float(label.get("x", 0)) + 6 * 33 < 640  # it is not cut off
    assert "a &lt; b" in lines([Track("a < b", 0, [(10, 0.5)])], "x", "y")
    assert ElementTree.fromstring(bars([Bar("a", [("keys", 0.0)])], "s")) is not None
    legend = bars([Bar("a", [("keys", 0.0), ("apply", 1.0)]), Bar("b", [("keys", 1.0), ("apply", 1.0)])], "s")
    assert legend.index(">keys</text>") < legend.index(">apply</text>"), "in the order of the parts"
    assert "ring: first" in pairs([Pair("a", 0, 0.1, 0.9)], "first", "last")


def invoke(*args: object, code: int = 0) -> Result:
    result = CliRunner().invoke(application(), [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.stderr
    return result


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the bundled model, made by the command."""
    folder = tmp_path_factory.mktemp("bench") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("easyeditor.bench.cost.TOKENS", 2)  # a measurement that says little and takes no time
        patch.setattr("easyeditor.bench.scoring.TEXTS", 2)
        said = invoke("bench", "--methods", "ice", "--n", 1, "--max-new-tokens", 4, "--out", folder)
    assert "ICE *" in said.stdout
    assert "answer in the context" in said.stdout
    return folder


def test_the_verbs(finished: Path, tmp_path: Path) -> None:
    assert {"run.json", "before.jsonl", "report.md", "report.csv", "report.html"} <= {
        p.name for p in finished.iterdir()
    }
    again = invoke("bench", "--methods", "ICE", "--n", 1, "--max-new-tokens", 4, "--out", finished, "--json")
    rows = json.loads(again.stdout)["runs"][0]["rows"]
    assert [row["row"] for row in rows][-2:] == ["ICE", "nonsense target (ICE)"]
    assert rows[0]["post"]["locality"]["mean"] == 1.0
    said = invoke("report", finished, "--out", tmp_path / "here")
    assert "Protocol: schedule: each fact edited alone" in said.stdout.replace("\n", " ")
    assert (tmp_path / "here" / "report.html").is_file()


def test_wrong_input_gets_a_sentence(finished: Path, tmp_path: Path) -> None:
    usual = ("--max-new-tokens", 4, "--out", tmp_path / "x")
    for args, told in (
        (("bench", "--methods", "ROMA", *usual), "There is no method 'ROMA'"),
        (("bench", "--methods", "ICE", "--schedule", "twice", *usual), "There is no schedule 'twice'"),
        (("bench", "--methods", "ICE", "--set", "k=1", *usual), "is not METHOD.KEY=VALUE"),
        (("bench", "--methods", "ICE", "--set", "ICE.kk=1", *usual), "no setting 'kk'"),
        (("bench", "--methods", "ICE", "--data", "nowhere.json", *usual), "nowhere.json"),
        (("bench", "--methods", "ICE", "--n", 2, "--out", finished), "holds another run: its n is 1, here it is 2"),
        (("report", tmp_path), "There is no run in"),
    ):
        assert told in " ".join(invoke(*args, code=2).stderr.split())
    assert not (tmp_path / "x").exists()
    assert by_method(["rome.v_lr=5e-1", "ROME.layers=[5]"]) == {"ROME": {"v_lr": "5e-1", "layers": [5]}}


def test_a_damaged_run_is_told(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"format": "easyeditor-run"')
    with pytest.raises(DamagedFile, match="not the file of a run"):
        Results.of(tmp_path)
    (tmp_path / "run.json").write_text(
        (finished / "run.json").read_text().replace('"format_version": 1', '"format_version": 9')
    )
    with pytest.raises(UsageError, match="newer version"):
        Results.of(tmp_path)


def test_a_probe_that_is_edited_itself_is_none() -> None:
    def line(i: int, step: int, near: list[str], **more: Any) -> dict[str, Any]:
        request = {"prompt": f"q{i}", "rephrase_prompt": [f"r{i}"], "locality": {"near": {"prompt": near}}}
        return case(i, 1.0, step=step, requested_rewrite=request) | more

    def counted(lines: list[dict[str, Any]]) -> list[list[float | None]]:
        return [each["post"]["locality"]["near_gen"] for each in lines]

    def both(i: int, step: int, near: list[str], **more: Any) -> dict[str, Any]:
        found = line(i, step, near, **more)
        found["post"]["locality"]["near_gen"] = [1.0, 0.0]
        return found

    cases = [both(0, 0, ["q1", "else"]), both(1, 0, ["r2", "else"]), both(2, 1, ["q0", "q3"]), both(3, 1, ["x", "y"])]
    again = [both(i, 0, [], kind="checkpoint", edited=end) for end in (2, 4) for i in range(end)]
    right_after, later = without_edited(cases, again, Schedule("sequential", 2))
    assert counted(right_after) == [[None, 0.0], [1.0, 0.0], [None, None], [1.0, 0.0]]
    assert counted(later) == [[None, 0.0], [1.0, 0.0], [None, 0.0], [None, 0.0], [None, None], [1.0, 0.0]]
    assert right_after[0]["post"]["locality"]["near_gen_content"] == ["a", "b"]
    (batch, _) = without_edited(cases, [], Schedule("batch", 2))
    assert counted(batch) == [[None, 0.0], [1.0, 0.0], [1.0, None], [1.0, 0.0]]
    (alone, _) = without_edited([{**each, "step": i} for i, each in enumerate(cases)], [], Schedule("single"))
    assert counted(alone) == [[1.0, 0.0]] * 4
    means = _scores_of(right_after[2]["post"])
    assert "locality.near_gen" not in means and means["rewrite_gen"] == 1.0
