"""Second moments of what projections take in: C = E[k k^T], for all layers in one pass over a text corpus.

The cache on disk is keyed by content: the weights up to the site, the tokenizer, the corpus, the length and the count.
Two models in folders of one name can not share it, and a changed model can not use what was computed before.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from easyeditor.edits.edit import tensor_bytes
from easyeditor.errors import DamagedFile, UsageError
from easyeditor.lm.hooks import by_row, capture, stop_after
from easyeditor.lm.model import LM
from easyeditor.lm.structure import Site
from easyeditor.lm.text import pad

log = logging.getLogger(__name__)

ENOUGH = 10  # tokens per dimension after which more change nothing; arXiv:2506.04226

HUB_CORPORA = ("wikipedia", "wikitext")  # what settings files of existing tools name

Corpus = Iterable[str] | str | Path


@dataclass(frozen=True)
class Moment:
    """The second moment of what a site takes in.

    Args:
        matrix: C, (d_in, d_in), fp32.
        count: Over how many tokens.
    """

    matrix: Tensor
    count: int


def second_moments(
    lm: LM,
    sites: Sequence[Site],
    corpus: Corpus,
    *,
    samples: int = 100_000,
    max_length: int = 1024,
    batch_tokens: int = 4096,
    cache_dir: str | Path | None = None,
) -> dict[str, Moment]:
    """C of each site, from one pass over a corpus that serves all sites.

    Args:
        lm: The model.
        sites: Projections.
        corpus: Texts, a text file (one document per line), or ``tinyfacts`` for the bundled model's.
        samples: How many texts at most.
        max_length: Texts are cut to so many tokens, however many more the model can read.
        batch_tokens: Tokens per forward pass.
        cache_dir: Where results are kept; None: nowhere.

    Returns:
        Weight name -> moment.

    Raises:
        UsageError: The corpus is empty or cannot be read.
        DamagedFile: A cached file is not what its name says.
    """
    texts = list(itertools.islice(read_corpus(corpus), samples))
    if not texts:
        raise UsageError(
            "The corpus for the second moments has no text. Set mom2_dataset to a text file, one per line."
        )
    max_length = min(max_length, _positions(lm) or max_length)
    ordered = sorted(sites, key=lambda site: lm.block_of(site))
    keys = {site.weight_name: _content_key(lm, site, texts, max_length) for site in ordered} if cache_dir else {}
    found = {name: moment for name, key in keys.items() if (moment := _read(Path(cache_dir or "."), key)) is not None}
    missing = [site for site in ordered if site.weight_name not in found]
    if missing:
        for name, moment in _collect(lm, missing, texts, max_length, batch_tokens).items():
            found[name] = moment
            if cache_dir:
                _write(Path(cache_dir), keys[name], moment)
    return found


def read_corpus(corpus: Corpus) -> Iterator[str]:
    """The texts of a corpus that are not empty.

    Raises:
        UsageError: It names neither a file nor a data set that can be had here.
    """
    if not isinstance(corpus, str | Path):
        return (text for text in corpus if text.strip())
    bundled = files("easyeditor") / str(corpus) / "corpus.txt"
    path = bundled if str(corpus).isidentifier() and bundled.is_file() else Path(corpus)
    if path.is_file():
        lines = path.read_bytes().decode("utf-8", "replace").splitlines()
        return (line for line in lines if line.strip())
    if corpus in HUB_CORPORA:
        log.warning("The corpus '%s' would have to be fetched; the bundled prose stands in for it.", corpus)
        return read_corpus("texts")
    raise UsageError(
        f"The corpus '{corpus}' is not a text file here. Set mom2_dataset to a text file with one document per line "
        "(a few MB of ordinary prose are enough), or set mom2_adjustment to false."
    )


def _positions(lm: LM) -> int:
    """How many positions the model knows, as far as it says."""
    config: Any = getattr(lm.model, "config", None)
    inner = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(getattr(inner, "max_position_embeddings", None) or 0)


def _collect(
    lm: LM, sites: Sequence[Site], texts: Sequence[str], max_length: int, batch_tokens: int
) -> dict[str, Moment]:
    sums = {site.weight_name: torch.zeros(site.d_in, site.d_in, dtype=torch.float64) for site in sites}
    rows = sorted((lm.text.encode(text).ids[:max_length] for text in texts), key=len)
    batches = list(_batches(rows, batch_tokens))
    count = sum(len(row) for row in rows)
    widest = max(site.d_in for site in sites)
    if count < ENOUGH * widest:
        log.warning(
            "The corpus has %d tokens for second moments of width %d; %d and more make them well-conditioned.",
            count,
            widest,
            ENOUGH * widest,
        )
    console = Console(stderr=True)
    for batch in track(batches, "statistics", console=console, disable=not console.is_terminal, transient=True):
        ids, mask = pad(batch, lm.text.pad_id, "right", lm.device)
        with torch.no_grad(), ExitStack() as stack:
            stack.enter_context(stop_after(sites[-1].module))
            seen = {site.weight_name: stack.enter_context(capture(site.module, "input")) for site in sites}
            lm.run(ids, mask)
        for site in sites:
            states = by_row(seen[site.weight_name][0], len(ids), lm.sequence_first)
            kept = states[mask.bool().to(states.device)].float()
            sums[site.weight_name] += (kept.T @ kept).double().cpu()
    return {name: Moment((total / count).float(), count) for name, total in sums.items()}


def _batches(rows: Sequence[tuple[int, ...]], batch_tokens: int) -> Iterator[list[tuple[int, ...]]]:
    """Rows of similar length whose padded size stays within the budget."""
    batch: list[tuple[int, ...]] = []
    for row in rows:
        if batch and (len(batch) + 1) * max(len(row), len(batch[-1])) > batch_tokens:
            yield batch
            batch = []
        if row:
            batch.append(row)
    if batch:
        yield batch


def _content_key(lm: LM, site: Site, texts: Sequence[str], max_length: int) -> str:
    """A hash of everything that the moment of a site depends on."""
    digest = hashlib.sha256(f"{site.name}|{max_length}|{len(texts)}|{lm.dtype}".encode())
    top = lm.block_of(site)
    for name, parameter in lm.model.named_parameters():
        tail = name.removeprefix(f"{lm.stack}.")
        if tail == name or int(tail.split(".")[0]) <= top:
            digest.update(name.encode())
            digest.update(tensor_bytes(parameter))
    for text in texts:
        digest.update(repr(lm.text.encode(text).ids[:max_length]).encode())
    return digest.hexdigest()[:32]


def _read(folder: Path, key: str) -> Moment | None:
    path = folder / f"{key}.safetensors"
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            if meta.get("key") != key:
                raise DamagedFile(
                    f"The statistics file '{path}' holds {meta.get('key')}, expected {key}. Delete it; it is made anew."
                )
            return Moment(file.get_tensor("moment"), int(meta["count"]))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise DamagedFile(f"The statistics file '{path}' is damaged ({error}). Delete it; it is made anew.") from None


def _write(folder: Path, key: str, moment: Moment) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{key}.partial"
    save_file({"moment": moment.matrix}, temporary, metadata={"key": key, "count": json.dumps(moment.count)})
    temporary.replace(folder / f"{key}.safetensors")
