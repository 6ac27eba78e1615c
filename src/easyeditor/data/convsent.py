"""ConvSent (Mitchell et al., ICML 2022, arXiv:2206.06520), in KnowEdit: the sentiment towards a topic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from easyeditor.data.dataset import RecordDataset
from easyeditor.data.personality import opinion, with_others
from easyeditor.data.records import Layout
from easyeditor.requests import EditRequest

SIDES = ("pos", "neg")


def _convert(row: Mapping[str, Any], record: str) -> EditRequest:
    """Make a request of a record; the two sides are the target in turn."""
    side = SIDES[row["place"] % 2]
    return opinion(row, side, SIDES[1 - row["place"] % 2], record)


CONVSENT = Layout("ConvSent", lambda row: {"ent", "pos", "neg"} <= row.keys(), _convert, parts=with_others)


class ConvSentDataset(RecordDataset):
    """ConvSent: every other record is edited to be liked, the others to be disliked; each item is a request dict."""

    layout = CONVSENT
