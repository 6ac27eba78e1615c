"""Data sets: one file each, rows in, `EditRequest` out; no tokenizer and no model in sight."""

from __future__ import annotations

from easyeditor.data.counterfact import CounterFactDataset
from easyeditor.data.files import load_requests, read_rows
from easyeditor.data.tinyfacts import TinyFacts
from easyeditor.data.zsre import ZsreDataset

__all__ = ["CounterFactDataset", "TinyFacts", "ZsreDataset", "load_requests", "read_rows"]
