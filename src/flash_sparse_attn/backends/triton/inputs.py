"""What the kernels are told about scale, softcap and bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

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


def query_tiles(tensor: Tensor, group: int, block_m: int) -> TensorDescriptor | None:
    """Descriptor of tiles ``[1, T, G, D]`` of ``[B, Q, H, D]``, or ``None`` if it has none."""
    sizes, strides = list(tensor.shape), list(tensor.stride())
    if block_m % group or not is_aligned(tensor) or 0 in strides:
        return None
    # The stride of a dimension of size 1 means nothing, and need not be a valid one.
    strides = [8 if size == 1 else s for size, s in zip(sizes, strides, strict=True)]
    strides[3] = 1
    block = [1, block_m // group, group, padded_head_dim(sizes[3])]
    return TensorDescriptor(tensor, sizes, strides, block)


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
        """Of batch entry, KV head, head in its group, query, key; 0 where the bias has size 1."""
        batch, head, query, key = (
            0 if size == 1 else stride
            for size, stride in zip(self.tensor.shape, self.tensor.stride(), strict=True)
        )
        if self.tensor.shape[1] == self.heads_kv * self.group:
            return batch, head * self.group, head, query, key
        return batch, head, 0, query, key

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
    def pair_tensor(self) -> Tensor | None:
        return None if self.bias is None or self.bias.is_per_key else self.bias.tensor

    @property
    def pair_strides(self) -> tuple[int, int, int, int, int]:
        if self.bias is None or self.bias.is_per_key:
            return 0, 0, 0, 0, 0
        return self.bias.strides

    @property
    def flags(self) -> dict[str, Any]:
        """The constants that choose a kernel's variant."""
        return {
            "KEY_BIAS": "none" if self.bias is None or not self.bias.is_per_key else self.bias.kind,
            "PAIR_BIAS": self.pair_tensor is not None,
            "HAS_SOFTCAP": bool(self.softcap),
        }
