"""Tiny random models of Transformers, and how they are compared with their eager selves."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from compare import assert_fair
from torch import Tensor, nn

with warnings.catch_warnings():  # of what it imports
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers", "5.17", reason="needs Transformers 5.17")
transformers.logging.set_verbosity_error()

VOCABULARY = 300
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def make(name: str, **changes: Any) -> nn.Module:
    """A model in evaluation mode: Llama, Qwen3, Mistral, Doge, by class name without its end."""
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **changes})
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():  # sharper attention than at initialisation
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.08)
    return model


def make_minimax(**changes: Any) -> nn.Module:
    """MiniMax-M3's text model with a language head: one dense, one block-sparse layer."""
    from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as modeling

    sizes = {**SIZES, "eos_token_id": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
    sizes |= {"index_n_heads": 2, "index_head_dim": 16, "index_block_size": 4}
    sizes |= {"index_topk_blocks": 3, "index_local_blocks": 1, "rotary_dim": 8}
    sizes |= {"layer_types": ["full_attention", "minimax_m3_sparse"]}
    sizes |= {"mlp_layer_types": ["dense", "dense"], "dense_intermediate_size": 96}
    config = modeling.MiniMaxM3VLTextConfig(**{**sizes, **changes})
    config._attn_implementation = "eager"
    model = modeling.MiniMaxM3VLForCausalLM(config).eval()
    return model


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """Token numbers ``[B, S]``, each once, so that no two keys of a layer have equal scores."""
    order = torch.randperm(VOCABULARY - 3, generator=torch.Generator().manual_seed(seed)) + 3
    return order[: batch * length].view(batch, length)


def padding(kind: str | None, batch: int, length: int) -> Tensor | None:
    """``None``, or 0/1 ``[B, S]`` with padding ``"left"`` or ``"right"`` in every row."""
    if kind is None:
        return None
    mask = torch.ones(batch, length, dtype=torch.long)
    for row in range(batch):
        count = 3 + 4 * row
        mask[row, slice(0, count) if kind == "left" else slice(length - count, length)] = 0
    return mask


def with_attention(model: nn.Module, name: str) -> nn.Module:
    """A copy with another attention implementation."""
    other = copy.deepcopy(model)
    other.set_attn_implementation(name)
    return other


def logits_and_gradients(
    model: nn.Module, mask: Tensor | None, upstream: Tensor, **inputs: Any
) -> dict[str, Tensor]:
    """Logits of real tokens, and the gradients of all parameters that have one."""
    model.zero_grad()
    logits = model(attention_mask=mask, **inputs).logits
    if mask is not None:
        logits = logits * mask[..., None]
    (logits * upstream.to(logits.dtype)).sum().backward()
    found = {"logits": logits.detach()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name] = parameter.grad.clone()
    return found


@contextmanager
def softmax_in_fp64() -> Iterator[None]:
    """Eager attention asks for fp32 even in fp64, where the smallest number becomes -inf."""
    softmax = nn.functional.softmax

    def same_dtype(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        return softmax(x, dim=dim, dtype=x.dtype if x.dtype == torch.float64 else dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "softmax", same_dtype)
        yield


def assert_same_function(
    model: nn.Module, plain: nn.Module, mask: Tensor | None = None, **inputs: Any
) -> dict[str, Tensor]:
    """Logits and gradients of `model` are as near to fp64 as those of `plain`; returns them."""
    source = inputs.get("input_ids", inputs.get("inputs_embeds"))
    shape = torch.Size([*source.shape[:2], plain.config.get_text_config().vocab_size])
    # Small, so that gradients are about 1, as the absolute part of the rule assumes.
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(1)) / shape[:2].numel()
    results = logits_and_gradients(model, mask, upstream, **inputs)
    expected = logits_and_gradients(plain, mask, upstream, **inputs)
    with softmax_in_fp64():
        truth = logits_and_gradients(copy.deepcopy(plain).double(), mask, upstream, **inputs)
    assert results.keys() == truth.keys()
    for name, value in results.items():
        assert_fair(value, truth[name], expected[name], name)
    return results


def greedy(model: nn.Module, input_ids: Tensor, count: int = 16, **options: Any) -> Tensor:
    """Tokens and the logits of every step, ``[B, count]`` and ``[B, count, vocabulary]``."""
    options = {"do_sample": False, "max_new_tokens": count, **options}
    out = model.generate(input_ids, output_logits=True, return_dict_in_generate=True, **options)
    return out.sequences[:, input_ids.shape[1] :], torch.stack(out.logits, dim=1)
