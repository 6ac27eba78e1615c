"""The benchmark scripts of the closed-form family run at small sizes and print their tables; nothing is timed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def script(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A script as a module; the global random state and what it imported are as before afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("COLUMNS", "170")
    with torch.random.fork_rng():
        yield importlib.import_module(request.param)
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == FOLDER:
            del sys.modules[name]


def run(script: ModuleType, arguments: str) -> None:
    script.main([*arguments.split(), "--threads", "1"])


def rows(printed: str) -> dict[str, list[str]]:
    """The cells of a table by the first of each row."""
    found = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line.startswith("│")]
    return {row[0]: row[1:] for row in found}


@pytest.mark.parametrize("script", ["solve"], indirect=True)
def test_solve(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    run(script, "--d-in 96 --d-out 64 --facts 10 --past 3 --many 30 --repeats 1")
    printed = capsys.readouterr().out
    assert printed.count("dense LU in fp64, s") == 2
    assert float(rows(printed)["One fact out of 30, by down-dating, s"][0]) >= 0


@pytest.mark.parametrize("script", ["solve"], indirect=True)
def test_what_solve_compares_is_the_same_update(script: ModuleType) -> None:
    torch.manual_seed(0)
    moment, root = script.covariance(96)
    eigenvalues = torch.linalg.eigvalsh(moment)
    assert float(eigenvalues[-1] / eigenvalues[0]) == pytest.approx(1e6, rel=1e-3)
    batch, past = script.facts(root, 64, 10), [script.facts(root, 64, 10).keys for _ in range(3)]
    report = script.Report()
    system = script.memit(report, moment, batch, 1)
    script.taking_back(report, system, script.facts(root, 64, 30), 1)
    script.alphaedit(report, moment, batch, past, 1)
    differences = [float(value) for name, value, _ in report.rows if "in fp64" in name and "relative" in name]
    stored = [float(value) for name, value, _ in report.rows if "stored" in name]
    assert len(differences) == len(stored) == 3
    assert max(differences) < 1e-9 < max(stored) < 1e-5


@pytest.mark.parametrize("script", ["family"], indirect=True)
def test_family(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    run(script, "--tiny --facts 2 --memory --repeats 1")
    found = rows(capsys.readouterr().out)
    for facts in ("1 fact", "2 facts"):
        for part in ("the whole edit, 20 steps", "values", "keys", "solve", "apply", "record"):
            assert float(found[f"AlphaEdit, {facts}: {part}"][0]) >= 0
            assert float(found[f"MEMIT, {facts}: {part}"][0]) >= 0


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is known on Linux")
@pytest.mark.parametrize("script", ["family"], indirect=True)
def test_memory_of_a_family_edit(script: ModuleType, tmp_path: Path) -> None:
    found = script.memory("MEMIT", 2, str(tmp_path), True, 1)
    parameters = sum(p.numel() for p in script.model(True).model.parameters())
    assert found.model == 4 * parameters
    assert found.keys == 4 * 2 * 2 * (4 * 32)  # fp32, two facts, two blocks, d_in
    assert found.residuals == 4 * 2 * 2 * 32
    assert found.edit == 2 * (found.keys + found.residuals) + 2 * 8 * 2 * 2  # with the factors of D and of its systems
    assert found.state >= 2 * (4 + 8) * 128**2  # C in fp32 and its factor in fp64
    assert found.peak >= 0


@pytest.mark.parametrize("script", ["family"], indirect=True)
def test_made_up_facts_are_about_different_people(script: ModuleType) -> None:
    subjects = [request.subject for request in script.made_up(1000)]
    assert len(set(subjects)) == 1000
    assert len({request.target_new for request in script.made_up(50)}) == 50


@pytest.mark.parametrize("script", ["stream"], indirect=True)
def test_stream(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    run(script, "--edits 2 --ends 1 --steps 4 --tokens 2048")
    found = rows(capsys.readouterr().out)
    for name in ("MEMIT", "AlphaEdit"):
        edits, had, failed = map(int, found[name][-3:])
        assert edits + had + failed == 2
    requests = script.facts(1000)
    assert len({(request.prompt, request.target_new) for request in requests}) == 1000


@pytest.mark.parametrize("script", ["gpu"], indirect=True)
def test_gpu_on_a_small_model(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    run(script, "--tiny --device cpu --batches 2 --repeats 1")
    found = rows(capsys.readouterr().out)
    for name in ("ROME, 1 fact", "MEMIT, 2 facts", "AlphaEdit, 2 facts"):
        seconds, _, memory, _, published, target = found[name]
        assert float(seconds) > 0
        assert memory == "not measured"
        assert published == target == ""


@pytest.mark.parametrize("script", ["gpu"], indirect=True)
def test_gpu_without_the_device(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run(script, "")
    found = rows(capsys.readouterr().out)
    assert len([name for name in found if "fact" in name]) == 7
    assert all(cells[:3] == ["not measured"] * 3 for cells in found.values())


@pytest.mark.slow
@pytest.mark.parametrize("script", ["malmen"], indirect=True)
def test_malmen(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = "--learn 40 --set loc_coef=0.5 --iterations 2"
    run(script, f"{settings} --facts 20 --most 30 --memory 10 --out {tmp_path / 'archive'}")
    found = rows(capsys.readouterr().out)
    assert float(found["20 facts, reliability"][0].split()[0]) >= 0.5
    assert found["peak of an edit of 10, MB"][0] != ""
