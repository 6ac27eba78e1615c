"""The keys of a fact: what a projection takes in at the subject's last token, over contexts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from easyeditor.core.prompts import fact_row
from easyeditor.lm.clock import spent
from easyeditor.lm.hooks import by_row, capture, stop_after
from easyeditor.lm.model import LM
from easyeditor.lm.structure import Site
from easyeditor.lm.text import pad
from easyeditor.requests import EditRequest


@spent("keys")
@torch.no_grad()
def keys(lm: LM, request: EditRequest, sites: Sequence[Site], contexts: Sequence[str]) -> dict[str, Tensor]:
    """The key of each context at each site, in one pass that ends after the last site.

    Nothing after the subject is run: a causal model cannot have seen it.

    Args:
        lm: The model.
        request: The fact.
        sites: Projections, lowest first.
        contexts: Texts with ``{}`` where the prompt goes.

    Returns:
        Weight name -> (contexts, d_in), in fp32.
    """
    rows = [fact_row(lm, request, context) for context in contexts]
    ids, mask = pad([row.ids[: row.subject + 1] for row in rows], lm.text.pad_id, "right", lm.device)
    at = torch.arange(len(rows)), torch.tensor([row.subject for row in rows])
    captures = [(site, capture(site.module, "input")) for site in sites]
    seen = [(site, context.__enter__()) for site, context in captures]
    try:
        with stop_after(sites[-1].module):
            lm.run(ids, mask)
    finally:
        for _, context in captures:
            context.__exit__(None, None, None)
    return {site.weight_name: by_row(states[0], len(rows), lm.sequence_first)[at].float() for site, states in seen}


def mean_key(lm: LM, request: EditRequest, site: Site, contexts: Sequence[str]) -> Tensor:
    """k*: the mean of a fact's keys over its contexts, (d_in,), fp32. ROME, equation 3."""
    return keys(lm, request, [site], contexts)[site.weight_name].mean(dim=0)
