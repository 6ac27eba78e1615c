"""The benchmark of scoring runs at a small size, and both ways give the same answers; nothing is timed."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks"


def test_scoring(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("COLUMNS", "170")
    monkeypatch.delenv("EASYEDITOR_DATA", raising=False)
    with torch.random.fork_rng():
        script = importlib.import_module("scoring")
        script.main(["--tiny", "--facts", "1", "--threads", "1", "--batch-size", "8"])
    printed = capsys.readouterr().out
    found = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line.startswith("│")]
    cells = {row[0]: row[1] for row in found}
    assert cells["free answers that differ"] == cells["readings whose likeliest tokens differ"] == "0"
    assert float(cells["largest difference of a log-probability"]) < 1e-3
    assert int(cells["free answers asked for"]) > 0 and float(cells["one at a time over ours"]) > 0
    for name in [name for name in sys.modules if name in ("scoring", "run")]:
        monkeypatch.delitem(sys.modules, name)
