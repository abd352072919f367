"""Attention over several processes: texts cut along ranks, and sharded batches and heads.

Everything is built on `torch.distributed`: NCCL between GPUs, gloo between CPUs.
"""

from .attention import (
    context_parallel_attn_func,
    context_parallel_attn_varlen_func,
    token_positions,
)
from .sharding import sharded_attn_func

__all__ = [
    "context_parallel_attn_func",
    "context_parallel_attn_varlen_func",
    "sharded_attn_func",
    "token_positions",
]
