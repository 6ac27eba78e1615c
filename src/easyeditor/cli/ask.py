"""`easyedit ask`: what a model answers, as it is or with saved edits on it."""

from __future__ import annotations

from typing import Annotated

import typer

from easyeditor.cli.common import door, emit, load, out, put_on, saved, table
from easyeditor.cli.options import ChatOption, DebugOption, DeviceOption, DtypeOption, JsonOption, ModelOption
from easyeditor.errors import UsageError


@door
def ask(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT", help="The text in front of the answer.")],
    model: ModelOption = "tinyfacts",
    edits: Annotated[
        list[str] | None, typer.Option("--edits", metavar="DIR", help="A saved edit to put on first. Repeatable.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 24,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    chat: ChatOption = False,
    force: Annotated[bool, typer.Option("--force", help="Put an edit on a base it was not made for.")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Ask a model, with or without saved edits.

    Answers are greedy: the same question gets the same answer.
    """
    from easyeditor.lm.generate import answer

    if any(not prompt.strip() for prompt in prompts):
        raise UsageError("A prompt is empty. Give a text for the model to go on from.")
    changes = saved(edits or [])  # first, so that a damaged folder is told before a model is loaded
    lm = load(model, device, dtype, editable=bool(changes))
    lm.text.chat = chat
    put_on(lm, changes, force)
    answers = answer(lm, prompts, max_new_tokens=max_new_tokens)
    if as_json:
        pairs = [{"prompt": prompt, "answer": text} for prompt, text in zip(prompts, answers, strict=True)]
        emit({"model": model, "edits": edits or [], "answers": pairs})
        return
    out().print(table("", ("prompt", "answer"), zip(prompts, answers, strict=True)))
