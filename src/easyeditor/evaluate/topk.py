"""How many of the likeliest tokens an edit left in place, from logits at hand, as EasyEdit's functions have them."""

from __future__ import annotations

from typing import Any

import torch

from easyeditor.errors import UsageError

KINDS = (("locality", "text", 1), ("multimodal_locality", "image", 10))


def get_aligned_topk_token_ids(pre_logits: Any, post_logits: Any, k: int) -> tuple[list[Any], list[Any]]:
    """The k likeliest tokens before and after an edit, at the last places that both have.

    Args:
        pre_logits: Before the edit, (rows, length, vocab), as a tensor or nested lists.
        post_logits: After it; its length may be another one.
        k: How many, at most the vocabulary.

    Returns:
        Token ids before and after, (rows, shorter length, k), the likeliest first.

    Raises:
        UsageError: The shapes do not belong together.
    """
    before, after = torch.as_tensor(pre_logits), torch.as_tensor(post_logits)
    if before.dim() != 3 or after.dim() != 3 or len(before) != len(after):
        raise UsageError(
            f"Logits of the shapes {tuple(before.shape)} and {tuple(after.shape)} cannot be compared. Pass (rows, "
            "length, vocab) of the same rows."
        )
    length, k = min(before.shape[1], after.shape[1]), min(k, before.shape[2], after.shape[2])
    found = [each[:, each.shape[1] - length :].topk(k, dim=-1).indices.tolist() for each in (before, after)]
    return found[0], found[1]


def attach_topk_locality_metrics(metrics: dict[str, Any]) -> None:
    """Put agreement in the place of the logits of a record, which is changed.

    Args:
        metrics: A record with ``pre`` and ``post``. Logits under ``locality_output`` become ``locality_topk_tokens``
            and, in ``post``, ``locality_acc``, the share of places whose likeliest token stayed; those under
            ``multimodal_locality_output`` likewise, by the ten likeliest tokens, place by place.
    """
    pre, post = metrics["pre"], metrics["post"]
    for name, kind, k in KINDS:
        if f"{name}_output" not in post:
            continue
        before, after = get_aligned_topk_token_ids(pre.pop(f"{name}_output"), post.pop(f"{name}_output"), k)
        pre[f"{name}_topk_tokens"], post[f"{name}_topk_tokens"] = before, after
        post[f"{name}_acc"] = float((torch.tensor(before) == torch.tensor(after)).double().mean())
        protocol = f"pre_post_top{k}_token_match"
        post.setdefault("metric_meta", {})[f"locality.{kind}"] = {
            "result_key": f"{name}_acc",
            "semantic": "locality",
            "protocol": protocol,
            "scorer": f"top{k}_token_match",
            "comparable_group": f"locality.multimodal.{protocol}",
            "higher_is_better": True,
        }
