"""What the kernels are told about the tensors of a call, scale, softcap and bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...plan import Plan
from .config import padded_head_dim

LOG2E = 1.4426950408889634


def is_aligned(*tensors: Tensor) -> bool:
    """Whether every row of 4-D tensors begins at a multiple of 16 bytes and is contiguous."""
    return all(
        t.stride(3) == 1
        and t.data_ptr() % 16 == 0
        and not any(stride % 8 for stride in t.stride()[:3])
        for t in tensors
    )


def are_short(*tensors: Tensor) -> bool:
    """Whether offsets of rows of a head, dimension 1 of 4, fit into 32 bits."""
    return all(
        (t.shape[1] - 1) * t.stride(1) + padded_head_dim(t.shape[3]) <= 1 << 31 for t in tensors
    )


def head_tiles(tensor: Tensor, block: list[int]) -> TensorDescriptor | None:
    """Descriptor of tiles ``[*block, D]`` of ``[B, length, heads, D]``, or ``None``: no such."""
    sizes, strides = list(tensor.shape), list(tensor.stride())
    if not is_aligned(tensor) or 0 in strides:
        return None
    # The stride of a dimension of size 1 means nothing, and need not be a valid one.
    strides = [8 if size == 1 else s for size, s in zip(sizes, strides, strict=True)]
    strides[3] = 1
    return TensorDescriptor(tensor, sizes, strides, [*block, padded_head_dim(sizes[3])])


def query_tiles(tensor: Tensor, group: int, block_m: int) -> TensorDescriptor | None:
    """Descriptor of tiles ``[1, T, G, D]`` of ``[B, Q, H, D]``, or ``None``: no such."""
    return None if block_m % group else head_tiles(tensor, [1, block_m // group, group])


def broadcast_strides(tensor: Tensor, heads_kv: int, group: int) -> tuple[int, int, int, int, int]:
    """Of a mask or bias ``({1|B}, {1|Hkv|H}, {1|Q}, {1|K})``; 0 where it has size 1.

    For batch entry, KV head, head in its group, query, key.
    """
    batch, head, query, key = (
        0 if size == 1 else stride
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    if tensor.shape[1] == heads_kv * group:
        return batch, head * group, head, query, key
    return batch, head, 0, query, key


def mask_strides(plan: Plan, heads_kv: int, group: int) -> tuple[int, int, int, int, int]:
    """`broadcast_strides` of the mask that the kernels read themselves, if there is one."""
    if plan.mask is None:
        return 0, 0, 0, 0, 0
    return broadcast_strides(plan.mask, heads_kv, group)


def pair_tensors(plan: Plan, call: Call) -> list[Tensor]:
    """The mask and the bias that tiles of queries and keys read themselves, as far as they exist.

    That is a bias that depends on the query, and a mask that the plan does not hold in bits.
    """
    bias = None if call.bias is None or call.bias.is_per_key else call.bias.tensor
    return [tensor for tensor in (plan.mask, bias) if tensor is not None]


def has_rows(plan: Plan, call: Call) -> bool:
    """Whether tiles of `pair_tensors` are read 8 keys of a row at a time.

    Slots are the keys, a multiple of 8 in number, and of every tensor keys are contiguous and rows
    begin at multiples of 8.
    """
    tensors = pair_tensors(plan, call)
    return (
        len(tensors) > 0
        and plan.slots == "keys"
        and plan.epochs is None
        and plan.key_len % 8 == 0
        and all(t.shape[3] > 1 and is_aligned(t) for t in tensors)
    )


def rest_arguments(out: Tensor, out_rest: Tensor | None) -> tuple[Tensor, int]:
    """`ptr_out_rest` and `has_rest` of the kernels.

    Where nothing is kept `out` itself stands in: a pointer of the same type and alignment, so that
    the size of a call compiles no kernel anew.
    """
    return (out, 0) if out_rest is None else (out_rest, 1)


def shares_bias(plan: Plan, call: Call, block_m: int, group: int) -> bool:
    """Whether the rows of a query in a tile see the same gathered slots with the same bias.

    Then tiles of `block_m` rows gather it once for the `group` heads of a KV head.
    """
    return (
        plan.slots == "gathered"
        and plan.members == 1
        and call.bias is not None
        and call.bias.kind == "pair"
        and call.bias.strides[2] == 0
        and group > 1
        and block_m % group == 0
    )


def plan_flags(plan: Plan) -> dict[str, Any]:
    """The constants that choose a kernel's variant for a plan."""
    return {
        "SLOTS": plan.slots,
        "HAS_MASK": plan.mask is not None,
        "MEMBERS": plan.members,
        "CLAMPS": plan.clamps_positions,
    }


def words_of_tile(block_m: int, group: int) -> int:
    """Most words of 32 queries that the queries of a tile of so many rows lie in."""
    if block_m % group == 0:
        return max(1, block_m // group // 32)
    return (block_m - 1) // group // 32 + 2


@dataclass(frozen=True)
class Bias:
    """An additive bias ``({1|B}, {1|Hkv|H}, {1|Q}, {1|K})`` and how the kernels walk it.

    Attributes:
        tensor: The bias, any float dtype, any strides.
        heads_kv: ``Hkv``.
        group: ``H / Hkv``.
        kind: ``"kv head"`` or ``"head"``: one value per key, for each KV head or each head.
            ``"pair"``: it depends on the query.
    """

    tensor: Tensor
    heads_kv: int
    group: int
    kind: str

    @classmethod
    def of(cls, tensor: Tensor, num_heads: int, heads_kv: int) -> Bias:
        """The bias of a call with so many heads."""
        group = num_heads // heads_kv
        if tensor.shape[2] > 1:
            kind = "pair"
        else:
            kind = "head" if tensor.shape[1] == num_heads and group > 1 else "kv head"
        return cls(tensor, heads_kv, group, kind)

    @property
    def is_per_key(self) -> bool:
        return self.kind != "pair"

    @property
    def members(self) -> int:
        """Values per key and KV head."""
        return self.group if self.kind == "head" else 1

    @property
    def strides(self) -> tuple[int, int, int, int, int]:
        """See `broadcast_strides`."""
        return broadcast_strides(self.tensor, self.heads_kv, self.group)

    @property
    def key_strides(self) -> tuple[int, int, int, int]:
        batch, head, member, _, key = self.strides
        return batch, head, member, key


@dataclass(frozen=True)
class Call:
    """Scale, softcap and bias of one call.

    Attributes:
        softmax_scale: Factor of ``q.k``.
        softcap: Bound of the scaled scores before the bias, 0.0 if off.
        bias: The bias, or ``None``.
    """

    softmax_scale: float
    softcap: float = 0.0
    bias: Bias | None = None

    @property
    def factors(self) -> tuple[float, float]:
        """`scale` and `softcap` of the kernels; see `tiles.scaled_scores`."""
        if self.softcap:
            return self.softmax_scale / self.softcap, self.softcap
        return self.softmax_scale * LOG2E, 0.0

    @property
    def is_plain(self) -> bool:
        """Whether it has no softcap, and at most a bias per key and KV head."""
        return not self.softcap and (self.bias is None or self.bias.kind == "kv head")

    @property
    def bias_tensor(self) -> Tensor | None:
        return None if self.bias is None else self.bias.tensor

    @property
    def bias_strides(self) -> tuple[int, int, int, int, int]:
        return (0, 0, 0, 0, 0) if self.bias is None else self.bias.strides

    @property
    def flags(self) -> dict[str, Any]:
        """The constants that choose a kernel's variant."""
        return {
            "KEY_BIAS": "none" if self.bias is None or not self.bias.is_per_key else self.bias.kind,
            "PAIR_BIAS": self.bias is not None and not self.bias.is_per_key,
            "HAS_SOFTCAP": bool(self.softcap),
        }


@dataclass(frozen=True)
class Saved:
    """What the backward kernels read: inputs, results of forward, and delta, which they fill.

    `out_rest` is what rounding took from `out`, ``None`` if that was not kept.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    out_rest: Tensor | None
    grad_out: Tensor
    norm: Tensor
    delta: Tensor

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.query.shape[2] // self.key.shape[2]

    @property
    def rows(self) -> range:
        """All (batch entry, KV head)."""
        return range(self.key.shape[0] * self.key.shape[2])
