r"""ICE: the new fact in front of the prompt; IKE without demonstrations. Zheng et al., EMNLP 2023. arXiv:2305.12740.

Idea      Tell the model the new fact in its context and change nothing.
Equation  p(y | x, edit) = p(y | "New Fact: " prompt " " target "\nPrompt: " x).
Changes   The prompt. The answer stands in the context, and every table of scores says so.
Needs     Nothing but prompt and answer.
Relations IKE puts demonstrations of copying, updating and retaining in front.
Deviates  In nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from easyeditor.edits.edit import Edit, PromptEdit
from easyeditor.errors import UsageError
from easyeditor.hparams import HyperParams
from easyeditor.lm.model import LM
from easyeditor.registry import method
from easyeditor.requests import EditRequest


@dataclass(kw_only=True)
class IKEHyperParams(HyperParams):
    """Settings of ICE, and of IKE in existing files."""

    alg_name: str = "ICE"
    sentence_model_name: str = "./hugging_cache/all-MiniLM-L6-v2"  # finds demonstrations; ICE has none
    k: int = 16  # how many demonstrations; ICE has none
    results_dir: str = "./results"  # kept for existing files
    use_icl_examples: bool = False  # whether to put demonstrations in front; not available with ICE

    also: ClassVar[tuple[str, ...]] = ("IKE",)

    def check(self) -> None:
        """No demonstrations."""
        if self.use_icl_examples:
            raise UsageError(
                "Setting 'use_icl_examples' is on, and this version has no store of demonstrations. "
                "Set it to false: the new fact then stands alone in front of the prompt (ICE)."
            )


@method("ICE", hparams=IKEHyperParams, paper="arXiv:2305.12740", requests="many", kind="prompt", aliases=("IKE",))
def ice(
    lm: LM,
    requests: Sequence[EditRequest],
    hparams: IKEHyperParams,
    state: Mapping[str, Any],
    history: Sequence[Edit],
) -> PromptEdit:
    """The facts, to be put in front of every prompt."""
    return PromptEdit(context=tuple((request.prompt, request.target_new) for request in requests))
