"""What every test shares: one thread, no network, and the option that lets slow tests run."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.pop("COLUMNS", None)  # tables are as wide as they are without a terminal
os.environ["OMP_NUM_THREADS"] = "1"  # also for the processes that tests start

import torch

torch.set_num_threads(1)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Any], Path]:
    """Write a text, or anything else as JSON, to a file in a folder of its own."""

    def put(name: str, content: Any) -> Path:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return put


def pytest_configure(config: pytest.Config) -> None:
    if "EASYEDITOR_TAUGHT" in os.environ:
        return
    # the processes that this one starts share the models that are taught, and the statistics
    for name in ("EASYEDITOR_TAUGHT", "EASYEDITOR_CACHE"):
        folder = os.environ[name] = tempfile.mkdtemp(prefix=f"{name.lower()}-")
        config.add_cleanup(lambda folder=folder: shutil.rmtree(folder, ignore_errors=True))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--runslow", action="store_true", help="run the tests marked slow as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name != "test_toy.py")  # first what teaches: see there
    if config.getoption("--runslow"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if "slow" not in item.keywords]
