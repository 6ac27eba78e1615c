"""A transformers model with its tokenizer, as an editor sees it: blocks, sites, head."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from easyeditor.errors import NotEditable, UsageError
from easyeditor.lm.loading import pretrained
from easyeditor.lm.structure import Site, discover, four_tokens, refusal
from easyeditor.lm.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger(__name__)


class Kept:
    """What stays with a transformers model, so that all who wrap it see the same edits; a copy starts without any.

    Attributes:
        ledger: The `Ledger` of the model, once there is one.
        rewriters: See `LM`.
        processors: See `LM`.
        board: What wrappers of modules leave for those higher up in the same pass, by name.
        picked: Which positions the head is applied to, where not to all; see `easyeditor.lm.resume.HeadAt`.
    """

    def __init__(self) -> None:
        self.ledger: Any = None
        self.board: dict[str, Any] = {}
        self.picked: Any = None
        self.rewriters: list[Callable[[str], str]] = []
        self.processors: list[Callable[[Tensor, Tensor], Tensor]] = []

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        """A copied or pickled model has its weights as they are, and no record of edits."""
        return Kept, ()


class LM:
    """A language model that can be edited. Build it with `LM.load` or `LM.wrap`.

    Attributes:
        model: The transformers model.
        tokenizer: Its tokenizer.
        text: Tokens and characters; see `easyeditor.lm.text`.
        name: Where the model came from.
        blocks: Its transformer blocks (the decoder's, for an encoder-decoder model).
        stack: Their module path.
        width: The width of the residual stream.
        sequence_first: Whether its blocks see (length, rows, width), as ChatGLM's do.
        rewriters: Functions on the prompt that prompt edits have put in place.
        processors: Functions on the logits that decoding edits have put in place.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, name: str, site: str | None, editable: bool) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.seq2seq = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        self.text = Text(tokenizer, self.seq2seq)
        ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        self.text.ends = tuple(ends) if isinstance(ends, list | tuple) else () if ends is None else (ends,)
        self.accepts = frozenset(inspect.signature(type(model).forward).parameters)
        self.kept = vars(model).setdefault("_easyeditor", Kept())
        self.rewriters, self.processors = self.kept.rewriters, self.kept.processors
        self.template = site.removesuffix(".weight") if site else None
        if away := next((name for name, p in model.named_parameters() if p.is_meta), None):
            raise NotEditable(
                f"{name} is loaded in part only: '{away}' is kept elsewhere until it is needed, so it cannot "
                "be changed. Expected all weights on a device. Load it with device='cpu', or over more devices."
            )
        with torch.no_grad():
            structure = discover(model, lambda: self.run(four_tokens(self.vocab, self.device)))
        self.blocks, self.stack, self.width = structure.blocks, structure.stack, structure.width
        self.sequence_first = structure.sequence_first
        self._mlp_out, self._attn_out = structure.mlp_out, structure.attn_out
        if self.template is not None:
            self._mlp_out = [self.site(self.template.format(i)).name for i in range(len(self.blocks))]
        if not self._mlp_out and editable:
            raise refusal(structure, model)

    @classmethod
    def wrap(
        cls,
        model: nn.Module,
        tokenizer: Any,
        *,
        name: str | None = None,
        rewrite_module_tmp: str | None = None,
        editable: bool = True,
    ) -> LM:
        """Make an editable model of a loaded one.

        Args:
            model: A transformers causal language model or encoder-decoder, or a module that behaves like one.
            tokenizer: Its tokenizer.
            name: How reports call it; None: the model's own name or its class.
            rewrite_module_tmp: Module path of the projection to edit, with ``{}`` for the block; None: found.
            editable: Whether a model without such a projection is an error.

        Returns:
            The wrapped model; the model itself is not changed.

        Raises:
            NotEditable: There is no projection that could be edited.
        """
        was_training = model.training
        model.eval()
        try:
            own = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
            return cls(model, tokenizer, name or own, rewrite_module_tmp, editable)
        except BaseException:
            model.train(was_training)
            raise

    @classmethod
    def load(
        cls,
        name_or_path: str | Path,
        dtype: str | torch.dtype | None = None,
        device: str | int | torch.device | None = None,
        device_map: str | Mapping[str, Any] | None = None,
        quantization: int | Mapping[str, Any] | None = None,
        *,
        rewrite_module_tmp: str | None = None,
        editable: bool = True,
        trust_remote_code: bool = False,
    ) -> LM:
        """Load a model and its tokenizer.

        Args:
            name_or_path: A folder, a hub id, or ``tinyfacts`` for the bundled model.
            dtype: Such as ``bfloat16``; None: that of the checkpoint.
            device: Where to put it; a number is that accelerator, or the CPU where there is none.
            device_map: Spread it over devices, such as ``auto``; needs the extra ``train``.
            quantization: 4 or 8: load the base in so many bits; needs bitsandbytes. Or the arguments of transformers'
                BitsAndBytesConfig.
            rewrite_module_tmp: See `wrap`.
            editable: See `wrap`.
            trust_remote_code: Whether code in the model's folder may run.

        Returns:
            The wrapped model.

        Raises:
            UsageError: There is no such model, or an argument is wrong.
            NotEditable: It has no projection that could be edited.
        """
        model, tokenizer = pretrained(name_or_path, dtype, device, device_map, quantization, trust_remote_code)
        return cls.wrap(
            model, tokenizer, name=str(name_or_path), rewrite_module_tmp=rewrite_module_tmp, editable=editable
        )

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights."""
        floating = (p.dtype for p in self.model.parameters() if p.is_floating_point())
        return next(floating, torch.float32)

    @property
    def _text_config(self) -> Any:
        config: Any = getattr(self.model, "config", None)
        return config.get_text_config() if hasattr(config, "get_text_config") else config

    @property
    def vocab(self) -> int:
        """The number of tokens it can say."""
        inner = self._text_config
        return int(getattr(inner, "vocab_size", 0) or getattr(inner, "padded_vocab_size", 0) or 5)

    @property
    def head(self) -> nn.Module:
        """The module that turns hidden states into logits.

        Raises:
            NotEditable: The model does not say which it is.
        """
        find = getattr(self.model, "get_output_embeddings", None)
        head = find() if find is not None else None
        if head is None:
            raise NotEditable(f"{type(self.model).__name__} names no output layer. Expected get_output_embeddings().")
        return head  # type: ignore[no-any-return]

    def mlp_out(self, layer: int) -> Site:
        """The projection of a block's MLP back into the residual stream: where ``W k = v`` holds."""
        return self.site(self._at(self._mlp_out, layer, "MLP"))

    def attn_out(self, layer: int) -> Site:
        """The projection of a block's attention back into the residual stream."""
        return self.site(self._at(self._attn_out, layer, "attention"))

    def _at(self, names: list[str], layer: int, what: str) -> str:
        if not names:
            raise NotEditable(f"{self.name}: no dense {what} projection was found in '{self.stack}'.")
        if not 0 <= layer < len(names):
            raise UsageError(
                f"Setting 'layers': {self.name} has blocks 0 to {len(names) - 1}, not {layer}. Choose one of these."
            )
        return names[layer]

    def site(self, path: str) -> Site:
        """The projection at a module path, as ``a.b[3].c`` or ``a.b.3.c``, with or without ``.weight``.

        Raises:
            UsageError: There is no such projection.
        """
        name = path.replace("[", ".").replace("]", "").removesuffix(".weight").removeprefix("model.model.model.")
        try:
            module = self.model.get_submodule(name)
        except AttributeError:
            near = [
                n
                for n, m in self.model.named_modules()
                if n.endswith(name.split(".")[-1]) and isinstance(m, nn.Linear | Conv1D)
            ]
            raise UsageError(
                f"{self.name} has no module '{name}'. Pass a module path such as '{near[0] if near else 'lm_head'}', "
                "or leave the setting out and it is found."
            ) from None
        if not isinstance(module, nn.Linear | Conv1D):
            raise UsageError(f"'{name}' of {self.name} is a {type(module).__name__}; expected a Linear or Conv1D.")
        return Site(name, module)

    def block_of(self, site: Site) -> int:
        """The index of the block that a site is in; the number of blocks for a site above them all."""
        tail = site.name.removeprefix(f"{self.stack}.")
        return int(tail.split(".")[0]) if tail != site.name else len(self.blocks)

    def run(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        encoder_outputs: Any = None,
        past: Any = None,
        use_cache: bool = False,
        last_only: bool = False,
    ) -> Any:
        """One forward pass, with those arguments that the model takes.

        Args:
            input_ids: (rows, length).
            attention_mask: (rows, length), or with the cached length in front.
            position_ids: (rows, length).
            decoder_input_ids: (rows, length), for an encoder-decoder model.
            encoder_outputs: What the encoder returned, instead of running it again.
            past: The cache of an earlier pass.
            use_cache: Whether to return one.
            last_only: Whether the logits of the last position are enough.

        Returns:
            The model's output.
        """
        if self.seq2seq and decoder_input_ids is None:
            decoder_input_ids = torch.full_like(input_ids[:, :1], self.decoder_start)
        offered = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "decoder_input_ids": decoder_input_ids,
            "encoder_outputs": encoder_outputs,
            "past_key_values": past,
            "logits_to_keep": 1 if last_only else None,
        }
        given = {key: value for key, value in offered.items() if value is not None and key in self.accepts}
        if "use_cache" in self.accepts:
            given["use_cache"] = use_cache
        return self.model(input_ids=input_ids, **given)

    @cached_property
    def pads_left(self) -> bool:
        """Whether left padding changes nothing: a model may ignore the mask, or count positions from the pads."""
        ids = four_tokens(self.vocab, self.device)[:1]
        padded = torch.cat([torch.full_like(ids[:, :2], self.text.pad_id), ids], dim=1)
        mask = (torch.arange(padded.shape[1], device=ids.device) >= 2).long()[None]
        with torch.no_grad():
            plain = logits_of(self.run(ids, torch.ones_like(ids)))[0, -1].float()
            shifted = logits_of(self.run(padded, mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)))[0, -1].float()
        bound = 1e-3 if self.dtype == torch.float32 else 5e-2
        return bool((plain - shifted).abs().max() <= bound * plain.abs().max())

    @property
    def decoder_start(self) -> int:
        """The token that a decoder of its own begins with."""
        config = self.model.config
        return int(getattr(config, "decoder_start_token_id", None) or 0)

    def rewrite(self, prompt: str) -> str:
        """The prompt as it is after the prompt edits that are in place, rendered through the chat template if on."""
        for rewriter in self.rewriters:
            prompt = rewriter(prompt)
        return self.text.render(prompt)

    def facts(self) -> dict[str, Any]:
        """What a preset row is matched by."""
        config, inner = getattr(self.model, "config", None), self._text_config
        rope = getattr(inner, "rope_parameters", None) or getattr(inner, "rope_scaling", None) or {}
        return {
            "model_type": getattr(config, "model_type", type(self.model).__name__),
            "layers": len(self.blocks),
            "width": self.width,
            "vocab": self.vocab,
            "inner": self.mlp_out(0).d_in if self._mlp_out else None,
            "rope_type": rope.get("rope_type", "default") if isinstance(rope, dict) else "default",
        }

    def weight_name(self, layer: int) -> str:
        """The name of the weight that is edited at a block."""
        return self.mlp_out(layer).weight_name

    def describe(self) -> dict[str, Any]:
        """What discovery found, for people: blocks, width, sites with shapes."""
        first = self.mlp_out(0) if self._mlp_out else None
        return {
            "name": self.name,
            "class": type(self.model).__name__,
            **self.facts(),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "dtype": str(self.dtype).removeprefix("torch."),
            "blocks": self.stack,
            "mlp_out": _as_template(self._mlp_out, self.stack),
            "attn_out": _as_template(self._attn_out, self.stack),
            "mlp_out_shape": [first.d_out, first.d_in] if first else None,
            "orientation": type(first.module).__name__ if first else None,
            "editable": bool(self._mlp_out),
        }

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """A context in which no parameter asks for a gradient; flags are put back after."""
        flags = [(p, p.requires_grad) for p in self.model.parameters()]
        for p, _ in flags:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p, flag in flags:
                p.requires_grad_(flag)


def logits_of(output: Any) -> Tensor:
    """The logits in a model's output, (rows, length, vocab)."""
    logits = getattr(output, "logits", None)
    found = logits if logits is not None else output if isinstance(output, Tensor) else output[0]
    assert isinstance(found, Tensor)
    return found


def _as_template(names: list[str], stack: str) -> str | None:
    return names[0].replace(f"{stack}.0.", f"{stack}.{{}}.", 1) if names else None
