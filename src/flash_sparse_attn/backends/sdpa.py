"""Calls that ask for nothing but plain attention: the kernels that PyTorch brings, cuDNN or flash.

Chosen by itself, not by name: no mask, no bias, no softcap, and no need for repeatable gradients.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ..intervals import KeySelection
from ..problem import Problem

_MIN_QUERIES = 16  # fewer are decoded, with the keys split over programs


def unsupported(problem: Problem) -> list[str]:
    """Why these kernels cannot run a call, or would not with the same meaning."""
    reasons = []
    if problem.device.type != "cuda" or torch.version.hip is not None:
        reasons.append(f"they run on NVIDIA GPUs, the tensors are on {problem.device}")
    elif _capability(problem.device) < (8, 0):
        reasons.append(f"the GPU has capability {_capability(problem.device)}, 8.0 is needed")
    if problem.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"they take fp16 and bf16, query is {problem.dtype}")
    if problem.selection is not None or problem.mask_shape is not None:
        reasons.append("they take no mask")
    if problem.bias_shape is not None:
        reasons.append("they take no bias that learns")
    if problem.softcap:
        reasons.append("they have no softcap")
    if problem.deterministic:
        reasons.append("their gradients are not repeatable")
    if problem.packed is not None:
        reasons.append("they take no packed sequences")
    if problem.head_dim % 8:
        reasons.append(f"head dimensions are multiples of 8, not {problem.head_dim}")
    if problem.query_len < _MIN_QUERIES:
        reasons.append(f"{problem.query_len} queries are too few to fill a GPU")
    if problem.is_causal and problem.query_len > problem.key_len:
        reasons.append("the first queries see no key")
    return reasons


def attention(
    problem: Problem,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | KeySelection | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``out [B, Q, H, D]`` and ``lse [B, H, Q]``; neither mask nor bias is given."""
    query, key, value = (
        (tensor if tensor.stride(-1) == 1 else tensor.contiguous()).transpose(1, 2)
        for tensor in (query, key, value)
    )
    if _takes_cudnn(problem, query, key, value):
        results = torch.ops.aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, 0.0, problem.is_causal, scale=problem.softmax_scale
        )
    else:
        # Its causal mask is bottom-right, as ours: that of `scaled_dot_product_attention` is not.
        results = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, problem.is_causal, scale=problem.softmax_scale
        )
    out, lse = results[:2]
    return out.transpose(1, 2), lse.detach().reshape(out.shape[:3])


def _takes_cudnn(problem: Problem, query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether cuDNN has the kernel: it is the faster one, where causality is the usual one."""
    if _capability(problem.device) < (9, 0) or torch.compiler.is_compiling():
        return False  # a compiler cannot ask, and the other is on every machine
    if problem.is_causal and problem.query_len != problem.key_len:
        return False
    has_groups = problem.num_heads != problem.num_kv_heads
    asked = torch.backends.cuda.SDPAParams(
        query, key, value, None, 0.0, problem.is_causal, has_groups
    )
    return torch.backends.cuda.can_use_cudnn_attention(asked)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
