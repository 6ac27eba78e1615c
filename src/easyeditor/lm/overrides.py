"""The few architectures whose editable projection structure alone does not settle, one reason each."""

from __future__ import annotations

from types import MappingProxyType

MLP_OUT = MappingProxyType(
    {
        "gemma3n_text": "mlp.down_proj",  # per-layer inputs have a projection back to the residual width of their own
        "gemma4": "mlp.down_proj",  # as above
        "gemma4_text": "mlp.down_proj",  # as above
        "rwkv": "feed_forward.value",  # its receptance gate is as wide as the residual stream
        "xlstm": "ffn.proj_down",  # the mLSTM's output projection is not named as attention
    }
)
