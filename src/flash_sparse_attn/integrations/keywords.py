"""The keywords that Transformers' models pass to attention: used, harmless, or refused."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from .masks import packed_borders

# Keywords that say something the mask, the cache or the arguments before them say already, or that
# are for other parts of a model.
_HARMLESS = {
    "cache_position",
    "input_ids",
    "is_causal",
    "labels",
    "logits_to_keep",
    "max_length_k",
    "max_length_q",
    "mm_token_type_ids",
    "num_items_in_batch",
    "output_hidden_states",
    "output_router_logits",
    "past_key_values",
    "position_embeddings",
    "position_ids",
    "return_dict",
    "seq_idx",
    "shift_labels",
    "sliding_window",
    "special_tokens_mask",
    "token_type_ids",
    "use_cache",
}
_USED = {"softcap", "deterministic", "cu_seq_lens_q", "cu_seq_lens_k"}
_REASONS = {
    "s_aux": "attention sinks that are learned (s_aux) are not supported; use 'eager'",
    "position_bias": "a position bias for every query and key is not supported; use 'eager'",
    "head_mask": "head masks are not supported; use 'eager'",
    "layer_head_mask": "head masks are not supported; use 'eager'",
    "indices": "lists of single keys are not supported; block_indices are, or use 'eager'",
    "output_attentions": "probabilities are never made; use 'eager' to look at them",
    "block_table": "continuous batching is not supported; use generate()",
}


def attention_options(
    module: nn.Module, scaling: float | None, dropout: float, keywords: dict[str, Any], *used: str
) -> dict[str, Any]:
    """Options of the attention functions from a model's keywords.

    Args:
        module: The attention layer, for messages.
        scaling: Factor of ``q k``.
        dropout: Of the probabilities; has to be 0.
        keywords: The model's keywords.
        *used: Keywords that the caller reads itself.

    Returns:
        `softmax_scale`, `softcap` and `deterministic`.

    Raises:
        ValueError: A keyword would change the result in a way that is not supported.
    """
    name = type(module).__name__
    if dropout:
        raise ValueError(
            f"dropout: expected 0 in {name}, got {dropout}; attention dropout is not supported, "
            "set config.attention_dropout = 0.0"
        )
    for keyword, value in keywords.items():
        if keyword in _HARMLESS or keyword in _USED or keyword in used:
            continue
        if value is None or value is False:
            continue
        if keyword in _REASONS:
            raise ValueError(f"{keyword}: {_REASONS[keyword]} (in {name})")
        # Switches, names and counts configure other parts; numbers and tensors are data.
        if isinstance(value, (Tensor, float)):
            raise ValueError(
                f"{keyword}: this keyword of {name} is unknown here and may change the result, got "
                f"{type(value).__name__}; use attn_implementation='eager', or leave it out"
            )
    deterministic = keywords.get("deterministic")
    if os.environ.get("FLASH_ATTENTION_DETERMINISTIC") == "1":  # Trainer's full_determinism
        deterministic = True
    return {
        "softmax_scale": scaling,
        "softcap": keywords.get("softcap"),
        "deterministic": deterministic,
    }


def packed_texts(keywords: dict[str, Any]) -> Tensor | None:
    """int32 borders of packed texts, from `cu_seq_lens_q` or from positions that begin anew.

    Raises:
        ValueError: Queries and keys have different borders.
    """
    borders, keys = keywords.get("cu_seq_lens_q"), keywords.get("cu_seq_lens_k")
    if borders is None and keys is None:
        return packed_borders(keywords.get("position_ids"))
    if borders is None or keys is None or borders.shape != keys.shape:
        raise ValueError("cu_seq_lens_q: expected both borders, of the same packed texts")
    if borders is not keys and checks.looks_at_values(borders) and not torch.equal(borders, keys):
        raise ValueError(
            "cu_seq_lens_k: expected the borders of cu_seq_lens_q, because packed texts have as "
            f"many queries as keys, got {keys.tolist()} and {borders.tolist()}"
        )
    return borders.int()
