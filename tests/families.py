"""Tiny models with random weights of every family that the library names, and a tokenizer of one token per word."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

from easyeditor.lm.model import LM
from local_models import Bare, baichuan, chatglm, internlm

VOCAB, WIDTH, DEPTH = 96, 32, 3
TEXT = (
    "the capital of is in lives where does live ? new york paris rome lima oslo ada bo cy ra su to vi a cat dog owl "
    "red green blue one two three four five six seven eight nine . , and then so The Therefore Because I You"
)
NL = "\n"

BASE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 3 * WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GATED: dict[str, Any] = {**BASE, "num_key_value_heads": 2, "head_dim": 8}
GPT: dict[str, Any] = {
    "n_embd": WIDTH,
    "n_layer": DEPTH,
    "n_head": 4,
    "n_positions": 128,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
EXPERTS: dict[str, Any] = {**GATED, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

# family -> model class, config class, settings, module path of the projection, its class
FAMILIES: dict[str, tuple[str, str, dict[str, Any], str, str]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT, "transformer.h.{}.mlp.c_proj", "Conv1D"),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", {**GPT, "rotary_dim": 4}, "transformer.h.{}.mlp.fc_out", "Linear"),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {
            "hidden_size": WIDTH,
            "num_layers": DEPTH,
            "num_heads": 4,
            "max_position_embeddings": 128,
            "attention_types": [[["global"], DEPTH]],
        },
        "transformer.h.{}.mlp.c_proj",
        "Linear",
    ),
    "neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", BASE, "gpt_neox.layers.{}.mlp.dense_4h_to_h", "Linear"),
    "llama": ("LlamaForCausalLM", "LlamaConfig", GATED, "model.layers.{}.mlp.down_proj", "Linear"),
    "mistral": ("MistralForCausalLM", "MistralConfig", GATED, "model.layers.{}.mlp.down_proj", "Linear"),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GATED, "model.layers.{}.mlp.down_proj", "Linear"),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", GATED, "model.layers.{}.mlp.down_proj", "Linear"),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", GATED, "model.layers.{}.mlp.down_proj", "Linear"),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", GATED, "model.layers.{}.mlp.down_proj", "Linear"),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", GATED, "model.layers.{}.mlp.down_proj", "Linear"),
    "falcon": (
        "FalconForCausalLM",
        "FalconConfig",
        {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": 4},
        "transformer.h.{}.mlp.dense_4h_to_h",
        "Linear",
    ),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            "hidden_size": WIDTH,
            "ffn_dim": 3 * WIDTH,
            "num_hidden_layers": DEPTH,
            "num_attention_heads": 4,
            "word_embed_proj_dim": WIDTH,
            "dropout": 0.0,
            "max_position_embeddings": 128,
        },
        "model.decoder.layers.{}.fc2",
        "Linear",
    ),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {"hidden_size": WIDTH, "n_layer": DEPTH, "n_head": 4},
        "transformer.h.{}.mlp.dense_4h_to_h",
        "Linear",
    ),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", GATED, "model.layers.{}.mlp.down_proj", "Linear"),
    "glm4": ("Glm4ForCausalLM", "Glm4Config", GATED, "model.layers.{}.mlp.down_proj", "Linear"),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", GATED, "model.layers.{}.mlp.c_proj", "Linear"),
    "qwen3_5": (
        "Qwen3_5ForCausalLM",
        "Qwen3_5TextConfig",
        {
            **GATED,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        "model.layers.{}.mlp.down_proj",
        "Linear",
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "d_model": WIDTH,
            "d_ff": 3 * WIDTH,
            "num_layers": DEPTH,
            "num_heads": 4,
            "d_kv": 8,
            "dropout_rate": 0.0,
            "decoder_start_token_id": 0,
        },
        "decoder.block.{}.layer.2.DenseReluDense.wo",
        "Linear",
    ),
}
OURS = {
    "baichuan": "model.layers.{}.mlp.down_proj",
    "internlm": "model.layers.{}.feed_forward.w2",
    "chatglm": "transformer.encoder.layers.{}.mlp.dense_4h_to_h",
}
MIXTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**GATED, "num_local_experts": 4}),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", {**GATED, "num_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**EXPERTS, "num_experts": 4}),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 24},
    ),
}


def raw(family: str, seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A model of a family with random weights, large enough that every place matters; changes go into its config."""
    torch.manual_seed(seed)
    if family in OURS:
        model: torch.nn.Module = {"baichuan": baichuan, "internlm": internlm, "chatglm": chatglm}[family](
            vocab_size=VOCAB, hidden_size=WIDTH, num_layers=DEPTH
        )
    elif family == "bare":
        model = Bare(VOCAB, WIDTH, DEPTH)
    else:
        cls, config, shape = {**FAMILIES, **MIXTURES}[family][:3]
        special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        model = getattr(transformers, cls)(
            getattr(transformers, config)(vocab_size=VOCAB, **special, **shape, **changes)
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:  # the default of 0.02 would leave a model that says the same to everything
                torch.nn.init.normal_(parameter, std=0.5 if "embed" in name or "wte" in name else 0.18)
    return model.eval()


def words(bos: bool = False) -> transformers.PreTrainedTokenizerFast:
    """One token per word and per line break."""
    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", NL, *dict.fromkeys(TEXT.split())]
    vocabulary += [f"w{i}" for i in range(len(vocabulary), VOCAB)]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|[^ \n]+"), "removed", invert=True)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def build(family: str, seed: int = 0, **kwargs: Any) -> LM:
    """A wrapped model of a family."""
    return LM.wrap(raw(family, seed), words(bos=family == "llama"), name=f"tiny-{family}", **kwargs)
