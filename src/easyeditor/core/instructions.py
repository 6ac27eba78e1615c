"""Instructions in front of prompts, which tell an editor of several tasks of which one an edit is. arXiv:2402.16123."""

from __future__ import annotations

import dataclasses
import re

from easyeditor.requests import EditRequest

TEMPLATE = "Task: {task}\nDescription: {description}\nInput: {prompt}"
FORM = re.compile(r"Task: (?P<task>[^\n]*)\nDescription: (?P<description>[^\n]*)\nInput: (?P<prompt>.*)", re.DOTALL)


def instructed(prompt: str, task: str, description: str) -> str:
    """A prompt behind an instruction; one that has an instruction already stays as it is.

    Args:
        prompt: What is asked.
        task: The name of the task, in one line.
        description: What the task is, in one line.
    """
    if FORM.fullmatch(prompt):
        return prompt
    return TEMPLATE.format(task=task, description=description, prompt=prompt)


def task_of(prompt: str) -> str | None:
    """The task that a prompt's instruction names; None if it has no instruction."""
    found = FORM.fullmatch(prompt)
    return found["task"] if found else None


def bare(prompt: str) -> str:
    """A prompt without its instruction."""
    found = FORM.fullmatch(prompt)
    return found["prompt"] if found else prompt


def with_instruction(request: EditRequest, task: str, description: str) -> EditRequest:
    """A request of a task: its prompt, its other wordings and what follows from it are asked behind the instruction.

    Args:
        request: The request.
        task: The name of the task.
        description: What the task is.

    Returns:
        A request whose first other wording is the prompt as it was; locality stays without the instruction.
    """
    wordings = (request.prompt, *(instructed(text, task, description) for text in request.rephrase_prompts))
    portability = {
        name: tuple(dataclasses.replace(probe, prompt=instructed(probe.prompt, task, description)) for probe in probes)
        for name, probes in request.portability.items()
    }
    prompt = instructed(request.prompt, task, description)
    return dataclasses.replace(request, prompt=prompt, rephrase_prompts=wordings, portability=portability)
