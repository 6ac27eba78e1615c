"""Models whose code is not part of transformers, with the naming and the shapes of well-known remote code, in small.

Baichuan has one projection `W_pack` for queries, keys and values; InternLM's remote code has the same plan and other
names. ChatGLM2 keeps hidden states as (length, rows, width) inside, returns tuples from its blocks and has a cache of
its own kind. `Bare` is a module that takes token ids and nothing else.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

HEADS = 4


class LocalConfig(PretrainedConfig):
    model_type = "local"

    def __init__(self, vocab_size: int = 96, hidden_size: int = 32, num_layers: int = 3, **kwargs) -> None:
        self.vocab_size, self.hidden_size, self.num_layers = vocab_size, hidden_size, num_layers
        super().__init__(**kwargs)


class BaichuanConfig(LocalConfig):
    model_type = "baichuan"


class InternLMConfig(LocalConfig):
    model_type = "internlm2"


class ChatGLMConfig(LocalConfig):
    model_type = "chatglm"


def rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotary positions of x (..., length, size) at positions broadcastable to (..., length)."""
    half = x.shape[-1] // 2
    angle = positions[..., None].float() / 100 ** (torch.arange(half, device=x.device) / half)
    a, b = x[..., :half].float(), x[..., half:].float()
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1).to(x.dtype)


def blocked(mask: torch.Tensor | None, rows: int, length: int, past: int) -> torch.Tensor:
    """True where a query may look, (rows, 1, length, past + length); a query that may look nowhere looks at itself."""
    query, key = torch.arange(length)[:, None] + past, torch.arange(past + length)[None]
    allowed = (key <= query)[None].expand(rows, -1, -1)
    if mask is not None:
        allowed = (allowed & mask[:, None].bool()) | (key == query)[None]
    return allowed[:, None]


# --- Baichuan and InternLM: packed attention, gated MLP, a tuple of keys and values as cache -----------------------


class Part(nn.Module):
    """A module whose parts go by the names of its family."""

    def __init__(self, names: dict[str, str]) -> None:
        super().__init__()
        self.names = names

    def put(self, part: str, module: nn.Module) -> None:
        setattr(self, self.names[part], module)

    def part(self, part: str) -> nn.Module:
        return getattr(self, self.names[part])


BAICHUAN = {
    "pack": "W_pack",
    "out": "o_proj",
    "gate": "gate_proj",
    "up": "up_proj",
    "down": "down_proj",
    "attention": "self_attn",
    "mlp": "mlp",
    "norm before attention": "input_layernorm",
    "norm before mlp": "post_attention_layernorm",
    "words": "embed_tokens",
    "head": "lm_head",
}
INTERNLM = {
    "pack": "wqkv",
    "out": "wo",
    "gate": "w1",
    "up": "w3",
    "down": "w2",
    "attention": "attention",
    "mlp": "feed_forward",
    "norm before attention": "attention_norm",
    "norm before mlp": "ffn_norm",
    "words": "tok_embeddings",
    "head": "output",
}


class PackedAttention(Part):
    def __init__(self, width: int, names: dict[str, str]) -> None:
        super().__init__(names)
        self.put("pack", nn.Linear(width, 3 * width, bias=False))
        self.put("out", nn.Linear(width, width, bias=False))

    def forward(self, hidden_states, allowed, position_ids, past_key_value=None):
        rows, length, width = hidden_states.shape
        packed = self.part("pack")(hidden_states).view(rows, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        query, key, value = packed[0], packed[1], packed[2]
        query, key = rotate(query, position_ids[:, None]), rotate(key, position_ids[:, None])
        if past_key_value is not None:
            key, value = torch.cat([past_key_value[0], key], 2), torch.cat([past_key_value[1], value], 2)
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
        return self.part("out")(out.transpose(1, 2).reshape(rows, length, width)), (key, value)


class GatedMLP(Part):
    def __init__(self, width: int, names: dict[str, str]) -> None:
        super().__init__(names)
        self.put("gate", nn.Linear(width, 3 * width, bias=False))
        self.put("up", nn.Linear(width, 3 * width, bias=False))
        self.put("down", nn.Linear(3 * width, width, bias=False))

    def forward(self, x):
        return self.part("down")(functional.silu(self.part("gate")(x)) * self.part("up")(x))


class PackedLayer(Part):
    def __init__(self, width: int, names: dict[str, str]) -> None:
        super().__init__(names)
        self.put("attention", PackedAttention(width, names))
        self.put("mlp", GatedMLP(width, names))
        self.put("norm before attention", nn.RMSNorm(width))
        self.put("norm before mlp", nn.RMSNorm(width))

    def forward(self, hidden_states, allowed, position_ids, past_key_value=None, use_cache=False):
        normed = self.part("norm before attention")(hidden_states)
        attended, present = self.part("attention")(normed, allowed, position_ids, past_key_value)
        hidden_states = hidden_states + attended
        hidden_states = hidden_states + self.part("mlp")(self.part("norm before mlp")(hidden_states))
        return (hidden_states, present) if use_cache else (hidden_states,)


class PackedModel(Part):
    def __init__(self, config: LocalConfig, names: dict[str, str]) -> None:
        super().__init__(names)
        self.put("words", nn.Embedding(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(PackedLayer(config.hidden_size, names) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size)

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=False):
        rows, length = input_ids.shape
        past = past_key_values[0][0].shape[2] if past_key_values else 0
        if position_ids is None:
            position_ids = torch.arange(past, past + length, device=input_ids.device)[None]
        allowed = blocked(attention_mask, rows, length, past)
        states, presents = self.part("words")(input_ids), ()
        for i, layer in enumerate(self.layers):
            out = layer(states, allowed, position_ids, past_key_values[i] if past_key_values else None, use_cache)
            states, presents = out[0], (*presents, *out[1:])
        return BaseModelOutputWithPast(self.norm(states), presents or None)


class BaichuanForCausalLM(PreTrainedModel):
    config_class = BaichuanConfig
    names = BAICHUAN

    def __init__(self, config: LocalConfig) -> None:
        super().__init__(config)
        self.model = PackedModel(config, self.names)
        setattr(self, self.names["head"], nn.Linear(config.hidden_size, config.vocab_size, bias=False))
        self.post_init()

    def get_output_embeddings(self):
        return getattr(self, self.names["head"])

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None):
        out = self.model(input_ids, attention_mask, position_ids, past_key_values, bool(use_cache))
        return CausalLMOutputWithPast(logits=self.get_output_embeddings()(out[0]), past_key_values=out.past_key_values)


class InternLMForCausalLM(BaichuanForCausalLM):
    config_class = InternLMConfig
    names = INTERNLM


# --- ChatGLM2: (length, rows, width) inside, blocks return (states, cache), a mask that is True where it hides ------


class SelfAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query_key_value = nn.Linear(width, 3 * width)
        self.dense = nn.Linear(width, width, bias=False)

    def forward(self, hidden_states, attention_mask, position_ids, kv_cache=None, use_cache=True):
        length, rows, width = hidden_states.shape
        query, key, value = self.query_key_value(hidden_states).view(length, rows, 3, HEADS, -1).unbind(2)
        turn = position_ids[:, None]  # (rows, 1, length)
        query, key = (rotate(t.permute(1, 2, 0, 3), turn).permute(2, 0, 1, 3) for t in (query, key))
        if kv_cache is not None:
            key, value = torch.cat([kv_cache[0], key]), torch.cat([kv_cache[1], value])
        present = (key, value) if use_cache else None
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        if attention_mask is None and query.shape[2] == key.shape[2]:
            out = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        else:
            allowed = None if attention_mask is None else ~attention_mask
            out = functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
        return self.dense(out.permute(2, 0, 1, 3).reshape(length, rows, width)), present


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(width, 6 * width, bias=False)
        self.dense_4h_to_h = nn.Linear(3 * width, width, bias=False)

    def forward(self, hidden_states):
        gate, up = self.dense_h_to_4h(hidden_states).chunk(2, dim=-1)
        return self.dense_4h_to_h(functional.silu(gate) * up)


class GLMBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.input_layernorm, self.self_attention = nn.RMSNorm(width), SelfAttention(width)
        self.post_attention_layernorm, self.mlp = nn.RMSNorm(width), MLP(width)

    def forward(self, hidden_states, attention_mask, position_ids, kv_cache=None, use_cache=True):
        normed = self.input_layernorm(hidden_states)
        attended, kv_cache = self.self_attention(normed, attention_mask, position_ids, kv_cache, use_cache)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)), kv_cache


class GLMTransformer(nn.Module):
    def __init__(self, config: LocalConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(GLMBlock(config.hidden_size) for _ in range(config.num_layers))
        self.final_layernorm = nn.RMSNorm(config.hidden_size)

    def forward(self, hidden_states, attention_mask, position_ids, kv_caches=None, use_cache=True):
        presents = () if use_cache else None
        for i, layer in enumerate(self.layers):
            cache = kv_caches[i] if kv_caches else None
            hidden_states, cache = layer(hidden_states, attention_mask, position_ids, cache, use_cache)
            presents = (*presents, cache) if use_cache else None
        return self.final_layernorm(hidden_states), presents


class ChatGLMModel(nn.Module):
    def __init__(self, config: LocalConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.encoder = GLMTransformer(config)
        self.output_layer = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, input_ids, position_ids=None, attention_mask=None, past_key_values=None, use_cache=True):
        rows, length = input_ids.shape
        past = past_key_values[0][0].shape[0] if past_key_values else 0
        if position_ids is None:
            position_ids = torch.arange(past, past + length, device=input_ids.device)[None].expand(rows, -1)
        hide = None
        if (attention_mask is not None and not attention_mask.all()) or (past and length != 1):
            hide = ~blocked(attention_mask, rows, length, past)
        states = self.embedding(input_ids).transpose(0, 1).contiguous()  # (length, rows, width)
        return self.encoder(states, hide, position_ids, past_key_values, use_cache)


class ChatGLMForConditionalGeneration(PreTrainedModel):
    config_class = ChatGLMConfig

    def __init__(self, config: LocalConfig) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.post_init()

    def forward(self, input_ids=None, position_ids=None, attention_mask=None, past_key_values=None, use_cache=None):
        states, presents = self.transformer(input_ids, position_ids, attention_mask, past_key_values, bool(use_cache))
        logits = self.transformer.output_layer(states).transpose(0, 1).contiguous()
        return CausalLMOutputWithPast(logits=logits, past_key_values=presents)


# --- a module that takes token ids and nothing else ----------------------------------------------------------------


class Bare(nn.Module):
    """No config, no mask, no positions, no cache; absolute positions; returns the logits themselves."""

    def __init__(self, vocab: int = 96, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(vocab, width), nn.Embedding(128, width)
        self.layers = nn.ModuleList(BareLayer(width) for _ in range(depth))
        self.head = nn.Linear(width, vocab)

    def forward(self, input_ids):
        states = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1]))
        for layer in self.layers:
            states = layer(states)
        return self.head(states)


class BareLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(width, HEADS, batch_first=True), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, states):
        length = states.shape[1]
        hide = torch.ones(length, length, dtype=torch.bool).triu(1)
        attended, _ = self.attention(states, states, states, attn_mask=hide, need_weights=False)
        states = states + attended
        return states + self.down(functional.gelu(self.up(self.norm(states))))


def baichuan(**shape) -> BaichuanForCausalLM:
    return BaichuanForCausalLM(BaichuanConfig(**shape))


def internlm(**shape) -> InternLMForCausalLM:
    return InternLMForCausalLM(InternLMConfig(**shape))


def chatglm(**shape) -> ChatGLMForConditionalGeneration:
    return ChatGLMForConditionalGeneration(ChatGLMConfig(**shape))
