"""Finding the parts of a model, by what they do: every family, remote code, sharding, precision, and refusals."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from easyeditor.core.values import ValueSettings, values
from easyeditor.edits.delta import LowRank
from easyeditor.edits.edit import WeightEdit
from easyeditor.edits.ledger import Ledger, applied
from easyeditor.errors import EasyEditError, NotEditable, UsageError
from easyeditor.hparams import complete
from easyeditor.lm.generate import answer
from easyeditor.lm.hooks import add_at, by_row, capture, hidden, replace, stop_after, with_hidden
from easyeditor.lm.loading import accelerator
from easyeditor.lm.model import LM
from easyeditor.registry import get_method
from easyeditor.requests import EditRequest
from families import DEPTH, FAMILIES, MIXTURES, OURS, VOCAB, WIDTH, build, raw, words
from local_models import Bare

EXPECTED = {family: (row[3], row[4]) for family, row in FAMILIES.items()} | {f: (p, "Linear") for f, p in OURS.items()}
REQUEST = EditRequest(prompt="the capital of ada ra is", subject="ada ra", target_new="lima")


def tokens(lm: LM) -> torch.Tensor:
    return torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]], device=lm.device)


# --- discovery -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", EXPECTED)
def test_discovery(family: str) -> None:
    lm, (path, kind) = build(family), EXPECTED[family]
    assert lm.width == WIDTH and len(lm.blocks) == DEPTH
    assert [lm.mlp_out(i).name for i in range(DEPTH)] == [path.format(i) for i in range(DEPTH)]
    site = lm.mlp_out(1)
    assert site.weight_name == f"{path.format(1)}.weight" and lm.block_of(site) == 1
    assert site.transposed == (kind == "Conv1D") and isinstance(site.module, nn.Linear) != site.transposed
    assert tuple(site.weight.shape) == ((site.d_in, site.d_out) if site.transposed else (site.d_out, site.d_in))
    assert tuple(site.matrix().shape) == (site.d_out, site.d_in) and site.d_out == WIDTH
    assert lm.sequence_first == (family == "chatglm")
    assert lm.describe()["mlp_out"] == path and lm.describe()["editable"] is True


@pytest.mark.parametrize("family", EXPECTED)
def test_attention_is_told_apart(family: str) -> None:
    """The projection of attention writes to the stream as well; it is found under its own name and never confused."""
    lm = build(family)
    if family == "qwen3_5":  # its blocks have attention of two kinds, so there is no one name for all
        with pytest.raises(NotEditable, match="attention"):
            lm.attn_out(0)
        return
    found = [lm.attn_out(i) for i in range(DEPTH)]
    assert all(site.d_out == WIDTH for site in found)
    assert not {site.name for site in found} & {lm.mlp_out(i).name for i in range(DEPTH)}
    if family in ("baichuan", "llama"):
        assert found[1].name == "model.layers.1.self_attn.o_proj"


@pytest.mark.parametrize("family", EXPECTED)
def test_a_rank_one_write_makes_the_module_emit_the_value(family: str) -> None:
    """W' = W + (v* - W k*) k*^T / |k*|^2 through the found site: in a real run the module says v* where it meets k*."""
    lm = build(family)
    site = lm.mlp_out(1)
    before = site.weight.detach().clone()
    with torch.no_grad(), capture(site.module, "input") as taken, capture(site.module) as given:
        lm.run(tokens(lm))
    key, old = taken[0].reshape(-1, site.d_in)[-1], given[0].reshape(-1, site.d_out)[-1]
    wanted = torch.randn(site.d_out, generator=torch.Generator().manual_seed(3))
    delta = LowRank((wanted - old)[:, None], (key / key.dot(key))[:, None])
    with applied(lm, WeightEdit(deltas={site.weight_name: delta})):
        with torch.no_grad(), capture(site.module) as seen:
            lm.run(tokens(lm))
        assert torch.allclose(seen[0].reshape(-1, site.d_out)[-1], wanted, atol=1e-4)
    assert torch.equal(before, site.weight)


def test_a_renamed_folder_changes_nothing(tmp_path: Path) -> None:
    """Neither a folder called after another model nor one called after nothing moves what is found or chosen."""
    model, tok = raw("llama"), words(bos=True)
    found = []
    for name in ("llama-2-7b", "gpt2-xl", "chatglm2-6b", "x"):
        folder = tmp_path / name
        model.save_pretrained(folder)
        tok.save_pretrained(folder)
        lm = LM.load(folder)
        chosen = complete(get_method("ROME").hparams(), lm).to_dict()
        found.append(({**lm.describe(), "name": ""}, lm.facts(), chosen, answer(lm, [REQUEST.prompt], 5)))
    assert all(each == found[0] for each in found)


def test_presets_are_chosen_by_structure() -> None:
    """The facts of a model with remote code are those that a preset row is matched by."""
    lm = build("chatglm")
    assert lm.facts() == {
        "model_type": "chatglm",
        "layers": DEPTH,
        "width": WIDTH,
        "vocab": VOCAB,
        "inner": 3 * WIDTH,
        "rope_type": "default",
    }


# --- models that take less ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*OURS, "bare"])
def test_remote_code_generates(family: str) -> None:
    """Our loop with their cache says what token after token without any cache says."""
    lm = build(family)
    prompts = ["the capital of ada ra is", "bo lives in", "where does the red cat of cy su live ?"]
    said = answer(lm, prompts, 6, batch_size=3)
    for prompt, found in zip(prompts, said, strict=True):
        ids = list(lm.text.encode(prompt).ids)
        start = len(ids)
        for _ in range(6):
            with torch.no_grad():
                out = lm.run(torch.tensor([ids]))
            token = int((out if isinstance(out, torch.Tensor) else out.logits)[0, -1].argmax())
            if token in lm.text.eos_ids or (len(ids) > start and "\n" in lm.tokenizer.decode([token])):
                break
            ids.append(token)
        assert found == lm.text.decode(ids[start:]).strip()


@pytest.mark.parametrize("method", ["ROME", "FT", "GRACE", "ICE"])
@pytest.mark.parametrize("family", [*OURS, "bare"])
def test_every_method_runs_on_remote_code(family: str, method: str) -> None:
    lm, spec = build(family), get_method(method)
    hparams = complete(spec.hparams(), lm)
    edit = spec.run(lm, [REQUEST], hparams, {"contexts": ["{}", "The one . {}"]}, [])
    with torch.no_grad():
        plain = lm.run(tokens(lm))
        with applied(lm, edit):
            lm.run(tokens(lm))
        again = lm.run(tokens(lm))
    first, second = (out if isinstance(out, torch.Tensor) else out.logits for out in (plain, again))
    assert torch.equal(first, second)


def test_a_plain_module_is_enough() -> None:
    lm = LM.wrap(Bare(VOCAB, WIDTH, DEPTH), words())
    assert lm.accepts == {"self", "input_ids"} and lm.mlp_out(2).name == "layers.2.down"
    assert not lm.pads_left and lm.name == "Bare"
    with pytest.raises(NotEditable, match="get_output_embeddings"):
        _ = lm.head


def test_left_padding_is_tried_and_not_believed() -> None:
    assert all(build(family).pads_left for family in ("gpt2", "llama", "bloom", "opt", "chatglm", "t5"))
    shifted = raw("gpt2")
    own = type(shifted).forward

    class Shifted(type(shifted)):  # type: ignore[misc]
        """Counts positions from the pads on, as a model without `position_ids` does."""

        def forward(self, input_ids=None, attention_mask=None, past_key_values=None, use_cache=None):
            return own(self, input_ids, attention_mask=attention_mask, past_key_values=past_key_values)

    shifted.__class__ = Shifted
    lm = LM.wrap(shifted, words())
    assert not lm.pads_left
    prompts = ["the capital of ada ra is", "bo lives in", "the red cat"]
    assert answer(lm, prompts, 5, batch_size=8) == [answer(lm, [p], 5)[0] for p in prompts]


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MIXTURES)
def test_mixtures_of_experts_are_refused(family: str) -> None:
    with pytest.raises(NotEditable) as caught:
        build(family)
    text = str(caught.value)
    assert "Seen in block 0 of 'model.layers': self_attn.q_proj (32 -> 32)" in text
    assert "Expected: exactly one dense projection back to the residual width 32" in text
    assert "dense model" in text or "rewrite_module_tmp" in text
    assert ("shared_expert.down_proj" in text) == (family == "qwen2_moe")


def test_a_mixture_can_be_asked_but_not_edited() -> None:
    lm = build("mixtral", editable=False)
    assert answer(lm, ["the capital of"], 2) and lm.describe()["editable"] is False
    with pytest.raises(NotEditable, match="no dense MLP projection"):
        lm.mlp_out(0)


def test_a_shared_expert_is_used_when_named() -> None:
    path = "model.layers.{}.mlp.shared_expert.down_proj"
    for template in (path, f"{path}.weight"):
        lm = build("qwen2_moe", rewrite_module_tmp=template)
        assert [lm.mlp_out(i).name for i in range(DEPTH)] == [path.format(i) for i in range(DEPTH)]
    found = values(lm, [REQUEST], 0, ["{}"], ValueSettings(3, 0.3, 1e-3, 4.0, 0.0))
    assert found[0].delta.norm() > 0


def test_a_template_that_names_nothing() -> None:
    with pytest.raises(UsageError, match=r"no module 'model\.layers\.0\.mlp\.proj_down'"):
        build("llama", rewrite_module_tmp="model.layers.{}.mlp.proj_down")


def test_a_failed_wrap_leaves_the_model_as_it_was() -> None:
    model = raw("mixtral").train()
    with pytest.raises(NotEditable):
        LM.wrap(model, words())
    assert model.training and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not LM.wrap(raw("llama").train(), words()).model.training


@pytest.mark.parametrize("layer", [-1, DEPTH, 99])
def test_layer_out_of_range(layer: int) -> None:
    with pytest.raises(UsageError, match=rf"Setting 'layers': tiny-gpt2 has blocks 0 to 2, not {layer}"):
        build("gpt2").mlp_out(layer)


def test_sites_by_path() -> None:
    lm = build("gpt2")
    for path in ("transformer.h[1].mlp.c_fc.weight", "transformer.h.1.mlp.c_fc", "transformer.h[1].mlp.c_fc"):
        site = lm.site(path)
        assert (site.name, lm.block_of(site)) == ("transformer.h.1.mlp.c_fc", 1)
    assert lm.block_of(lm.site("lm_head")) == DEPTH
    with pytest.raises(UsageError, match="has no module") as caught:
        lm.site("transformer.h[7].mlp.c_fc.weight")
    assert "transformer.h.0.mlp.c_fc" in str(caught.value)
    with pytest.raises(UsageError, match="expected a Linear or Conv1D"):
        lm.site("transformer.h.0.mlp")
    for path in ("transformer.h.0.ln_1", "transformer.wte"):
        with pytest.raises(UsageError, match="expected a Linear or Conv1D"):
            lm.site(path)


def test_a_module_without_blocks() -> None:
    class Flat(nn.Module):
        def forward(self, input_ids):
            return input_ids

    with pytest.raises(NotEditable, match="no list of blocks"):
        LM.wrap(Flat(), words())


class Looped(Bare):
    """Runs each of its blocks twice."""

    def forward(self, input_ids):
        states = self.words(input_ids)
        for layer in [*self.layers, *self.layers]:
            states = layer(states)
        return self.head(states)


def test_blocks_that_run_twice() -> None:
    with pytest.raises(NotEditable, match="were run 6 times"):
        LM.wrap(Looped(VOCAB, WIDTH, DEPTH), words())


# --- loading ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    raw("llama").save_pretrained(path)
    words(bos=True).save_pretrained(path)
    return path


def test_load(folder: Path) -> None:
    lm = LM.load(folder)
    assert lm.dtype == torch.float32 and lm.name == str(folder) and lm.device == torch.device("cpu")
    assert LM.load(str(folder), device=3).device.type in ("cpu", "cuda", "mps", "xpu")


@pytest.mark.parametrize("dtype", ["bfloat16", "bf16", "float16", "fp16", torch.bfloat16, "fp32"])
def test_precision(folder: Path, dtype: str | torch.dtype) -> None:
    lm = LM.load(folder, dtype=dtype)
    short = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    expected = dtype if isinstance(dtype, torch.dtype) else short.get(dtype) or getattr(torch, dtype)
    assert lm.dtype == expected
    found = values(lm, [REQUEST], 1, ["{}"], ValueSettings(3, 0.3, 1e-3, 4.0, 0.0625))[0]
    assert found.delta.dtype == torch.float32 and torch.isfinite(found.delta).all() and found.delta.norm() > 0
    assert lm.mlp_out(1).matrix().dtype == torch.float32
    assert isinstance(answer(lm, [REQUEST.prompt], 4)[0], str)


def one_sentence(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text and text.endswith((".", ")")) and "Traceback" not in text
    return text


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere", "a/b/c"])
def test_no_such_folder(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        LM.load(name)
    assert "There is no model folder" in one_sentence(caught.value) and "tinyfacts" in str(caught.value)


def test_no_such_model_and_no_network() -> None:
    with pytest.raises(UsageError) as caught:
        LM.load("nobody/nothing")
    assert "'nobody/nothing' cannot be loaded as a language model" in one_sentence(caught.value)


def test_a_folder_that_holds_no_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        LM.load(tmp_path)
    assert "Expected a folder with config.json, tokenizer and weights" in one_sentence(caught.value)


def test_a_folder_without_tokenizer_or_weights(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(UsageError) as caught:
        LM.load(tmp_path)
    one_sentence(caught.value)
    words(bos=True).save_pretrained(tmp_path)
    with pytest.raises(UsageError) as caught:
        LM.load(tmp_path)
    one_sentence(caught.value)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError) as caught:
        LM.load(tmp_path)
    one_sentence(caught.value)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    whole = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(EasyEditError) as caught:
        LM.load(tmp_path)
    one_sentence(caught.value)


@pytest.mark.parametrize("dtype", ["float63", "int", "zeros", "quick"])
def test_unknown_dtype(folder: Path, dtype: str) -> None:
    with pytest.raises(UsageError, match=f"Unknown dtype '{dtype}'. Pass float32, bfloat16 or float16"):
        LM.load(folder, dtype=dtype)


def test_unknown_device_and_quantisation(folder: Path) -> None:
    with pytest.raises(UsageError, match="There is no device 'toaster'"):
        LM.load(folder, device="toaster")
    assert accelerator("cpu") == torch.device("cpu")
    with pytest.raises(UsageError, match="Pass 4 or 8"):
        LM.load(folder, quantization=3)


# --- sharded ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "falcon"])
def test_dispatched(family: str) -> None:
    """Accelerate replaces the forward of each module; hooks, values, edits and undo go on as before."""
    from accelerate import dispatch_model

    plain = build(family)
    model = copy.deepcopy(plain.model)
    top = [*(f"{plain.stack}.{i}" for i in range(DEPTH))]
    rest = [name for name, module in model.named_modules() if not list(module.children()) and list(module.parameters())]
    places = dict.fromkeys([*top, *(name for name in rest if not name.startswith(plain.stack))], "cpu")
    lm = LM.wrap(dispatch_model(model, device_map=places, force_hooks=True), plain.tokenizer, name=plain.name)
    assert "forward" in lm.blocks[0].__dict__ and lm.mlp_out(1).name == plain.mlp_out(1).name
    settings = ValueSettings(4, 0.3, 1e-3, 4.0, 0.0625)
    mine, theirs = (values(each, [REQUEST], 1, ["{}", "The one . {}"], settings)[0] for each in (lm, plain))
    assert torch.allclose(mine.delta, theirs.delta, atol=1e-5)
    for method in ("ROME", "FT", "GRACE"):
        spec = get_method(method)
        edits = [
            spec.run(each, [REQUEST], complete(spec.hparams(), each), {"contexts": ["{}"]}, []) for each in (lm, plain)
        ]
        logits = []
        for each, edit in zip((lm, plain), edits, strict=True):
            before = {name: p.detach().clone() for name, p in each.model.named_parameters()}
            ledger = Ledger.of(each)
            key = ledger.apply(edit)
            with torch.no_grad():
                logits.append(each.run(tokens(each)).logits)
            ledger.undo(key)
            assert all(torch.equal(p, before[name]) for name, p in each.model.named_parameters())
        assert torch.allclose(logits[0], logits[1], atol=1e-4)
    assert "forward" in lm.blocks[0].__dict__, "accelerate's forward is still in place"
    assert answer(lm, [REQUEST.prompt], 5) == answer(plain, [REQUEST.prompt], 5)


def test_device_map(folder: Path) -> None:
    lm = LM.load(folder, device_map={"": "cpu"})
    assert lm.device == torch.device("cpu") and answer(lm, ["bo"], 3) == answer(LM.load(folder), ["bo"], 3)


def test_offloaded_weights_are_refused() -> None:
    from accelerate import cpu_offload

    with pytest.raises(NotEditable, match="kept elsewhere"):
        LM.wrap(cpu_offload(raw("gpt2"), execution_device=torch.device("cpu")), words())


# --- hooks --------------------------------------------------------------------------------------------------------


class Returns(nn.Module):
    def __init__(self, wrap) -> None:
        super().__init__()
        self.wrap = wrap

    def forward(self, hidden_states):
        return self.wrap(hidden_states * 2)


WRAPS = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x, "cache"),
    "list": lambda x: [x, None],
    "output": lambda x: transformers.modeling_outputs.BaseModelOutputWithPast(last_hidden_state=x, past_key_values="c"),
    "none first": lambda x: (None, x),
}


@pytest.mark.parametrize("kind", [name for name in WRAPS if name != "none first"])
def test_hooks_take_every_kind_of_output(kind: str) -> None:
    module, x = Returns(WRAPS[kind]), torch.arange(12.0).reshape(2, 3, 2)
    with capture(module) as out, capture(module, "input") as taken:
        result = module(x)
        module(hidden_states=x)
    assert torch.equal(out[0], 2 * x) and torch.equal(taken[0], x) and torch.equal(taken[1], x)
    hidden(result).zero_()
    assert torch.equal(out[0], 2 * x), "what is captured is a clone"
    with replace(module, lambda states: states + 1):
        changed = module(x)
    assert type(changed) is type(result) and torch.equal(hidden(changed), 2 * x + 1)
    if kind in ("tuple", "list"):
        assert changed[1] == WRAPS[kind](x)[1]
    if kind == "output":
        assert changed.past_key_values == "c"
    with add_at(module, torch.tensor([0, 2]), torch.ones(2, 2)):
        moved = hidden(module(x)) - 2 * x
    assert moved[0, 0].sum() == 2 and moved[1, 2].sum() == 2 and moved.sum() == 4
    assert not module._forward_hooks and not module._forward_pre_hooks


def test_hidden_states_that_are_not_there() -> None:
    with pytest.raises(TypeError, match="without a tensor"):
        hidden((None, "x"))
    assert with_hidden([torch.zeros(1), 3], torch.ones(1))[1] == 3


def test_layouts() -> None:
    rows, length, width = 2, 3, 4
    plain = torch.arange(24.0).reshape(rows, length, width)
    assert torch.equal(by_row(plain, rows), plain)
    assert torch.equal(by_row(plain.reshape(-1, width), rows), plain)
    assert torch.equal(by_row(plain.transpose(0, 1).contiguous(), rows, sequence_first=True), plain)
    positions, delta = torch.tensor([2, 0]), torch.randn(rows, width)
    expected = plain.clone()
    expected[[0, 1], positions] += delta
    module = nn.Identity()
    for x, first in ((plain, False), (plain.reshape(-1, width), False), (plain.transpose(0, 1), True)):
        with add_at(module, positions, delta, first):
            found = module(x)
        assert found.shape == x.shape and torch.allclose(by_row(found, rows, first), expected)


def test_falcon_writes_into_what_was_returned() -> None:
    """It adds attention to the MLP's output in place: a capture that is no clone would show the sum."""
    lm = build("falcon")
    site = lm.mlp_out(0)
    with torch.no_grad(), capture(site.module, "input") as taken, capture(site.module) as given:
        lm.run(tokens(lm))
    assert torch.allclose(given[0], site.module(taken[0]), atol=1e-6)


def test_stop_after_leaves_the_pass() -> None:
    lm = build("gpt2")
    with torch.no_grad(), capture(lm.blocks[1]) as second, stop_after(lm.blocks[0]):
        lm.run(tokens(lm))
        raise AssertionError("the pass went on")
    assert not second and not lm.blocks[0]._forward_hooks


def test_frozen_puts_the_flags_back() -> None:
    lm = build("gpt2")
    first = next(lm.model.parameters())
    first.requires_grad_(False)
    flags = [p.requires_grad for p in lm.model.parameters()]
    with pytest.raises(ZeroDivisionError), lm.frozen():
        assert not any(p.requires_grad for p in lm.model.parameters())
        _ = 1 / 0
    assert [p.requires_grad for p in lm.model.parameters()] == flags
