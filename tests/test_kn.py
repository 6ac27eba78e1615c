"""Attribution to neurons against the plain loop, completeness, the sets of neurons, KN, and `trace --neurons`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from typer.testing import CliRunner

import toy
from easyeditor.cli import application, neuron_map
from easyeditor.core.likelihood import answer_logits, answers
from easyeditor.core.neurons import attribution, coarse, refined
from easyeditor.editors.perform import make_edit
from easyeditor.edits.delta import LowRank
from easyeditor.edits.edit import WeightEdit
from easyeditor.errors import EditFailed, NotEditable, UsageError
from easyeditor.hparams import complete
from easyeditor.lm.hooks import by_row, capture
from easyeditor.lm.model import LM
from easyeditor.registry import get_method

PROMPT, ANSWER = "the home of ada ra is", "oslo baker"


@contextmanager
def neurons(lm: LM, layer: int, column: int, x: Tensor) -> Iterator[None]:
    """A context in which the neurons of a block are x at one token of the only row."""

    def before(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        taken = by_row(args[0], 1, lm.sequence_first).clone()
        taken[0, column] = x
        return ((taken.transpose(0, 1) if lm.sequence_first else taken).reshape(args[0].shape),)

    handle = lm.mlp_out(layer).module.register_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()


def probability(lm: LM, layer: int, token: int, x: Tensor | None = None) -> Tensor:
    """P of an answer token with the neurons of a block as given, or as they are."""
    batch = answers(lm, [(PROMPT, ANSWER)])
    column = int(batch.columns[token])
    if x is None:
        return answer_logits(lm, batch).float().softmax(-1)[token, batch.labels[token]]
    with neurons(lm, layer, column, x):
        return answer_logits(lm, batch).float().softmax(-1)[token, batch.labels[token]]


@torch.no_grad()
def values(lm: LM, layer: int, token: int) -> Tensor:
    batch = answers(lm, [(PROMPT, ANSWER)])
    with capture(lm.mlp_out(layer).module, "input") as taken:
        answer_logits(lm, batch)
    return by_row(taken[0], 1, lm.sequence_first)[0, int(batch.columns[token])]


def plain(lm: LM, layer: int, steps: int) -> Tensor:
    """The paper's sum, one step and one token at a time, over the whole model."""
    scores = []
    for token in (0, 1):
        w, total = values(lm, layer, token), torch.zeros(())
        for k in range(1, steps + 1):
            x = (k / steps * w).requires_grad_(True)
            total = total + torch.autograd.grad(probability(lm, layer, token, x), [x])[0]
        scores.append(w * total / steps)
    return torch.stack(scores).mean(0)


@pytest.mark.parametrize("family", toy.FAMILIES)
def test_the_batched_attribution_is_the_plain_loop(family: str) -> None:
    lm = toy.build(family)
    found = attribution(lm, PROMPT, ANSWER, 5)
    for layer in range(len(lm.blocks)):
        expected = plain(lm, layer, 5).double()
        assert (found.scores[layer] - expected).norm() <= 1e-4 * expected.norm(), layer
    assert all(p.requires_grad and p.grad is None for p in lm.model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules())


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "t5"])
def test_attributions_add_up_to_what_the_neurons_do(family: str) -> None:
    lm = toy.build(family)
    found = attribution(lm, PROMPT, ANSWER, 400)
    with torch.no_grad():
        for layer in range(len(lm.blocks)):
            zero = torch.zeros_like(values(lm, layer, 0))
            change = sum(probability(lm, layer, t) - probability(lm, layer, t, zero) for t in (0, 1)) / 2
            off = float(found.scores[layer].sum()) - float(change)
            assert abs(off) <= 0.02 * abs(float(change)) + 2e-5, f"{layer}: {change}"


def test_the_size_of_a_batch_changes_nothing() -> None:
    lm = toy.build("llama")
    one, many = (attribution(lm, PROMPT, ANSWER, 6, batch_tokens=n) for n in (1, 4096))
    for a, b in zip(one.scores, many.scores, strict=True):
        assert torch.allclose(a, b, atol=1e-9, rtol=1e-4)
    assert one.probability == pytest.approx(many.probability)


def test_a_model_that_cannot_begin_in_the_middle_is_run_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = toy.build("gpt2")
    usual = attribution(lm, PROMPT, ANSWER, 3)

    def broken(*_: object) -> None:
        raise TypeError("no such way")

    monkeypatch.setattr("easyeditor.core.neurons.resumed", broken)
    for a, b in zip(usual.scores, attribution(lm, PROMPT, ANSWER, 3).scores, strict=True):
        assert torch.allclose(a, b, atol=1e-9, rtol=1e-4)


def test_coarse_and_refined_sets() -> None:
    scores = [torch.tensor([0.1, 1.0, -2.0]), torch.tensor([0.3, 0.21, 0.2])]
    found = coarse(scores, 0.2)
    assert [each.tolist() for each in found] == [[False, True, False], [True, True, False]]
    assert not any(each.any() for each in coarse([torch.tensor([-1.0, -2.0])], 0.2))
    other = (torch.tensor([False, False, False]), torch.tensor([True, False, True]))
    assert [each.tolist() for each in refined([found, other], 0.6)] == [[False] * 3, [True, False, False]]
    assert [each.tolist() for each in refined([found, other], 0.5)] == [[False, True, False], [True] * 3]


def test_no_steps_are_refused() -> None:
    with pytest.raises(UsageError, match="integration steps is 0"):
        attribution(toy.build("gpt2"), PROMPT, ANSWER, 0)


# The method


def edit_of(lm: LM, **given: object) -> WeightEdit:
    spec = get_method("KN")
    edit = make_edit(lm, spec, [toy.request()], complete(spec.hparams(**given), lm), {})
    assert isinstance(edit, WeightEdit)
    return edit


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_the_edit_writes_the_new_answer_at_the_neurons(family: str) -> None:
    lm = toy.build(family)
    request = toy.request()
    edit = edit_of(lm, steps=4, lr_scale=3.0)
    found = attribution(lm, request.prompt, str(request.ground_truth), 4)
    chosen = coarse(found.scores, 0.2)
    assert {lm.mlp_out(i).weight_name for i, mine in enumerate(chosen) if mine.any()} == set(edit.deltas)
    table = lm.head.weight.detach()  # type: ignore[union-attr]
    old, new = (lm.tokenizer(t, add_special_tokens=False)["input_ids"][0] for t in ("oslo", request.target_new))
    old = lm.tokenizer(str(request.ground_truth), add_special_tokens=False)["input_ids"][0]
    for layer, mine in enumerate(chosen):
        if mine.any():
            delta = edit.deltas[lm.mlp_out(layer).weight_name]
            assert isinstance(delta, LowRank)
            matrix = delta.left @ delta.right.T
            assert not matrix[:, ~mine].any(), "only the neurons' columns change"
            signed = matrix * torch.where(found.values[layer] < 0, -1.0, 1.0).float()
            assert torch.allclose(
                signed[:, mine], (6.0 * (table[new] - table[old]))[:, None].expand(-1, int(mine.sum()))
            )
    assert edit.notes["neurons"] == {str(i): m.nonzero().flatten().tolist() for i, m in enumerate(chosen) if m.any()}


def test_refining_takes_the_neurons_that_paraphrases_share() -> None:
    lm, request = toy.build("gpt2"), toy.request()
    prompts = [request.prompt, *request.rephrase_prompts]
    sets = [coarse(attribution(lm, p, str(request.ground_truth), 3).scores, 0.3) for p in prompts]
    shared = refined(sets, 0.6)
    neurons = {str(i): mine.nonzero().flatten().tolist() for i, mine in enumerate(shared) if mine.any()}
    assert neurons
    assert edit_of(lm, steps=3, adaptive_threshold=0.3, refine=True, p=0.6).notes["neurons"] == neurons
    assert edit_of(lm, steps=3, adaptive_threshold=0.3).notes["neurons"] != neurons
    with pytest.raises(EditFailed, match=r"found no neuron .* that 60% of 3 prompts share. Lower p"):
        edit_of(lm, steps=3, adaptive_threshold=1.0, refine=True, p=0.6)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"steps": 0}, "Setting 'steps' of KN is 0"),
        ({"p": 1.5}, "Setting 'p' of KN is 1.5. It is a share"),
        ({"adaptive_threshold": -0.1}, "Setting 'adaptive_threshold'"),
        ({"lr_scale": 0.0}, "Setting 'lr_scale'"),
    ],
)
def test_settings_that_make_no_sense(given: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        get_method("KN").hparams(**given).check()


def test_a_head_without_embeddings_of_the_streams_width(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = toy.build("gpt2")
    monkeypatch.setattr(LM, "head", nn.Linear(3, 5))
    with pytest.raises(NotEditable, match=r"output embeddings.*width 64.*FT"):
        edit_of(lm, steps=2)


# The command


def run(*args: object, code: int = 0) -> str:
    result = CliRunner().invoke(application(), ["trace", *map(str, args)])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.stdout if code == 0 else result.stderr


FACT = ("--neurons", "--prompt", "The capital of New Zealand is", "--steps", "4")


def test_trace_draws_neurons_by_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    picture = tmp_path / "neurons.png"
    document = json.loads(run(*FACT, "--out", picture, "--json"))
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert sorted(tmp_path.iterdir()) == [picture]
    assert document["answer"].startswith("Wellington")
    assert [layer["index"] for layer in document["layers"]] == list(range(10))
    text = run(*FACT)
    assert text.isascii() and max(map(len, text.splitlines())) <= 100
    rows = [line.split() for line in text.splitlines() if line.strip()[:1].isdigit()][:10]
    for row, layer in zip(rows, document["layers"], strict=True):
        assert float(row[1]) == pytest.approx(layer["total"], abs=6e-4)
        assert str(layer["strongest"][0][0]) in row
    count = sum(layer["count"] for layer in document["layers"])
    assert f"{count} neurons above 20% of the largest attribution" in text
    assert count > 0


def test_a_terminal_gets_a_coloured_bar() -> None:
    layers = [neuron_map.Layer(0, 0.5, 2, [(7, 0.4)]), neuron_map.Layer(1, -0.1, 0, [(3, 0.0)])]
    console = Console(force_terminal=True, color_system="truecolor", width=100)
    with console.capture() as seen:
        neuron_map.draw(console, layers)
    assert "38;2;8;81;156" in seen.get()
    assert list(neuron_map.summary(layers[1:], 0.2)) == ["0 neurons above 20% of the largest attribution: none."]


def test_the_picture_takes_any_prompt(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    layers = [neuron_map.Layer(0, 0.5, 2, [(7, 0.4), (1, 0.1)]), neuron_map.Layer(1, -0.1, 0, [(3, 0.0)])]
    neuron_map.save(layers, tmp_path / "odd.png", "a $x$ b_{ 東")
    assert (tmp_path / "odd.png").stat().st_size > 1000
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--prompt", "The capital of France is"), "needs --subject"),
        (("--neurons", "--prompt", " "), "The prompt is empty"),
        (("--neurons", "--prompt", "The capital of France is", "--target", " "), "no answer to the prompt"),
        ((*FACT, "--out", "map.jpg"), "ends in .png"),
        ((*FACT, "--model", "no/such"), "no/such"),
    ],
)
def test_what_the_command_refuses(args: tuple[str, ...], said: str) -> None:
    assert said in " ".join(run(*args, code=2).split())
