"""Comparing methods: schedules, resumable runs with their controls and costs, tables and pages."""

from __future__ import annotations

from easyeditor.bench.experiment import run
from easyeditor.bench.results import Results

__all__ = ["Results", "run"]
