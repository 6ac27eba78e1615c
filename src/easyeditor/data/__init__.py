"""Data sets: one file each, rows in, `EditRequest` out; no tokenizer and no model in sight."""

from __future__ import annotations

from easyeditor.data.akew import AKEWUnifiedDataset
from easyeditor.data.catalogue import DATA_SETS, DataSet, data_set
from easyeditor.data.cknowedit import CKnowEditDataset
from easyeditor.data.conceptedit import ConceptEditDataset
from easyeditor.data.conflictedit import ConflictEditDataset
from easyeditor.data.convsent import ConvSentDataset
from easyeditor.data.counterfact import CounterFactDataset
from easyeditor.data.files import load_requests, read_rows
from easyeditor.data.halluedit import HalluEditBenchDataset
from easyeditor.data.knowedit import KnowEditDataset, WikiRecentDataset
from easyeditor.data.longform import LongFormEditDataset
from easyeditor.data.mquake import MQuAKEDataset
from easyeditor.data.multitask import MultiTaskDataset
from easyeditor.data.personality import PersonalityDataset
from easyeditor.data.qaedit import QAEditDataset
from easyeditor.data.relations import RelationsDataset
from easyeditor.data.safeedit import SafetyDataset
from easyeditor.data.sanitation import SanitizationTrainDataset
from easyeditor.data.tinyfacts import TinyFacts
from easyeditor.data.unke import UnKEDataset
from easyeditor.data.wikibigedit import WikiBigEditDataset
from easyeditor.data.zsre import ZsreDataset

__all__ = [
    "DATA_SETS",
    "AKEWUnifiedDataset",
    "CKnowEditDataset",
    "ConceptEditDataset",
    "ConflictEditDataset",
    "ConvSentDataset",
    "CounterFactDataset",
    "DataSet",
    "HalluEditBenchDataset",
    "KnowEditDataset",
    "LongFormEditDataset",
    "MQuAKEDataset",
    "MultiTaskDataset",
    "PersonalityDataset",
    "QAEditDataset",
    "RelationsDataset",
    "SafetyDataset",
    "SanitizationTrainDataset",
    "TinyFacts",
    "UnKEDataset",
    "WikiBigEditDataset",
    "WikiRecentDataset",
    "ZsreDataset",
    "data_set",
    "load_requests",
    "read_rows",
]
