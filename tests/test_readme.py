"""What the README and the generated pages say is so."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from easyeditor.cli import application

ROOT = Path(__file__).parents[1]
SHORTER = {  # one fact tells whether a command runs; the training would take twenty minutes
    "eval": ["--limit", "1"],
    "bench": ["--n", "1"],
    "train": ["--limit", "30", "--set", "max_iters=4", "--set", "val_interval=2"],
}


def blocks(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_the_python_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = blocks("python")
    assert len(example.strip().splitlines()) <= 15
    exec(compile(example, "README.md", "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out
    assert "Rome" in printed
    assert "Berlin" in printed


def test_the_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("easyeditor.bench.cost.TOKENS", 2)  # a measurement that says little and takes no time
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("easyedit ")]
    assert len(lines) >= 6
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        result = CliRunner().invoke(application(), words + SHORTER.get(words[0], []))
        assert result.exit_code == 0, f"{line}\n{result.output}"


def test_the_generated_pages_are_fresh(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "100")  # as the script sets it: taken back afterwards
    monkeypatch.setattr(sys, "argv", ["make_docs.py", "--check"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "tools" / "make_docs.py"), run_name="__main__")
    assert ended.value.code == 0, capsys.readouterr().err
