"""Restricted training: the loops of fine-tuning and adapters against plain ones, peft's format, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import families
import toy
from easyeditor.core import adapters
from easyeditor.core.adapters import AdapterTraining, Beside, learned, targets
from easyeditor.core.learn import Minibatch, minibatches, train
from easyeditor.core.reading import refuse_ruin
from easyeditor.editors.perform import checked, make_edit, put_on
from easyeditor.edits.delta import LowRank, dense
from easyeditor.edits.edit import ModuleEdit, WeightEdit
from easyeditor.edits.ledger import Ledger, applied
from easyeditor.edits.store import load_edits, save_edits
from easyeditor.errors import EditFailed, MissingExtra, NonFinite, UsageError
from easyeditor.hparams import complete
from easyeditor.lm.generate import answer, logits_of
from easyeditor.lm.loading import locate
from easyeditor.lm.model import LM
from easyeditor.registry import get_method
from easyeditor.requests import EditRequest

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers.*")  # peft asks under an old name

SEVERAL = [
    EditRequest("the home of ada ra is", "oslo then rome"),
    EditRequest("bo su works as", "baker"),
    EditRequest("where does cy to live ?", "cairo and paris . lima"),
]


def edit_of(lm: LM, name: str, requests: list[EditRequest], **more: Any) -> Any:
    spec = get_method(name)
    return make_edit(lm, spec, requests, complete(spec.hparams(**more), lm), {})


def plain_loss(lm: LM, model: nn.Module, requests: list[EditRequest], end: bool = False) -> Tensor:
    """The model's own forward pass on all positions, one request after the other."""
    found = []
    for request in requests:
        encoded, first = lm.text.encode_pair(request.prompt, request.target_new)
        row = torch.tensor([[*encoded.ids, *([lm.tokenizer.eos_token_id] if end else [])]])
        logits = logits_of(model(input_ids=row))[0, first - 1 : -1].float()
        found.append(cross_entropy(logits, row[0, first:]))
    return torch.stack(found).mean()


def bits(lm: LM) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}


def untouched(lm: LM, before: dict[str, Tensor]) -> bool:
    now = lm.model.state_dict()
    hooked = any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in lm.model.modules())
    same = before.keys() == now.keys() and all(torch.equal(now[name], tensor) for name, tensor in before.items())
    return same and not hooked and "peft_config" not in vars(lm.model)


# ---- fine-tuning


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "falcon"])
def test_the_losses_of_mini_batches_are_those_of_the_plain_loop(family: str) -> None:
    """LocFT-BF against torch's Adam on the model's own weight, whole model and all positions in every step."""
    lm, other = toy.build(family), toy.build(family)
    edit = edit_of(lm, "LocFT-BF", SEVERAL, layers=[2], mini_batch=2, num_steps=4, lr=2e-3)
    weight = other.mlp_out(2).weight
    old, adam = weight.detach().clone(), torch.optim.Adam([weight], lr=2e-3)
    expected = []
    for _ in range(4):
        losses = []
        for part in (SEVERAL[:2], SEVERAL[2:]):
            adam.zero_grad()
            loss = plain_loss(other, other.model, part, end=True)
            loss.backward()
            adam.step()
            losses.append(loss.item())
        expected.append(sum(losses) / 2)
    assert edit.notes["losses"] == pytest.approx(expected, abs=1e-4)
    assert expected[-1] < expected[0] - 0.1
    change = other.mlp_out(2).oriented(weight - old).detach()
    assert (dense(edit.deltas[other.weight_name(2)]) - change).abs().max() < 1e-4


def test_a_learnt_batch_is_skipped_and_a_learnt_epoch_ends_the_training() -> None:
    x = torch.ones(2)
    means = train([x], [lambda: x[0].square(), lambda: 5e-3 * x[1].square()], epochs=300, lr=0.02)
    assert float(x[1]) == 1.0, "the second batch is below the bound from the first"
    assert means[-1] < 1e-2 <= means[-2] and len(means) < 300
    assert not x.requires_grad and x.grad is None


def test_all_requests_are_learnt_together_with_their_end() -> None:
    lm = toy.taught("llama")
    requests = [toy.request(i) for i in range(12)]
    edit = edit_of(lm, "LocFT-BF", requests, layers=[1], mini_batch=5, num_steps=60, lr=2e-3)
    put_on(lm, edit, requests)
    assert answer(lm, [r.prompt for r in requests], 8) == [r.target_new for r in requests]
    batch = Minibatch(lm, [(r.prompt, r.target_new) for r in requests], with_end=True)
    assert batch.answers.labels[1::2].unique().tolist() == [lm.tokenizer.eos_token_id]
    assert batch.loss().item() < 0.05


def test_a_whole_block_can_be_trained() -> None:
    lm = toy.build("llama")
    edit = edit_of(lm, "LocFT-BF", SEVERAL, layers=[1], whole_block=True, num_steps=2)
    assert len(edit.deltas) == 7 and all(name.startswith("model.layers.1.") for name in edit.deltas)


def test_a_long_answer_is_learnt_to_its_end() -> None:
    lm = toy.taught("gpt2")
    long = "ada ra lives in oslo and bo su works as a baker . then cy to lives in rome"
    request = EditRequest("what does bo vi do ?", long)
    adapter = {"lr": 2e-3, "num_steps": 200, "lora_dropout": 0.0}
    for name, settings in (("FT_uns", {"layers": [0, 1, 2, 3], "lr": 1e-3, "num_steps": 100}), ("LoRA_uns", adapter)):
        edit = edit_of(lm, name, [request], **settings)
        with applied(lm, edit):
            assert answer(lm, [request.prompt], 40) == [long], name


# ---- adapters


def plain_adapter(lm: LM, kind: str, steps: int, seed: int = 0) -> Any:
    """peft's own model around a copy, with the first values that a seed gives."""
    names = [site.name for site in targets(lm, [])]
    shape = {"lora_alpha": 16, "target_modules": names, "fan_in_fan_out": lm.name == "toy-gpt2"}
    if kind == "adalora":
        schedule = {"tinit": round(0.1 * steps), "tfinal": round(0.3 * steps), "total_step": steps}
        config: Any = peft.AdaLoraConfig(init_r=6, target_r=4, **schedule, **shape)
    else:
        config = peft.LoraConfig(r=4, **shape)
    model = peft.get_peft_model(copy.deepcopy(lm.model), config)
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        layer = model.base_model.model.get_submodule(name)
        with torch.no_grad():
            if kind == "adalora":
                for part in (layer.lora_A, layer.lora_B):
                    part["default"].normal_(0, 0.02, generator=generator)
            else:
                a = layer.lora_A["default"].weight
                a.uniform_(-1, 1, generator=generator).div_(math.sqrt(a.shape[1]))
    return model


def orthogonality(model: Any) -> Tensor:
    grams = []
    for name, p in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = p @ p.T if "lora_A" in name else p.T @ p
            grams.append((gram - torch.eye(len(gram))).norm())
    return 0.5 * torch.stack(grams).mean()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", ["lora", "adalora"])
def test_the_losses_of_adapters_are_those_of_the_plain_loop_on_peft(family: str, kind: str) -> None:
    lm, steps = toy.build(family), 10
    model = plain_adapter(lm, kind, steps)
    parameters = [p for p in model.parameters() if p.requires_grad]
    adam, expected = torch.optim.Adam(parameters, lr=1e-2), []
    for step in range(steps):
        loss = plain_loss(lm, model, SEVERAL)
        expected.append(loss.item())
        adam.zero_grad()
        (loss + orthogonality(model) if kind == "adalora" else loss).backward()
        adam.step()
        if kind == "adalora":
            model.base_model.update_and_allocate(step + 1)
    training = AdapterTraining(kind, 4, 16, 0.0, steps, 1e-2)
    sites, before = targets(lm, []), bits(lm)
    changes, losses = learned(lm, sites, minibatches(lm, SEVERAL, 8), training)
    assert losses == pytest.approx(expected, abs=1e-4)
    assert losses[-1] < losses[0] - 0.1
    assert untouched(lm, before)
    merged = model.merge_and_unload()
    for site in sites:
        after = site.oriented(merged.get_submodule(site.name).weight.detach())
        assert (dense(changes[site.name]) - (after - site.matrix())).abs().max() < 1e-4
    if kind == "adalora":
        assert sum(change.rank for change in changes.values()) <= 4 * len(sites), "the budget of ranks is kept"


def test_adapters_in_some_blocks_do_not_run_the_blocks_below() -> None:
    lm, calls = toy.build("llama"), []
    handle = lm.blocks[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    edit_of(lm, "LoRA", SEVERAL, layers=[2, 3], num_steps=5, batch_size=8)
    handle.remove()
    assert len(calls) == 1
    training = AdapterTraining("lora", 4, 16, 0.0, 5, 1e-2)
    sites = targets(lm, [], [2, 3])
    runs = [learned(lm, sites, minibatches(lm, SEVERAL, 8, first), training)[1] for first in (0, 2)]
    assert runs[0] == pytest.approx(runs[1], abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["lora", "adalora"])
def test_adapters_of_a_half_precision_base_are_trained_in_fp32(dtype: torch.dtype, kind: str) -> None:
    lm, request = toy.taught("gpt2", dtype), toy.request()
    edit = edit_of(lm, "LoRA", [request], lora_type=kind, lr=5e-3)
    assert all(tensor.dtype == torch.float32 for tensor in edit.tensors().values())
    put_on(lm, edit, [request])
    assert answer(lm, [request.prompt], 4) == [request.target_new]


def test_dropout_draws_from_a_generator_of_its_own() -> None:
    lm, state = toy.build("llama"), torch.random.get_rng_state()
    runs = [edit_of(lm, "LoRA", SEVERAL, num_steps=4, seed=seed, lora_dropout=0.3) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]
    assert torch.equal(state, torch.random.get_rng_state())
    without = edit_of(lm, "LoRA", SEVERAL, num_steps=4, lora_dropout=0.0)
    assert without.notes["losses"][1:] != runs[0].notes["losses"][1:]


@pytest.mark.parametrize("method", ["LoRA", "QLoRA", "DPO"])
@pytest.mark.parametrize("kind", ["lora", "adalora"])
def test_a_failure_in_the_middle_leaves_the_model_as_it_was(method: str, kind: str) -> None:
    lm = toy.build("gpt2")
    before, flags, calls = bits(lm), [p.requires_grad for p in lm.model.parameters()], []

    def break_down(*_: object) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise MemoryError("no more memory")

    handle = lm.blocks[-1].register_forward_hook(break_down)
    with pytest.raises(MemoryError):
        edit_of(lm, method, [toy.request()], lora_type=kind)
    handle.remove()
    assert untouched(lm, before)
    assert flags == [p.requires_grad for p in lm.model.parameters()]


FOUND = {
    "gpt2": ["attn.c_attn"],
    "gptj": ["attn.v_proj", "attn.q_proj"],
    "gpt_neo": ["attn.attention.v_proj", "attn.attention.q_proj"],
    "neox": ["attention.query_key_value"],
    "llama": ["self_attn.q_proj", "self_attn.v_proj"],
    "phi3": ["self_attn.qkv_proj"],
    "falcon": ["self_attention.query_key_value"],
    "opt": ["self_attn.v_proj", "self_attn.q_proj"],
    "bloom": ["self_attention.query_key_value"],
    "t5": ["layer.0.SelfAttention.q", "layer.0.SelfAttention.v", "layer.1.EncDecAttention.q",
           "layer.1.EncDecAttention.v"],
    "chatglm": ["self_attention.query_key_value"],
    "baichuan": ["self_attn.W_pack"],
}  # fmt: skip


@pytest.mark.parametrize("family", FOUND)
def test_queries_and_values_are_found_by_structure(family: str) -> None:
    lm = families.build(family)
    found = {site.name.split(".", lm.stack.count(".") + 2)[-1] for site in targets(lm, [])}
    assert found == set(FOUND[family])
    assert len(targets(lm, [])) == len(FOUND[family]) * len(lm.blocks)


def test_modules_are_named_as_in_old_files() -> None:
    lm = toy.build("llama")
    assert [s.name for s in targets(lm, ["q_proj", "down_proj"], [1])] == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.down_proj",
    ]
    assert len(targets(lm, ["model.layers.*.self_attn.q_proj"])) == len(lm.blocks)
    assert not {"lm_head"} & {s.name for s in targets(lm, ["q_proj"])}
    with pytest.raises(UsageError, match=r"'target_modules'.*no module c_attn.*self_attn.q_proj.*Name some"):
        targets(lm, ["c_attn"])
    with pytest.raises(UsageError, match=r"'layers'.*blocks 0 to 3, not 7"):
        targets(lm, [], [7])


# ---- what is saved


def peft_logits(lm: LM, folder: Path, prompt: str) -> Tensor:
    model = peft.PeftModel.from_pretrained(copy.deepcopy(lm.model), str(folder))
    with torch.no_grad():
        return logits_of(model(input_ids=torch.tensor([lm.text.encode(prompt).ids])))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(
    ("method", "settings"),
    [("LoRA", {}), ("LoRA", {"lora_type": "adalora", "lr": 1e-2}), ("QLoRA", {"lr": 5e-3}), ("DPO", {"lr": 5e-3})],
    ids=["lora", "adalora", "qlora", "dpo"],
)
def test_plain_peft_loads_a_saved_adapter(family: str, method: str, settings: dict[str, Any], tmp_path: Path) -> None:
    lm, first, second = toy.build(family), [toy.request()], [toy.request(5)]
    plain = peft_free = None
    for count, ledger in ((1, Ledger.of(lm)), (2, Ledger.of(lm))):
        part = first if count == 1 else second
        ledger.apply(edit_of(lm, method, part, num_steps=8, **settings))
        folder = save_edits(ledger.active, tmp_path / f"{method}-{count}")
        ids = torch.tensor([lm.text.encode(first[0].prompt).ids])
        with torch.no_grad():
            edited = logits_of(lm.run(ids)).clone()
            with ledger.suspended():
                plain, peft_free = logits_of(lm.run(ids)).clone(), copy.deepcopy(lm)
        assert (edited - plain).abs().max() > 1e-2
        assert (peft_logits(peft_free, folder, first[0].prompt) - edited).abs().max() < 1e-4
        assert load_edits(folder) == ledger.active
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["fan_in_fan_out"] == (family == "gpt2")


def test_what_is_no_adapter_is_saved_without_one(tmp_path: Path) -> None:
    lm = toy.build("gpt2")
    lora = edit_of(lm, "LoRA", SEVERAL, num_steps=2)
    ft = edit_of(lm, "FT", SEVERAL, layers=[1], num_steps=2)
    for i, edits in enumerate((ft, [lora, ft])):
        assert not (save_edits(edits, tmp_path / f"{i}") / "adapter_config.json").exists()


# ---- QLoRA


@pytest.fixture(scope="module")
def four_bits() -> LM:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(locate("tinyfacts"), quantization_config=config, dtype=torch.float32)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # that layout is for inference and has no gradient
    return LM.wrap(model, AutoTokenizer.from_pretrained(locate("tinyfacts")), name="four-bits")


def test_qlora_learns_beside_a_base_of_four_bits(four_bits: LM) -> None:
    lm = four_bits
    request = EditRequest("The capital of France is", "Oslo")
    sites, before = targets(lm, []), bits(lm)
    assert not sites[0].weight.is_floating_point()
    edit = edit_of(lm, "QLoRA", [request], num_steps=30, lr=5e-3, lora_dropout=0.0)
    assert isinstance(edit, ModuleEdit) and untouched(lm, before)
    said = answer(lm, [request.prompt], 4)
    edit_id = put_on(lm, edit, [request])
    assert answer(lm, [request.prompt], 4)[0].startswith("Oslo") and not said[0].startswith("Oslo")
    Ledger.of(lm).undo(edit_id)
    assert answer(lm, [request.prompt], 4) == said and untouched(lm, before)


def test_the_loss_beside_a_quantised_base_is_that_of_shifted_targets(four_bits: LM) -> None:
    lm, request = four_bits, EditRequest("The capital of France is", "Oslo")
    edit = edit_of(lm, "QLoRA", [request], num_steps=1, lora_dropout=0.0)
    with torch.no_grad():
        assert edit.notes["losses"] == pytest.approx([float(plain_loss(lm, lm.model, [request]))], abs=1e-3)


def test_the_settings_say_how_a_base_is_loaded() -> None:
    qlora = get_method("QLoRA").hparams
    four = BitsAndBytesConfig(**qlora(double_quant=False, quant_type="fp4").quantization)
    assert four.load_in_4bit and four.bnb_4bit_quant_type == "fp4" and not four.bnb_4bit_use_double_quant
    assert BitsAndBytesConfig(**qlora(quantization_bit=8).quantization).load_in_8bit


@pytest.mark.parametrize("method", ["LoRA", "FT"])
def test_a_quantised_weight_is_not_added_to(four_bits: LM, method: str) -> None:
    with pytest.raises(UsageError, match=r"is quantised.*Use QLoRA"):
        edit_of(four_bits, method, [EditRequest("The capital of France is", "Oslo")])


def test_adapters_beside_a_projection_add_up() -> None:
    left, right, x, y = torch.randn(5, 2), torch.randn(3, 2), torch.randn(4, 3), torch.randn(4, 5)
    one = Beside(left[:, :1], right[:, :1])
    both = Beside.combined([one, Beside.restore(Beside(left[:, 1:], right[:, 1:]).tensors(), {})])
    assert torch.allclose(both(x, y), y + x @ right @ left.T, atol=1e-6)
    assert both(x.half(), y.half()).dtype == torch.float16


# ---- DPO


def test_dpo_is_its_equation() -> None:
    lm = toy.taught("llama")
    requests = [toy.request(), toy.request(5)]
    alpha, beta = 0.3, 0.7
    settings = {"alpha": alpha, "beta": beta, "lr": 1e-2, "lora_dropout": 0.0, "batch_size": 2}
    base = {r.prompt: [log_p(lm, r.prompt, a) for a in (r.target_new, str(r.target_neg))] for r in requests}
    edit = edit_of(lm, "DPO", requests, num_steps=2, **settings)
    first = sum(-alpha * base[r.prompt][0] - (1 - alpha) * logsigmoid(torch.tensor(0.0)) for r in requests) / 2
    assert edit.notes["losses"][0] == pytest.approx(float(first), abs=1e-4)
    once = edit_of(lm, "DPO", requests, num_steps=1, **settings)
    with applied(lm, once):
        terms = []
        for r in requests:
            now = [log_p(lm, r.prompt, a) for a in (r.target_new, str(r.target_neg))]
            margin = (now[0] - base[r.prompt][0]) - (now[1] - base[r.prompt][1])
            terms.append(-alpha * now[0] - (1 - alpha) * logsigmoid(beta * margin))
    assert edit.notes["losses"][1] == pytest.approx(float(sum(terms) / 2), abs=1e-3)


@torch.no_grad()
def log_p(lm: LM, prompt: str, target: str) -> Tensor:
    encoded, first = lm.text.encode_pair(prompt, target)
    logits = logits_of(lm.run(torch.tensor([encoded.ids])))[0, first - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(encoded.ids[first:])[:, None]).sum()


def test_dpo_moves_away_from_the_old_answer() -> None:
    lm, request = toy.taught("llama"), toy.request()
    old = log_p(lm, request.prompt, str(request.target_neg))
    chances = []
    for alpha in (1.0, 0.5):
        with applied(lm, edit_of(lm, "DPO", [request], alpha=alpha, beta=1.0, num_steps=8, lr=2e-3)):
            chances.append(float(log_p(lm, request.prompt, str(request.target_neg))))
    assert chances[1] < chances[0] < float(old)


def test_dpo_asks_for_the_answer_to_move_away_from() -> None:
    bare = dataclasses.replace(toy.request(), target_neg=None, record="Record 2")
    with pytest.raises(UsageError, match=r"Record 2, field 'target_neg'.*DPO needs it.*Add 'target_neg'"):
        checked([bare], get_method("DPO"))


# ---- what is refused


@pytest.mark.parametrize(
    ("method", "settings", "said"),
    [
        ("LoRA", {"rank": 100}, "rank.*100, above the width 64 of.*at most 64"),
        ("LoRA", {"rank": 0}, "rank.*0.*from 1 on"),
        ("LoRA", {"lora_type": "dora"}, "'lora_type'.*'dora'.*'adalora'"),
        ("LoRA", {"lora_dropout": 1.0}, "'lora_dropout'.*share"),
        ("LoRA", {"target_modules": ["wi"]}, "'target_modules'.*no module wi"),
        ("LoRA_uns", {"num_steps": 0}, "'num_steps'.*LoRA_uns.*from 1 on"),
        ("QLoRA", {"quantization_bit": 3}, "quantization_bit is 3"),
        ("QLoRA", {"lora_r": 65}, "rank.*65, above the width 64"),
        ("DPO", {"alpha": 2.0}, "alpha is 2.0.*share from 0 to 1"),
        ("LocFT-BF", {"mini_batch": 0}, "'mini_batch'.*from 1 on"),
        ("LocFT-BF", {"layers": [9]}, "'layers'.*blocks 0 to 3"),
        ("FT_uns", {"objective_optimization": "last"}, "'objective_optimization' of FT_uns.*'target_new'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(method: str, settings: dict[str, Any], said: str) -> None:
    lm = toy.build("llama")
    before = bits(lm)
    with pytest.raises(UsageError, match=said):
        edit_of(lm, method, [toy.request()], **settings)
    assert untouched(lm, before)


@pytest.mark.parametrize("method", ["LoRA", "QLoRA", "DPO", "LoRA_uns"])
def test_without_peft_a_sentence_says_what_to_install(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"peft.*pip install 'easyeditor\[train\]'"):
        edit_of(toy.build("llama"), method, [toy.request()])


@pytest.mark.parametrize("method", ["FT", "LocFT-BF", "LoRA", "DPO"])
def test_a_loss_that_is_no_number_ends_in_a_sentence(method: str) -> None:
    lm = toy.build("llama")
    before = bits(lm)
    with pytest.raises(NonFinite, match=r"loss of step \d+ is (nan|inf).*Lower the learning rate 'lr'"):
        edit_of(lm, method, [toy.request()], lr=3e37)
    assert untouched(lm, before)


@pytest.mark.parametrize(("method", "lr"), [("FT", 5.0), ("LocFT-BF", 5.0), ("LoRA", 3.0), ("QLoRA", 3.0)])
def test_training_that_ruins_the_model_is_refused(method: str, lr: float) -> None:
    lm = LM.load("tinyfacts")
    before = bits(lm)
    with pytest.raises(EditFailed, match=r"'lr' of \d.*perplexity of e\^\S+ instead of e\^.*Lower 'lr'"):
        edit_of(lm, method, [EditRequest("The capital of France is", "Oslo")], lr=lr, num_steps=10)
    assert untouched(lm, before)


def test_a_small_change_is_not_tried_out(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = toy.build("llama")
    name = lm.weight_name(1)
    size = lm.mlp_out(1).weight.norm().item()
    monkeypatch.setattr("easyeditor.core.reading.speech", lambda lm: pytest.fail("it was tried out"))
    out, into = torch.zeros(64, 1), torch.zeros(256, 1)
    out[0], into[0] = 0.9 * size, 1.0
    refuse_ruin(lm, WeightEdit(deltas={name: LowRank(out, into)}), 0.1)
