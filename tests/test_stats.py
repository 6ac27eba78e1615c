"""Second moments: against the plain mean, where they stop, what their files say, and how a pass goes on."""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner, Result

import toy
from easyeditor.cli import application
from easyeditor.cli.stats import numbers
from easyeditor.core.stats import Moment, read_corpus, second_moments
from easyeditor.errors import DamagedFile, MissingExtra, NonFinite, UsageError, WrongBase
from easyeditor.lm.hooks import capture
from easyeditor.lm.model import LM

CORPUS = toy.corpus()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's cache of this test alone."""
    monkeypatch.setenv("EASYEDITOR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "stats"


def plain_moment(lm: LM, layer: int, texts: list[str], length: int = 1024) -> tuple[Tensor, int]:
    site, total, count = lm.mlp_out(layer), torch.zeros(()), 0
    for text in texts:
        ids = torch.tensor([lm.text.encode(text).ids[:length]])
        more = {"decoder_input_ids": torch.cat([torch.zeros_like(ids[:, :1]), ids[:, :-1]], 1)} if lm.seq2seq else {}
        with torch.no_grad(), capture(site.module, "input") as seen:
            lm.model(ids, **more)
        states = seen[0].reshape(-1, site.d_in).double()
        total, count = total + states.T @ states, count + len(states)
    return total / count, count


def near(a: Tensor, b: Tensor, bound: float = 1e-5) -> bool:
    return float((a.double() - b.double()).abs().max()) <= bound * float(b.abs().max())


@contextmanager
def counted(lm: LM, layer: int = 0) -> Iterator[list[int]]:
    """The lengths of what a block sees, pass by pass."""
    seen: list[int] = []
    handle = lm.blocks[layer].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    yield seen
    handle.remove()


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def one(lm: LM, corpus: Any = None, layer: int = 1, **more: Any) -> Moment:
    return second_moments(lm, [lm.mlp_out(layer)], CORPUS[:40] if corpus is None else corpus, **more)[
        lm.weight_name(layer)
    ]


# ---- what is collected


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "neox", "t5"])
def test_they_are_the_plain_mean_over_tokens(family: str) -> None:
    lm, texts = toy.build(family), [*CORPUS[:20], "ada", "bo su is"]
    layers = range(len(lm.blocks))
    found = second_moments(lm, [lm.mlp_out(i) for i in reversed(layers)], texts, batch_tokens=100)
    for layer in layers:
        expected, count = plain_moment(lm, layer, texts)
        moment = found[lm.weight_name(layer)]
        assert moment.count == count
        assert moment.matrix.dtype == torch.float32
        assert near(moment.matrix, expected)
        assert torch.equal(moment.matrix, moment.matrix.T)


def test_sites_of_attention_and_mlp_come_together() -> None:
    lm = toy.build("llama")
    found = second_moments(lm, [lm.mlp_out(1), lm.attn_out(1)], CORPUS[:9])
    site = lm.attn_out(1)
    with torch.no_grad(), capture(site.module, "input") as seen:
        for text in CORPUS[:9]:
            lm.model(torch.tensor([lm.text.encode(text).ids]))
    keys = torch.cat([states[0] for states in seen])
    assert near(found[site.weight_name].matrix, keys.T @ keys / len(keys))


def test_all_layers_come_from_one_pass(tmp_path: Path) -> None:
    lm = toy.build("llama")
    with counted(lm) as low, counted(lm, 3) as high:
        second_moments(lm, [lm.mlp_out(0)], CORPUS[:40], batch_tokens=300, cache_dir=tmp_path / "a")
        alone = len(low)
        assert alone > 3
        second_moments(lm, [lm.mlp_out(i) for i in range(3)], CORPUS[:40], batch_tokens=300, cache_dir=tmp_path / "b")
        assert len(low) == 2 * alone
        assert not high, "nothing above the sites is run"


def test_only_so_many_texts_and_tokens_are_read() -> None:
    lm = toy.build("llama")
    some = one(lm, CORPUS, samples=7)
    expected, count = plain_moment(lm, 1, CORPUS[:7])
    assert some.count == count
    assert near(some.matrix, expected)
    short = one(lm, CORPUS[:7], max_length=5)
    expected, count = plain_moment(lm, 1, CORPUS[:7], 5)
    assert short.count == count == 35
    assert near(short.matrix, expected)


def test_the_tokens_are_as_many_as_were_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    lm = toy.build("llama")
    with caplog.at_level(logging.INFO, "easyeditor"):
        assert one(lm, CORPUS, tokens=101, batch_tokens=50).count == 101
    assert "ended after 101 tokens: as many tokens as were asked for" in caplog.text


def test_ten_tokens_per_dimension_are_enough() -> None:
    lm = toy.build("llama")
    assert one(lm, itertools.cycle(CORPUS), samples=1000, tolerance=0.0).count == 10 * 256


def test_a_pass_ends_when_the_moment_has_converged(caplog: pytest.LogCaptureFixture) -> None:
    """A corpus of one text knows its moment after a round; a tolerance of zero reads on all the same."""
    lm, texts = toy.build("llama"), [CORPUS[0]] * 1000
    with caplog.at_level(logging.INFO, "easyeditor"):
        found = one(lm, texts, tokens=5000, batch_tokens=500)
    assert 4 * 256 <= found.count < 2000
    assert "changed by less than 0.01" in caplog.text
    assert near(found.matrix, plain_moment(lm, 1, texts[:1])[0], 0.02)
    assert one(lm, texts, tokens=5000, batch_tokens=500, tolerance=0.0).count == 5000


def test_a_long_claim_does_not_make_long_texts() -> None:
    """Some models claim 131072 positions; texts are cut to max_length all the same."""
    lm = toy.build("llama")
    lm.model.config.max_position_embeddings = 131072
    with counted(lm) as lengths:
        assert one(lm, [" ".join(CORPUS)]).count == max(lengths) == 1024


def test_a_short_claim_is_respected() -> None:
    """A model with 128 learnt positions cannot read further."""
    assert one(toy.build("gpt2"), [" ".join(CORPUS)]).count == 128


def test_texts_are_not_read_ahead(tmp_path: Path) -> None:
    """Nothing behind the tokens that are wanted is turned into tokens."""
    lm, asked = toy.build("llama"), 0
    encode = lm.text.encode

    def counting(text: str) -> Any:
        nonlocal asked
        asked += 1
        return encode(text)

    lm.text.encode = counting  # type: ignore[method-assign]
    one(lm, CORPUS, tokens=100)
    assert asked < 10


def test_few_tokens_are_said(caplog: pytest.LogCaptureFixture) -> None:
    one(toy.build("llama"), CORPUS[:3])
    assert "tokens for second moments of width 256; 2560" in caplog.text


def test_the_result_has_the_dtype_that_was_asked_for() -> None:
    lm = toy.build("llama")
    double = one(lm, dtype="float64")
    assert double.matrix.dtype == torch.float64
    assert torch.equal(double.matrix.float(), one(lm).matrix)
    with pytest.raises(UsageError, match="float32 or float64, not 'float16'"):
        one(lm, dtype="float16")
    with pytest.raises(UsageError, match="number of tokens"):
        one(lm, tokens=0)


def test_many_keys_are_multiplied_in_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lm = toy.build("llama")
    whole = one(lm)
    monkeypatch.setattr("easyeditor.core.gram.BUFFER", 4 * 256 * 7)
    assert near(one(lm, cache_dir=tmp_path / "parts").matrix, whole.matrix, 1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_model_with_undefined_states_is_refused(bad: float, cache: Path) -> None:
    lm = toy.build("llama")
    with torch.no_grad():
        lm.mlp_out(0).weight[0, 0] = bad
    with pytest.raises(NonFinite, match=r"is not finite.*Load it in float32"):
        one(lm)
    assert not files_in(cache)


# ---- text sources


def test_a_corpus_is_a_file_or_texts(tmp_path: Path) -> None:
    lm = toy.build("llama")
    text, lines = tmp_path / "corpus.txt", tmp_path / "corpus.jsonl"
    text.write_text("\n\n".join(CORPUS[:5]) + "\n  \n")
    lines.write_text("\n".join(json.dumps({"text": each, "id": 3}) for each in CORPUS[:5]) + "\n")
    given = one(lm, iter([*CORPUS[:5], " "])).matrix
    assert torch.equal(one(lm, text).matrix, given)
    assert torch.equal(one(lm, str(lines)).matrix, given)
    assert list(read_corpus(lines)) == list(read_corpus(text)) == CORPUS[:5]
    assert len(list(itertools.islice(read_corpus("tinyfacts"), 50))) == 50


@pytest.mark.parametrize("line", ['{"prompt": "ada"}', "ada ra", '{"text": 3}', "[1]"])
def test_a_wrong_line_is_named(line: str, tmp_path: Path) -> None:
    file = tmp_path / "corpus.jsonl"
    file.write_text(f'{{"text": "{CORPUS[0]}"}}\n{line}\n')
    with pytest.raises(UsageError, match=r"corpus.jsonl', line 2: expected an object with a field 'text'"):
        one(toy.build("llama"), file)


def test_no_statistics_and_no_text_is_one_sentence(tmp_path: Path) -> None:
    lm = toy.build("llama")
    for nothing in ([], ["", " "], ""):
        with pytest.raises(UsageError, match=r"no statistics.*mom2_dataset.*stats_dir.*mom2_adjustment"):
            one(lm, nothing)
    with pytest.raises(UsageError, match=r"no statistics.*mom2_dataset"):
        second_moments(lm, [lm.mlp_out(0)])
    with pytest.raises(UsageError, match=r"'no_such_text' is not a text file.*mom2_dataset.*mom2_adjustment"):
        one(lm, "no_such_text")
    with pytest.raises(UsageError, match="Text 1 of the corpus is a dict"):
        one(lm, ["ada", {"text": "bo"}])


def without_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)


def test_a_data_set_needs_the_extra(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    without_datasets(monkeypatch)
    with pytest.raises(MissingExtra, match=re.escape("pip install 'easyeditor[data]'")):
        one(toy.build("llama"), "somebody/prose")
    assert next(read_corpus("wikipedia")) == next(read_corpus("texts"))
    assert "bundled prose stands in" in caplog.text
    assert "easyeditor[data]" in caplog.text


def test_a_data_set_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Client:
        @staticmethod
        def load_dataset(*args: Any, **kwargs: Any) -> Any:
            asked.append((args, kwargs))
            if args[0] == "no/such":
                raise ConnectionError("not found on the hub.\nmore")
            return ({"text": text} for text in ["", *CORPUS])

    monkeypatch.setitem(sys.modules, "datasets", Client)
    assert list(itertools.islice(read_corpus("wikipedia"), 3)) == CORPUS[:3]
    assert asked == [(("wikimedia/wikipedia", "20231101.en"), {"split": "train", "streaming": True})]
    assert next(read_corpus("a/b:c")) == CORPUS[0]
    assert asked[1][0] == ("a/b", "c")
    with pytest.raises(UsageError, match=r"'no/such' cannot be fetched as a data set: not found on the hub\. Correct"):
        read_corpus("no/such")


# ---- files


def test_files_lie_where_existing_tools_look(tmp_path: Path) -> None:
    lm = LM.wrap(toy.build("llama").model, toy.tokenizer(), name="some/where/gpt-toy")
    corpus = tmp_path / "prose.txt"
    corpus.write_text("\n".join(CORPUS))
    found = second_moments(lm, [lm.mlp_out(i) for i in (0, 2)], corpus, tokens=400, cache_dir=tmp_path / "out")
    folder = tmp_path / "out" / "gpt-toy" / "prose_stats"
    name = f"{lm.mlp_out(2).name}_float32_mom2_400.safetensors"
    assert found[lm.weight_name(2)].file == folder / name
    assert len(files_in(tmp_path / "out")) == 2, "nothing else is left"
    with safe_open(folder / name, framework="pt") as file:
        meta = file.metadata()
    assert {"weights", "tokenizer", "corpus", "max_length", "tokens", "samples", "dtype", "count"} <= set(meta)
    assert (meta["tokens"], meta["count"], meta["dtype"], meta["max_length"]) == ("400", "400", "float32", "128")


def test_what_was_collected_is_found_again(cache: Path) -> None:
    lm = toy.build("llama")
    first = one(lm)
    assert files_in(cache) == [first.file]
    with counted(lm) as passes:
        again = one(lm)
        assert not passes
        two = second_moments(lm, [lm.mlp_out(1), lm.mlp_out(2)], CORPUS[:40])
        assert passes, "the other layer was not there"
    assert again.count == first.count
    assert torch.equal(again.matrix, first.matrix)
    assert torch.equal(two[lm.weight_name(1)].matrix, first.matrix)
    lm.tokenizer(["ada", "bo su is"], padding=True, truncation=True, max_length=3)
    with counted(lm) as passes:
        one(lm)
        assert not passes, "what a call leaves behind in a tokenizer does not matter"


def test_two_models_of_one_name_do_not_share(cache: Path) -> None:
    a, b = toy.build("llama"), toy.build("llama", seed=1)
    first, second = one(a), one(b)
    assert a.name == b.name
    assert len(files_in(cache)) == 2
    assert not torch.equal(first.matrix, second.matrix)


def test_only_weights_that_matter_are_in_the_key() -> None:
    lm = toy.build("llama")
    before = {layer: one(lm, layer=layer) for layer in (0, 1, 2)}
    with torch.no_grad():
        lm.mlp_out(1).weight[0, 0] += 1.0
    after = {layer: one(lm, layer=layer) for layer in (0, 1, 2)}
    for layer in (0, 1):
        assert after[layer].file == before[layer].file, "an edit of a site does not change what it takes in"
    assert after[2].file != before[2].file
    assert not torch.equal(after[2].matrix, before[2].matrix)


def test_statistics_of_something_else_are_refused(tmp_path: Path) -> None:
    corpus, out = tmp_path / "prose.txt", tmp_path / "out"
    corpus.write_text("\n".join(CORPUS[:40]))
    lm, other = toy.build("llama"), toy.build("llama", seed=1)
    kept = one(lm, corpus, cache_dir=out)
    assert kept.file is not None
    with safe_open(kept.file, framework="pt") as file:
        meta = file.metadata()

    def refused(lm: LM = lm, **more: Any) -> str:
        with pytest.raises(WrongBase, match="Delete the file, or set another stats_dir") as caught:
            one(lm, corpus, cache_dir=out, **more)
        assert str(kept.file) in str(caught.value)
        return str(caught.value)

    told = refused(other)
    assert re.search(f"asked for: weights {meta['weights']} there, [0-9a-f]+ here. Delete", told)
    assert "max_length 128 there, 6 here" in refused(max_length=6)
    assert "samples 100000 there, 9 here" in refused(samples=9)
    cut = LM.wrap(lm.model, toy.tokenizer(bos=False), name=lm.name)
    assert re.search(f"tokenizer {meta['tokenizer']} there, [0-9a-f]+ here", refused(cut))
    corpus.write_text("\n".join(CORPUS[:41]))
    assert re.search(f"corpus {meta['corpus']} there, [0-9a-f]+ here", refused())


def _cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _garbage(path: Path) -> None:
    path.write_bytes(b"no tensors here, and not a word about them")


def _one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(bytes(content))


def _without_count(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        meta = file.metadata()
    del meta["count"]
    save_file(load_file(path), path, metadata=meta)


def _without_keys(path: Path) -> None:
    save_file(load_file(path), path)


@pytest.mark.parametrize("damage", [_cut_off, _garbage, _one_bit, _without_count, _without_keys])
def test_a_damaged_file_is_named(damage: Any, tmp_path: Path) -> None:
    lm = toy.build("llama")
    one(lm, cache_dir=tmp_path / "out")
    (path,) = files_in(tmp_path / "out")
    damage(path)
    with pytest.raises(DamagedFile, match="Delete it; it is made anew") as caught:
        one(lm, cache_dir=tmp_path / "out")
    assert str(path) in str(caught.value)
    path.unlink()
    assert one(lm, cache_dir=tmp_path / "out").file == path


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    lm = toy.build("llama")
    found = one(lm, save_every=0.0, batch_tokens=600)
    assert found.file is None
    assert near(found.matrix, plain_moment(lm, 1, CORPUS[:40])[0])
    assert "cannot be kept" in caplog.text


def test_the_stand_in_does_not_take_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What was made from the bundled prose is never taken for Wikipedia, once that can be had."""
    without_datasets(monkeypatch)
    lm = toy.build("llama")
    for _ in range(2):
        found = one(lm, "wikipedia", tokens=200, cache_dir=tmp_path)
        assert found.file is not None
        assert found.file.parent.name == "texts_stats"
    assert len(files_in(tmp_path)) == 1


# ---- statistics of EasyEdit


def easyedit_file(
    root: Path, lm: LM, model: str, count: int = 50, width: int = 256, **more: Any
) -> tuple[Path, Tensor]:
    """A file as EasyEdit leaves it: the sum of k k^T, and the number of tokens."""
    total = torch.eye(width) * 3 + 1
    path = root / model / "wikipedia_stats" / f"{lm.mlp_out(1).name}_float32_mom2_100000.npz"
    path.parent.mkdir(parents=True)
    content = {"mom2.constructor": "util.runningstats.SecondMoment()", "mom2.count": count, "sample_size": 100000}
    np.savez(path, **{**content, "mom2.mom2": total.numpy(), **more})  # type: ignore[arg-type]
    return path, total / count


@pytest.mark.parametrize("model", ["gpt-toy", "some_gpt-toy"])
def test_files_of_easyedit_are_read(model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lm = LM.wrap(toy.build("llama").model, toy.tokenizer(), name="some/gpt-toy")
    path, expected = easyedit_file(tmp_path, lm, model)
    with counted(lm) as passes:
        found = one(lm, "wikipedia", cache_dir=tmp_path)
        assert not passes
    assert found.file == path
    assert found.count == 50
    assert torch.allclose(found.matrix, expected)
    assert caplog.text.count("cannot be checked") == 1


def test_wrong_files_of_easyedit_are_refused(tmp_path: Path) -> None:
    lm = LM.wrap(toy.build("llama").model, toy.tokenizer(), name="gpt-toy")
    easyedit_file(tmp_path / "a", lm, "gpt-toy", width=128)
    with pytest.raises(WrongBase, match=r"\(128, 128\), but .* takes in 256"):
        one(lm, "wikipedia", cache_dir=tmp_path / "a")
    easyedit_file(tmp_path / "b", lm, "gpt-toy", **{"mom2.mom2": np.array([{}], dtype=object)})
    path, _ = easyedit_file(tmp_path / "c", lm, "gpt-toy")
    path.write_bytes(path.read_bytes()[:200])
    easyedit_file(tmp_path / "d", lm, "gpt-toy", count=0)
    for folder in "bcd":
        with pytest.raises(DamagedFile, match="is damaged"):
            one(lm, "wikipedia", cache_dir=tmp_path / folder)


# ---- going on


class Killed(BaseException):
    """What ends a process in the middle."""


def killed_after(lm: LM, passes: int, sites: list[Any], **more: Any) -> None:
    """Collect, and be killed in a forward pass."""
    left = itertools.count(passes - 1, -1)

    def hook(*_: object) -> None:
        if not next(left):
            raise Killed

    handle = lm.blocks[0].register_forward_pre_hook(hook)
    with pytest.raises(Killed):
        second_moments(lm, sites, CORPUS, **more)
    handle.remove()


def test_a_killed_pass_goes_on_where_it_was(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lm = toy.build("llama")
    sites, settings = [lm.mlp_out(0), lm.mlp_out(2)], {"batch_tokens": 512, "save_every": 0.0, "tokens": 8000}
    with counted(lm) as passes:
        whole = second_moments(lm, sites, CORPUS, cache_dir=tmp_path / "whole", **settings)
    killed_after(lm, len(passes) - 3, sites, cache_dir=tmp_path / "killed", **settings)
    (left,) = files_in(tmp_path / "killed")
    assert left.name.endswith(".partial")
    with counted(lm) as rest, caplog.at_level(logging.INFO, "easyeditor"):
        found = second_moments(lm, sites, CORPUS, cache_dir=tmp_path / "killed", **settings)
    assert 4 <= len(rest) < len(passes) / 2
    assert "going on after" in caplog.text
    assert not left.exists()
    for name, moment in whole.items():
        assert found[name].count == moment.count
        assert torch.equal(found[name].matrix, moment.matrix), "to the bit"


def test_convergence_is_not_forgotten(tmp_path: Path) -> None:
    """The comparison that was due after the kill is made with the moment from before it."""
    lm = toy.build("llama")
    settings = {"batch_tokens": 512, "save_every": 0.0, "tokens": 8000, "tolerance": 0.3}
    with counted(lm) as passes:
        whole = second_moments(lm, [lm.mlp_out(2)], CORPUS, cache_dir=tmp_path / "whole", **settings)
    assert whole[lm.weight_name(2)].count < 2000
    killed_after(lm, len(passes), [lm.mlp_out(2)], cache_dir=tmp_path / "killed", **settings)
    found = second_moments(lm, [lm.mlp_out(2)], CORPUS, cache_dir=tmp_path / "killed", **settings)
    assert found[lm.weight_name(2)].count == whole[lm.weight_name(2)].count
    assert torch.equal(found[lm.weight_name(2)].matrix, whole[lm.weight_name(2)].matrix)


def test_a_damaged_rest_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lm = toy.build("llama")
    settings: dict[str, Any] = {"batch_tokens": 512, "save_every": 0.0, "tokens": 4000}
    killed_after(lm, 5, [lm.mlp_out(1)], cache_dir=tmp_path / "killed", **settings)
    _cut_off(files_in(tmp_path / "killed")[0])
    found = one(lm, CORPUS, cache_dir=tmp_path / "killed", **settings)
    assert "begins anew" in caplog.text
    assert torch.equal(found.matrix, one(lm, CORPUS, cache_dir=tmp_path / "whole", **settings).matrix)


def _as_rank(rank: int, folder: Path, passes: int, settings: dict[str, Any]) -> None:
    """One of two processes; it is killed after some forward passes if their number is given."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{passes}", rank=rank, world_size=2)
    lm = toy.build("llama")
    sites = [lm.mlp_out(0), lm.mlp_out(2)]
    if passes:
        killed_after(lm, passes, sites, cache_dir=folder / "out", **settings)
        os._exit(0)
    with counted(lm) as ran:
        found = second_moments(lm, sites, CORPUS, cache_dir=folder / "out", **settings)
    counts = torch.tensor([len(ran), *(moment.count for moment in found.values())])
    save_file({"counts": counts, **{name: each.matrix for name, each in found.items()}}, folder / f"rank-{rank}")
    dist.destroy_process_group()


def two_processes(folder: Path, passes: int, settings: dict[str, Any]) -> None:
    start, rest = mp.get_context("fork").Process, (folder, passes, settings)
    children = [start(target=_as_rank, args=(rank, *rest), daemon=True) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0


@pytest.mark.parametrize("tolerance", [0.0, 0.3])
def test_two_processes_find_what_one_finds(tolerance: float, tmp_path: Path) -> None:
    """Also after both were killed; and both return the same."""
    lm = toy.build("llama")
    settings = {"batch_tokens": 512, "save_every": 0.0, "tokens": 7000, "tolerance": tolerance}
    with counted(lm) as passes:
        alone = second_moments(lm, [lm.mlp_out(0), lm.mlp_out(2)], CORPUS, cache_dir=tmp_path / "alone", **settings)
    if not tolerance:
        two_processes(tmp_path, len(passes) // 2 - 1, settings)
        assert [path.suffix for path in files_in(tmp_path / "out")] == [".partial"]
    two_processes(tmp_path, 0, settings)
    ranks = [load_file(tmp_path / f"rank-{rank}") for rank in range(2)]
    assert all(torch.equal(value, ranks[1][name]) for name, value in ranks[0].items() if name != "counts")
    for name, moment in alone.items():
        assert [int(rank["counts"][1]) for rank in ranks] == [moment.count] * 2
        assert near(ranks[0][name], moment.matrix, 1e-6)
    ran = [int(rank["counts"][0]) for rank in ranks]
    assert sum(ran) == len(passes) if tolerance else 0 < sum(ran) < len(passes) / 2
    assert len(files_in(tmp_path / "out")) == 2, "one process writes, and nothing else is left"


def test_the_command_shares_the_work(tmp_path: Path) -> None:
    """Through the command, as torchrun starts it: the sample, its order and the files are those of one process."""
    wanted = ["stats", "--method", "ROME", "--corpus", "tinyfacts", "--layers", "1,2", "--tokens", "4500", "--json"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, "-m", "easyeditor.cli", *wanted, "--device", "cpu", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout[done.stdout.index("{") :])
    lm = LM.load("tinyfacts")
    for row in report["layers"]:
        shared = one(lm, "tinyfacts", row["layer"], tokens=4500, cache_dir=tmp_path)
        alone = one(lm, "tinyfacts", row["layer"], tokens=4500)
        assert str(shared.file) == row["file"]
        assert shared.count == alone.count == row["tokens"] == 4500
        assert near(shared.matrix, alone.matrix, 1e-6)


# ---- the command


def run(*args: object, code: int = 0) -> Result:
    result = CliRunner().invoke(application(), ["stats", *map(str, args)])
    assert result.exit_code == code, result.output
    return result


def test_the_command_says_what_it_collected(tmp_path: Path) -> None:
    corpus, out = tmp_path / "prose.txt", tmp_path / "out"
    corpus.write_text("\n".join(read_corpus("tinyfacts")))
    common = ["--method", "ROME", "--corpus", corpus, "--out", out]
    report = json.loads(run(*common, "--layers", "1-2", "--tokens", 3000, "--json").stdout)
    for row in report["layers"]:
        matrix = load_file(row["file"])["moment"].double()
        assert row["condition"] == pytest.approx(float(torch.linalg.cond(matrix)), rel=0.01)
        assert (row["tokens"], row["width"]) == (3000, 1152)
    assert [row["layer"] for row in report["layers"]] == [1, 2]
    assert f"--set stats_dir={out}" in report["next"]
    assert f"--set mom2_dataset={corpus}" in report["next"]
    shown = run(*common, "--set", "layers=[2]").stdout
    assert "condition" in shown
    assert "11520" in shown
    assert f"--set stats_dir={out}" in shown


def test_the_command_finds_the_layers_of_the_method(cache: Path) -> None:
    report = json.loads(run("--method", "ROME", "--corpus", "tinyfacts", "--tokens", 300, "--json").stdout)
    assert report["next"] is None
    (row,) = report["layers"]
    assert files_in(cache) == [Path(row["file"])]
    assert row["condition"] is None, "fewer tokens than dimensions: C is singular"


@pytest.mark.parametrize(
    ("args", "code", "told"),
    [
        (["--layers", "a"], 2, "--layers 'a' is no list of layers"),
        (["--layers", "5-3"], 2, "counts down. Write it such as --layers 3-5"),
        (["--layers", "99"], 2, "has blocks 0 to"),
        (["--corpus", "no_such_file.txt"], 2, "'no_such_file.txt' is not a text file here"),
        (["--corpus", "a/b", "--layers", "1"], 1, "pip install 'easyeditor[data]'"),
        (["--method", "ICE", "--corpus", "tinyfacts"], 2, "has no setting 'layers'"),
    ],
)
def test_wrong_input_gets_one_sentence(
    args: list[str], code: int, told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without_datasets(monkeypatch)
    monkeypatch.chdir(tmp_path)
    result = run(*(["--method", "ROME"] if "--method" not in args else []), *args, code=code)
    assert told in result.stderr
    assert "Traceback" not in result.output


def test_layers_are_numbers_and_ranges() -> None:
    assert numbers("3-5, 8,4") == [3, 4, 5, 8]
