"""The command `easyedit`: what each verb prints, and that wrong input gets one sentence and the right exit code."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from easyeditor.cli import VERBS, application

MODEL = "tinyfacts"
PROMPT, SUBJECT, OLD, NEW = "The capital of France is", "France", "Paris", "Rome"
PARAPHRASE, NEIGHBOUR = "Which city is the capital of France?", "The capital of Germany is"
QUICK = ["--set", "v_num_grad_steps=2"]  # where the answer does not matter
FACT = ["--prompt", PROMPT, "--subject", SUBJECT, "--target", NEW]


def run(*args: object, code: int = 0) -> Result:
    result = CliRunner().invoke(application(), [str(arg) for arg in args])
    assert result.exit_code == code, f"{args}: {result.output}"
    return result


def document(*args: object) -> Any:
    """What a verb prints with ``--json``; there is nothing else on stdout."""
    return json.loads(run(*args, "--json").stdout)


def refused(*args: object, code: int) -> str:
    """The one sentence that a wrong input gets."""
    result = run(*args, code=code)
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    said = [line for line in lines if line.startswith("easyedit: ")]
    assert len(said) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return said[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An edit made and saved by the command; not to be changed."""
    folder = tmp_path_factory.mktemp("cli") / "edit"
    report = document("edit", *FACT, "--rephrase", PARAPHRASE, "--locality", NEIGHBOUR, "-m", MODEL, "--save", folder)
    assert report["saved"] == str(folder)
    answers = {each["prompt"]: each for each in report["answers"]}
    assert OLD in answers[PROMPT]["before"]
    assert NEW in answers[PROMPT]["after"]
    assert answers[PROMPT]["as_wanted"]
    assert {each["kind"] for each in report["answers"]} == {"edited", "paraphrase", "neighbour"}
    assert report["seconds"] > 0
    return folder


@pytest.fixture(scope="module")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the bundled model with other weights."""
    import torch

    from easyeditor.lm.model import LM

    lm = LM.load(MODEL)
    with torch.no_grad():
        for weight in lm.model.parameters():
            weight.mul_(1.01)
    folder = tmp_path_factory.mktemp("cli") / "other"
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture-of-experts model, which has no projection to edit."""
    from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

    from easyeditor.lm.loading import locate

    tokenizer = AutoTokenizer.from_pretrained(locate(MODEL))
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_local_experts": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    folder = tmp_path_factory.mktemp("cli") / "experts"
    MixtralForCausalLM(MixtralConfig(vocab_size=len(tokenizer), **sizes, **heads)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_help_names_every_verb_and_imports_nothing_heavy() -> None:
    text = run("--help").stdout
    assert all(name in text for name, _ in VERBS)
    program = (
        "import sys; from typer.testing import CliRunner; from easyeditor.cli import application\n"
        "assert CliRunner().invoke(application(), ['edit', '--help']).exit_code == 0\n"
        "sys.exit(' '.join(m for m in ('torch', 'transformers', 'numpy', 'yaml') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


@pytest.mark.parametrize("verb", [name for name, _ in VERBS])
def test_every_verb_explains_itself_and_speaks_json(verb: str) -> None:
    text = run(verb, "--help").stdout
    assert "--json" in text
    assert "--debug" in text


def test_an_edit_is_shown_before_and_after(saved: Path) -> None:
    table = run("edit", *FACT, *QUICK, "--rephrase", PARAPHRASE, "-m", MODEL).stdout
    assert PARAPHRASE in table
    assert "Nothing was saved" in table


def test_a_saved_edit_changes_answers_only_while_it_is_on(saved: Path) -> None:
    edited = document("ask", PROMPT, "-m", MODEL, "--edits", saved)
    plain = document("ask", PROMPT, NEIGHBOUR, "-m", MODEL)
    assert NEW in edited["answers"][0]["answer"]
    assert OLD in plain["answers"][0]["answer"]
    assert [each["prompt"] for each in plain["answers"]] == [PROMPT, NEIGHBOUR]
    assert NEW in run("ask", PROMPT, "-m", MODEL, "--edits", saved).stdout


def test_show_tells_what_an_edit_holds_without_the_model(saved: Path) -> None:
    shown = document("show", saved)
    (edit,) = shown["edits"]
    assert (edit["method"], edit["kind"]) == ("ROME", "weights")
    assert edit["requests"][0]["target_new"] == NEW
    assert edit["sites"][0]["rank"] == 1
    assert edit["sites"][0]["fingerprint"]
    text = run("show", saved).stdout
    assert all(
        word in text for word in (PROMPT, NEW, "ROME", edit["sites"][0]["name"], edit["sites"][0]["fingerprint"])
    )


def test_a_merged_folder_loads_with_plain_transformers(saved: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    run("merge", "--edits", saved, "--out", merged, "-m", MODEL)
    program = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"folder = {str(merged)!r}\n"
        "t, m = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)\n"
        f"ids = t({PROMPT!r}, return_tensors='pt')\n"
        "out = m.generate(**ids, max_new_tokens=5, do_sample=False)[0, ids['input_ids'].shape[1]:]\n"
        "assert 'easyeditor' not in sys.modules; sys.stdout.write(t.decode(out))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert NEW in done.stdout
    edited = document("ask", PROMPT, PARAPHRASE, NEIGHBOUR, "-m", MODEL, "--edits", saved)
    assert document("ask", PROMPT, PARAPHRASE, NEIGHBOUR, "-m", merged)["answers"] == edited["answers"]


def test_a_file_of_facts_is_edited(tmp_path: Path) -> None:
    rows = [{"prompt": PROMPT, "target_new": NEW}, {"prompt": NEIGHBOUR, "target_new": "Oslo"}]
    file = tmp_path / "facts.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    report = document("edit", file, "--method", "ICE", "-m", MODEL)
    assert report["facts"] == 2
    assert [each["prompt"] for each in report["answers"]] == [PROMPT, NEIGHBOUR]


def test_eval_writes_each_record_and_sums_up(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    report = document("eval", "tinyfacts:tuning", "--method", "ICE", "-m", MODEL, "--limit", 2, "--out", results)
    records = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    assert len(records) == report["facts"] == 2
    assert all({"pre", "post", "case_id", "requested_rewrite"} <= record.keys() for record in records)
    assert report["scores"]["post"]["rewrite_gen"]["n"] == 2
    run("eval", "tinyfacts", "--method", "ICE", "-m", MODEL, "--limit", 1, "--out", results, "--force")
    assert len(results.read_text(encoding="utf-8").splitlines()) == 1
    assert len(results.with_name("results.jsonl.old").read_text(encoding="utf-8").splitlines()) == 2
    args = ("eval", "tinyfacts", "--method", "ICE", "-m", MODEL, "--limit", 2, "--sequential", "--out")
    assert "Make it first" in run(*args, tmp_path / "new" / "sequence.jsonl", code=2).stderr
    (tmp_path / "new").mkdir()
    table = run(*args, tmp_path / "new" / "sequence.jsonl").stdout
    assert "rewrite_gen" in table
    assert "stands in the prompt" in table
    lines = (tmp_path / "new" / "sequence.jsonl").read_text(encoding="utf-8").splitlines()
    assert all("final" in json.loads(line) for line in lines)


def test_methods_and_models_are_listed_and_looked_into() -> None:
    names = {each["name"] for each in document("methods")}
    assert {"ROME", "FT", "GRACE", "ICE"} <= names
    assert all(name in run("methods").stdout for name in names)
    rome = document("methods", "rome")
    assert {each["name"]: each for each in rome["settings"]}["v_lr"]["note"]
    assert "tinyfacts" in rome["presets"]
    assert "Equation" in run("methods", "ROME").stdout
    assert {"tinyfacts", "gpt2-xl"} <= {each["model"] for each in document("models")}
    assert "gpt2-xl" in run("models").stdout
    found = document("models", MODEL)
    assert found["editable"]
    assert found["mlp_out"] in run("models", MODEL).stdout


def test_the_demo_takes_its_edit_back_exactly() -> None:
    shown = document("demo", "-m", MODEL)
    assert shown["bit_exact"]
    assert OLD in shown["restored"]
    edited = shown["answers"][0]
    assert OLD in edited["before"]
    assert NEW in edited["after"]
    assert {each["kind"] for each in shown["answers"]} == {"edited", "paraphrase", "neighbour"}
    assert "--save" in run("demo", "-m", MODEL).stdout


EDIT = ("edit", "-m", MODEL)
USAGE = {
    "no fact": (EDIT, "--target"),
    "a file and a fact": ((*EDIT, "facts.json", *FACT), "one of the two"),
    "no such file": ((*EDIT, "nowhere.json"), "nowhere.json"),
    "missing subject": ((*EDIT, "--prompt", PROMPT, "--target", NEW), "subject"),
    "subject not in the prompt": ((*EDIT, *FACT, "--subject", "Spain"), "Spain"),
    "empty target": ((*EDIT, "--prompt", PROMPT, "--target", " ", "--subject", SUBJECT), "target_new"),
    "unknown method": ((*EDIT, *FACT, "--method", "ROMA"), "ROME"),
    "misspelt setting": ((*EDIT, *FACT, "--set", "v_lrr=1"), "v_lr"),
    "setting of a wrong type": ((*EDIT, *FACT, "--set", "v_lr=fast"), "v_lr"),
    "setting without a value": ((*EDIT, *FACT, "--set", "v_lr"), "KEY=VALUE"),
    "no such settings": ((*EDIT, *FACT, "--hparams", "nowhere/x.yaml"), "nowhere"),
    "no such block": ((*EDIT, *FACT, "--set", "layers=[99]"), "99"),
    "no such model folder": (("edit", *FACT, "-m", "./nowhere"), "nowhere"),
    "no such device": ((*EDIT, *FACT, "--device", "abacus"), "abacus"),
    "no such dtype": ((*EDIT, *FACT, "--dtype", "float7"), "float7"),
    "ask: no such model folder": (("ask", PROMPT, "-m", "./nowhere"), "nowhere"),
    "ask: no saved edit": (("ask", PROMPT, "-m", MODEL, "--edits", "nowhere"), "nowhere"),
    "merge: no saved edit": (("merge", "-m", MODEL, "--edits", "nowhere", "--out", "merged"), "nowhere"),
    "show: no saved edit": (("show", "nowhere"), "nowhere"),
    "eval: no such file": (("eval", "nowhere.json", "-m", MODEL), "nowhere.json"),
    "eval: no such half": (("eval", "tinyfacts:best", "-m", MODEL), "best"),
    "eval: unknown method": (("eval", "tinyfacts", "--method", "GRASE"), "GRACE"),
    "methods: unknown": (("methods", "GRASE"), "GRACE"),
    "models: no such folder": (("models", "./nowhere"), "nowhere"),
    "demo: unknown method": (("demo", "--method", "ROMA"), "ROME"),
}


@pytest.mark.parametrize("case", USAGE)
def test_wrong_usage_gets_one_sentence_and_exit_code_2(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    args, word = USAGE[case]
    assert word in refused(*args, code=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "args", [("edit", "--nonsense"), ("eval",), ("asks", "x"), ("eval", "tinyfacts", "--limit", "0")]
)
def test_unknown_verbs_and_options_exit_with_2(args: tuple[str, ...]) -> None:
    result = run(*args, code=2)
    assert "Traceback" not in result.output


def test_a_folder_that_exists_is_kept(saved: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    assert "--force" in refused("edit", *FACT, "-m", MODEL, "--save", saved, code=2)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert "--force" in refused("merge", "--edits", saved, "--out", saved, "-m", MODEL, code=2)
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    refused("edit", *FACT, "-m", MODEL, "--save", tmp_path, "--force", code=2)
    refused("eval", "tinyfacts", "-m", MODEL, "--out", tmp_path / "mine.txt", code=2)
    assert (tmp_path / "mine.txt").read_text(encoding="utf-8") == "mine"


def test_a_model_that_cannot_be_edited_is_refused_and_can_be_looked_into(experts: Path) -> None:
    said = refused("edit", *FACT, "-m", experts, code=2)
    assert "xpert" in said or "projection" in said
    assert document("models", experts)["editable"] is False


def test_an_edit_for_another_base_is_refused(saved: Path, other_base: Path) -> None:
    expected = document("show", saved)["edits"][0]["sites"][0]["fingerprint"]
    said = refused("ask", PROMPT, "-m", other_base, "--edits", saved, code=1)
    assert expected in said
    assert "--force" in said
    run("ask", PROMPT, "-m", other_base, "--edits", saved, "--force")


@pytest.mark.parametrize("file", ["edit.json", "edit.safetensors"])
@pytest.mark.parametrize("harm", ["cut", "gone", "noise"])
def test_a_damaged_edit_is_told(saved: Path, tmp_path: Path, file: str, harm: str) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(saved, folder)
    content = (folder / file).read_bytes()
    if harm == "gone":
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content[: len(content) // 2] if harm == "cut" else b"\xff" * len(content))
    code = 2 if (file, harm) == ("edit.json", "gone") else 1
    for args in (("show", folder), ("ask", PROMPT, "-m", MODEL, "--edits", folder)):
        assert "damaged" in refused(*args, code=code)


def test_what_is_no_weight_edit_cannot_be_merged(tmp_path: Path) -> None:
    folder = tmp_path / "in-context"
    run("edit", *FACT, "-m", MODEL, "--method", "ICE", "--save", folder)
    assert "--edits" in refused("merge", "-m", MODEL, "--edits", folder, "--out", tmp_path / "merged", code=2)
    assert not (tmp_path / "merged").exists()


def test_the_same_edit_twice_is_refused(saved: Path) -> None:
    refused("ask", PROMPT, "-m", MODEL, "--edits", saved, "--edits", saved, code=2)


def test_an_unexpected_error_is_one_sentence_unless_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("gears\nare stuck")

    monkeypatch.setattr("easyeditor.registry.methods", broken)
    said = refused("methods", code=1)
    assert "gears are stuck" in said
    assert "--debug" in said
    result = CliRunner().invoke(application(), ["methods", "--debug"])
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "gears" in result.stderr


@contextmanager
def small_files() -> Iterator[None]:
    """Meanwhile no file may grow beyond two kilobytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_loses_nothing(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "edit"
    shutil.copytree(saved, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with small_files():
        said = refused("edit", *FACT, *QUICK, "-m", MODEL, "--save", folder, "--force", code=1)
    assert "could not be written" in said
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["edit"]


def _own_mounts() -> bool:
    tried = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False)
    return tried.returncode == 0


@pytest.mark.skipif(shutil.which("unshare") is None or not _own_mounts(), reason="needs a mount namespace of its own")
def test_a_full_disk_loses_nothing(saved: Path, tmp_path: Path) -> None:
    size = sum(path.stat().st_size for path in saved.iterdir())
    script = (
        'set -e; mount -t tmpfs -o size="$3" none "$1"; cp -r "$2" "$1/edit"; cd "$1"; shift 3\n'
        'code=0; "$@" || code=$?; ls -A; cd edit; sha256sum *; exit $code'
    )
    disk = tmp_path / "disk"
    disk.mkdir()
    edit = [sys.executable, "-m", "easyeditor.cli", *EDIT, *FACT, *QUICK, "--save", "edit", "--force"]
    shell = ["unshare", "-rm", "sh", "-c", script, "sh", disk, saved, str(int(size * 1.5)), *edit]
    done = subprocess.run([str(arg) for arg in shell], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr
    sums = subprocess.run("sha256sum *", shell=True, cwd=saved, capture_output=True, text=True, check=True).stdout
    assert done.stdout == f"edit\n{sums}"


def test_the_answer_to_turn_away_from() -> None:
    args = ["edit", *FACT, "--method", "DPO", "-m", MODEL]
    missing = CliRunner().invoke(application(), args)
    assert missing.exit_code == 2 and "'target_neg'" in missing.stderr
    told = run(*args, "--target-neg", "Paris", "--json").stdout
    assert json.loads(told)["answers"][0]["as_wanted"] is True


def test_the_unrelated_text() -> None:
    args = ["edit", *FACT, "--method", "WISE", "-m", MODEL]
    missing = CliRunner().invoke(application(), args)
    assert missing.exit_code == 2 and "'loc_prompt'" in missing.stderr
    told = run(*args, "--loc-prompt", "The capital of Germany is Berlin", "--json").stdout
    assert json.loads(told)["answers"][0]["as_wanted"] is True
