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

os.environ["EASYEDITOR_CACHE"] = tempfile.mkdtemp(prefix="easyeditor-")
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
    if "EASYEDITOR_TAUGHT" not in os.environ:  # the processes that this one starts share the models it teaches
        folder = os.environ["EASYEDITOR_TAUGHT"] = tempfile.mkdtemp(prefix="easyeditor-taught-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--runslow", action="store_true", help="run the tests marked slow as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:  # of two processes, one gets all that shares a taught model
        family = getattr(item, "callspec", None) and item.callspec.params.get("lm")
        item.add_marker(pytest.mark.xdist_group(family if isinstance(family, str) else item.path.name))
    if config.getoption("--runslow"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if "slow" not in item.keywords]


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["EASYEDITOR_CACHE"], ignore_errors=True)
