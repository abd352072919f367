"""What the processes of `test_distributed` run: ``job(group, ...)``."""

from __future__ import annotations

import datetime
import os
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from flash_sparse_attn import DynamicMaskAttention
from flash_sparse_attn.distributed import (
    context_parallel_attn_func,
    context_parallel_attn_varlen_func,
    sharded_attn_func,
    survivors,
)

Inputs = dict[str, Tensor]
Group = dist.ProcessGroup
# Where tokens lie in each tensor of a call.
TOKENS = {"query": 1, "key": 1, "value": 1, "scores": 2, "grad": 1, "key_mask": 1}
PACKED_TOKENS = {"query": 0, "key": 0, "value": 0, "scores": 1, "grad": 0, "key_mask": 0}


def cut(inputs: Inputs, lengths: list[int], group: Group, packed: bool = False) -> Inputs:
    """The shard of a rank."""
    rank = dist.get_rank(group)
    begin = sum(lengths[:rank])
    where = PACKED_TOKENS if packed else TOKENS
    return {
        name: tensor.narrow(where[name], begin, lengths[rank]).clone()
        for name, tensor in inputs.items()
    }


def attend(
    group: Group,
    inputs: Inputs,
    lengths: list[int],
    window: int,
    options: dict[str, Any],
    fan: int = 8,
    repeats: int = 1,
    mesh: Any = None,
) -> list[Inputs]:
    """Output and gradients of a rank's shard, as often as asked for."""
    survivors.FAN = fan
    packed = "cu_seqlens" in inputs
    borders = [inputs["cu_seqlens"]] if packed else []
    inputs = {name: tensor for name, tensor in inputs.items() if name != "cu_seqlens"}
    shard = cut(inputs, lengths, group, packed)
    grad = shard.pop("grad")
    mask = shard.pop("key_mask", None)
    call = context_parallel_attn_varlen_func if packed else context_parallel_attn_func
    results = []
    for _ in range(repeats):
        leaves = [tensor.clone().requires_grad_() for tensor in shard.values()]
        out, lse = call(
            *leaves,
            *borders,
            window,
            mesh=mesh or group,
            key_mask=mask,
            shard_lengths=lengths,
            return_lse=True,
            **options,
        )
        grads = torch.autograd.grad(out, leaves, grad)
        named = dict(zip((f"d{name}" for name in shard), grads, strict=True))
        results.append({"out": out.detach(), "lse": lse, **named})
    survivors.FAN = 8
    return results


def run_layer(
    group: Group,
    layer: DynamicMaskAttention,
    hidden: Tensor,
    grad: Tensor,
    lengths: list[int],
    options: dict[str, Any],
) -> Inputs:
    """A layer's output for a shard, and gradients of the shard and of the parameters."""
    layer.mesh = group
    packed = options.get("cu_seqlens") is not None
    begin, dim = sum(lengths[: group.rank()]), 0 if packed else 1
    shard = [x.narrow(dim, begin, lengths[group.rank()]) for x in (hidden, grad)]
    if (mask := options.get("key_mask")) is not None:
        options = {**options, "key_mask": mask.narrow(1, begin, lengths[group.rank()])}
    leaf = shard[0].clone().requires_grad_()
    out = layer(leaf, shard_lengths=lengths, **options)
    out.backward(shard[1])
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"out": out.detach(), "dhidden": leaf.grad, **grads}


def run_sharded_layer(
    group: Group, layer: DynamicMaskAttention, hidden: Tensor, grad: Tensor
) -> Inputs:
    """`run_layer` with parameters that FSDP2 shards over the ranks that the texts lie on."""
    size = group.size()
    mesh = init_device_mesh("cpu", (size,))
    layer.mesh = mesh
    fully_shard(layer, mesh=mesh)
    shard = [x.chunk(size, dim=1)[group.rank()] for x in (hidden, grad)]
    out = layer(shard[0])
    out.backward(shard[1])
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"out": out.detach()} | {name: value.full_tensor() for name, value in grads.items()}


def attend_sharded(
    group: Group,
    shape: tuple[int, ...],
    placements: list[str],
    inputs: Inputs,
    window: int,
    options: dict[str, Any],
) -> list[Tensor]:
    """Output, lse and gradients of whole tensors, sharded over a mesh of all processes."""
    mesh = init_device_mesh("cpu", shape)
    order = {"query": "btn", "key": "btn", "value": "btn", "scores": "bnt", "key_mask": "bt"}

    def place(name: str, tensor: Tensor) -> DTensor:
        dims = [order[name].find(letter) for letter in placements]
        return distribute_tensor(tensor, mesh, [Shard(d) if d >= 0 else Replicate() for d in dims])

    names = ("query", "key", "value", "scores")
    leaves = [place(name, inputs[name]).requires_grad_() for name in names]
    if "key_mask" in inputs:
        options = {**options, "key_mask": place("key_mask", inputs["key_mask"])}
    out, lse = sharded_attn_func(*leaves, window, return_lse=True, **options)
    grads = torch.autograd.grad(out, leaves, place("query", inputs["grad"]))
    return [tensor.full_tensor() for tensor in (out.detach(), lse, *grads)]


def attend_on(group: Group, kind: str, inputs: Inputs, window: int) -> Inputs:
    """`attend` of all processes on a mesh of some kind."""
    size = group.size()
    if kind == "mesh":
        mesh: Any = init_device_mesh("cpu", (size,))
    else:
        mesh = init_device_mesh("cpu", (1, size), mesh_dim_names=("data", "context"))
        mesh = mesh["context"] if kind == "named" else mesh
    lengths = [inputs["key"].shape[1] // size] * size
    return attend(group, inputs, lengths, window, {}, mesh=mesh)[0]


def call(group: Group, arguments: dict[str, Any]) -> None:
    """A call with ``arguments[rank]`` in place of the usual ones."""
    usual = {
        "query": torch.zeros(1, 4, 2, 4),
        "key": torch.zeros(1, 4, 1, 4),
        "value": torch.zeros(1, 4, 1, 4),
        "scores": torch.zeros(1, 1, 4),
        "window_size": 2,
        "mesh": group,
    }
    context_parallel_attn_func(**{**usual, **arguments[dist.get_rank(group)]})


def count_traffic(group: Group, inputs: Inputs, window: int) -> list[int]:
    """Bytes received by exchanges of forward, and of forward and backward."""
    received = []
    exchange = dist.all_to_all_single

    def watched(output: Tensor, *args: Any, **options: Any) -> Any:
        received.append(output.nbytes)
        return exchange(output, *args, **options)

    size = group.size()
    lengths = [inputs["key"].shape[1] // size] * size
    shard = cut(inputs, lengths, group)
    grad = shard.pop("grad")
    leaves = [tensor.requires_grad_() for tensor in shard.values()]
    dist.all_to_all_single = watched
    try:
        out = context_parallel_attn_func(*leaves, window, mesh=group)
        forward = sum(received)
        torch.autograd.grad(out, leaves, grad)
    finally:
        dist.all_to_all_single = exchange
    return [forward, sum(received)]


def miss_a_call(group: Group) -> float:
    """Seconds until a rank gives up that waits for one which never calls."""
    size = group.size()
    impatient = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=2))
    if dist.get_rank(group) == size - 1:
        return 0.0
    start = time.monotonic()
    try:
        call(impatient, [{}] * size)
    except RuntimeError:
        return time.monotonic() - start
    raise AssertionError("the call went through without the other rank")


def die(group: Group) -> None:
    """The last rank ends in the middle of a job."""
    if dist.get_rank(group) == group.size() - 1:
        os._exit(1)
    call(group, [{}] * group.size())
