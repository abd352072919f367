"""Dynamic mask attention as a layer: a learned score per key decides which keys are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn

from . import checks
from .dynamic_mask import dynamic_mask_attn_func, dynamic_mask_attn_varlen_func
from .intervals import sequence_bounds
from .scores import folded_key_scores
from .selection import MODES
from .window_cache import WindowCache

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Unpack

    from .distributed.ranks import Mesh

SCORE_ACTIVATIONS = ("softplus", "exp")


class AttentionOptions(TypedDict, total=False):
    """Options of `DynamicMaskAttention`: those of `dynamic_mask_attn_func`, and the mesh."""

    mode: str
    is_causal: bool | None
    keep_first: int
    keep_recent: int
    softmax_scale: float | None
    softcap: float | None
    backend: str | None
    mesh: Mesh | None


class DynamicMaskAttention(nn.Module):
    """Self-attention in which every query reads the ``W`` best-scored keys of its causal prefix.

    The score of a key is ``A * softplus(dt_proj(v_proj(x)))``, one number per KV head. It chooses
    the keys and is added to their logits, which is how it learns. ``A`` starts at 0: all scores are
    equal, the newer key wins ties, and the untrained layer is a sliding window. Parameters have the
    names and shapes of Doge in Transformers.

    Scores are computed in fp32, outside autocast, straight from `hidden_states`: a matrix product
    may give a token other last bits in another batch, and the last bit can decide a choice. The
    weights of `dt_proj` and `v_proj` are folded into one row per KV head, and products are summed
    in an order that depends on `hidden_size` alone. So the same hidden state has the same score,
    bit for bit, in training, prefill and decoding. `v_proj` and `dt_proj` have to stay plain linear
    layers (merge adapters before use), because their weights are read directly.

    Args:
        hidden_size: Width of `hidden_states`.
        num_heads: Query heads ``H``.
        window_size: ``W >= 1``, the number of keys that a query reads.
        num_kv_heads: Key-value heads ``Hkv``, a divisor of ``H``; default ``H``.
        head_dim: Head dimension ``D <= 256``; default ``hidden_size // num_heads``.
        qk_norm: RMS-normalise queries and keys per head.
        rope_theta: Base of the rotary embedding of queries and keys, e.g. 10000.0; default: none.
        score_activation: ``"softplus"``, or ``"exp"`` for ``exp(A * softplus(...))`` as in
            Transformers' Doge.
        bias: Whether the projections have biases.
        **attention: `AttentionOptions`: `mode`, `is_causal`, `keep_first`, `keep_recent`,
            `softmax_scale`, `softcap` and `backend` of `dynamic_mask_attn_func`, and `mesh`, a
            `DeviceMesh` of one dimension or a `ProcessGroup`: texts are cut along its ranks, as in
            `distributed.context_parallel_attn_func`, and every rank calls with its own tokens.
            Gradients of parameters are those of the rank's tokens, to be added over the ranks.

    Raises:
        TypeError, ValueError: An argument has a wrong type or value.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        window_size: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        qk_norm: bool = False,
        rope_theta: float | None = None,
        score_activation: str = "softplus",
        bias: bool = False,
        **attention: Unpack[AttentionOptions],
    ) -> None:
        super().__init__()
        checks.check_count("hidden_size", hidden_size, 1)
        checks.check_count("num_heads", num_heads, 1)
        checks.check_count("window_size", window_size, 1)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        checks.check_count("num_kv_heads", num_kv_heads, 1)
        if num_heads % num_kv_heads:
            raise ValueError(
                f"num_kv_heads: expected a divisor of num_heads = {num_heads}, got {num_kv_heads}"
            )
        if head_dim is None:
            if hidden_size % num_heads:
                raise ValueError(
                    f"head_dim: expected a value, because num_heads = {num_heads} does not divide "
                    f"hidden_size = {hidden_size}, got None"
                )
            head_dim = hidden_size // num_heads
        checks.check_count("head_dim", head_dim, 1)
        if head_dim > checks.MAX_HEAD_DIM:
            raise ValueError(f"head_dim: expected at most {checks.MAX_HEAD_DIM}, got {head_dim}")
        if rope_theta is not None and (head_dim % 2 or rope_theta <= 0):
            raise ValueError(
                f"rope_theta: expected a positive base and an even head_dim, got {rope_theta} and "
                f"head_dim = {head_dim}"
            )
        if score_activation not in SCORE_ACTIVATIONS:
            expected = " or ".join(SCORE_ACTIVATIONS)
            raise ValueError(f"score_activation: expected {expected}, got {score_activation!r}")
        defaults: dict[str, Any] = {"mode": "causal", "keep_first": 0, "keep_recent": 0}
        self.attention = {**defaults, **attention}
        self.mesh = self.attention.pop("mesh", None)
        _check_options(self.attention, self.mesh)

        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.window_size = window_size
        self.qk_norm = qk_norm
        self.rope_theta = rope_theta
        self.score_activation = score_activation

        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=bias)
        if qk_norm:
            self.q_norm = nn.RMSNorm(head_dim, eps=1e-6)
            self.k_norm = nn.RMSNorm(head_dim, eps=1e-6)
        self.A = nn.Parameter(torch.zeros(num_kv_heads))
        self.dt_proj = nn.Linear(num_kv_heads * head_dim, num_kv_heads, bias=bias)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_ids: Tensor | None = None,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: WindowCache | None = None,
        shard_lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """Attend within each sequence.

        Args:
            hidden_states: ``[B, S, hidden_size]``; packed ``[T, hidden_size]`` or ``[1, T, ...]``.
            position_ids: Integer ``[B, S]`` or ``[1, S]`` (packed: ``[T]`` or ``[1, T]``) for the
                rotary embedding, if any. Default: the number of real tokens before the token.
            key_mask: Bool ``[B, S]``, True for real tokens, padding left or right. Rows of padding
                are computed and mean nothing.
            cu_seqlens: int32 ``[N + 1]``, borders of packed sequences, which do not see each other;
                with a mesh those in the tokens of all ranks.
            cache: From `make_cache`. The tokens continue the cached text and are added to it.
            shard_lengths: With a mesh, the tokens of every rank; default: as many as here.

        Returns:
            A tensor in the shape of `hidden_states`.

        Raises:
            TypeError, ValueError: An argument does not fit, or two exclude each other. The cache is
                unchanged.
        """
        shape = hidden_states.shape
        self._check(hidden_states, key_mask, cu_seqlens, cache, shard_lengths)
        if cu_seqlens is not None:
            hidden_states = hidden_states.reshape(-1, self.hidden_size)

        query, key, value = (
            project(hidden_states).unflatten(-1, (-1, self.head_dim))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.qk_norm:  # under autocast the weights have the higher precision
            query = self.q_norm(query.to(self.q_norm.weight.dtype))
            key = self.k_norm(key.to(self.k_norm.weight.dtype))
        if self.rope_theta is not None:
            if position_ids is None and self.mesh is not None:
                from .distributed import token_positions

                position_ids = token_positions(
                    hidden_states, self.mesh, key_mask, cu_seqlens, shard_lengths
                )
            elif position_ids is None:
                position_ids = _positions(hidden_states, key_mask, cu_seqlens)
                if cache is not None:
                    position_ids = cache.seen_tokens[:, None] + position_ids
            position_ids = _fit_positions(position_ids, hidden_states)
            query, key = (rotate(x, position_ids, self.rope_theta) for x in (query, key))
        query, key = query.to(value.dtype), key.to(value.dtype)
        scores = self.scores(hidden_states)

        options = self.attention
        if cache is not None:
            names = options.keys() & {"softmax_scale", "softcap", "backend"}
            options = {name: options[name] for name in names}
            out = cache.step(query, key, value, scores, key_mask=key_mask, **options)
        elif self.mesh is not None:
            # Here, because there are builds of PyTorch without torch.distributed.
            from .distributed import context_parallel_attn_func, context_parallel_attn_varlen_func

            options = {name: options[name] for name in options.keys() - {"mode", "is_causal"}}
            options |= {"mesh": self.mesh, "shard_lengths": shard_lengths}
            if cu_seqlens is None:
                out = context_parallel_attn_func(
                    query, key, value, scores, self.window_size, key_mask=key_mask, **options
                )
            else:
                out = context_parallel_attn_varlen_func(
                    query, key, value, scores, cu_seqlens, self.window_size, **options
                )
        elif cu_seqlens is None:
            options = {**options, "key_mask": key_mask}
            out = dynamic_mask_attn_func(query, key, value, scores, self.window_size, **options)
        else:
            # The longest sequence is at most all; to know it better would be a sync on a GPU.
            borders = (cu_seqlens, cu_seqlens, len(query), len(query))
            out = dynamic_mask_attn_varlen_func(
                query, key, value, scores, *borders, self.window_size, **options
            )
        return self.o_proj(out.flatten(-2)).view(shape)

    def scores(self, hidden_states: Tensor) -> Tensor:
        """The score of every key, fp32 ``[B, Hkv, S]`` (packed ``[Hkv, T]``), differentiable.

        Equal to ``A * softplus(dt_proj(v_proj(x)))`` up to rounding; its bits depend on the token's
        hidden state and the parameters only.
        """
        for name in ("v_proj", "dt_proj"):
            if not isinstance(layer := getattr(self, name), nn.Linear):
                raise TypeError(
                    f"{name}: expected nn.Linear, got {type(layer).__name__}: its weight is folded "
                    "into the scores, which would miss what an adapter adds; merge the adapter"
                )
        exponential = self.score_activation == "exp"
        return folded_key_scores(hidden_states, self.v_proj, self.dt_proj, self.A, exponential)

    def make_cache(
        self,
        batch_size: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> WindowCache:
        """An empty `WindowCache` in the dtype (under autocast pass its) and device of `v_proj`."""
        weight = self.v_proj.weight
        return WindowCache(
            batch_size,
            self.num_kv_heads,
            self.head_dim,
            self.window_size,
            keep_first=self.attention["keep_first"],
            keep_recent=self.attention["keep_recent"],
            dtype=weight.dtype if dtype is None else dtype,
            device=weight.device if device is None else device,
            mode=self.attention["mode"],
        )

    def extra_repr(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.attention.items())
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"head_dim={self.head_dim}, window_size={self.window_size}, "
            f"rope_theta={self.rope_theta}, score_activation={self.score_activation!r}{options}"
        )

    def _check(
        self,
        hidden_states: Tensor,
        key_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        cache: WindowCache | None,
        shard_lengths: Sequence[int] | None,
    ) -> None:
        """Shapes of `forward`, and which arguments exclude each other."""
        shape, device = hidden_states.shape, hidden_states.device
        packed = cu_seqlens is not None
        form = "[T, hidden_size] or [1, T, hidden_size]" if packed else "[B, S, hidden_size]"
        rank = 2 if packed and len(shape) == 2 else 3
        if len(shape) != rank or shape[-1] != self.hidden_size or (packed and shape[-3:-2] > (1,)):
            raise ValueError(
                f"hidden_states: expected {form} with hidden_size = {self.hidden_size}, got "
                f"{tuple(shape)}; [T, hidden_size] goes with cu_seqlens"
            )
        if self.mesh is None and shard_lengths is not None:
            raise ValueError(
                f"shard_lengths: expected None without a mesh, got {shard_lengths}; make the layer "
                "with mesh="
            )
        if self.mesh is not None and cache is not None:
            raise ValueError(
                "cache: expected None with a mesh: decoding needs no more than the constant-size "
                "cache of one process; load the weights into a layer without mesh"
            )
        if cu_seqlens is not None:
            if self.mesh is None:  # else the borders are those of all ranks
                checks.check_cu_seqlens("cu_seqlens", cu_seqlens, shape[-2], device)
            if key_mask is not None or cache is not None:
                raise ValueError(
                    "cu_seqlens: expected neither key_mask nor cache with packed sequences; drop "
                    "the padding before packing, and decode in a batch"
                )
        if key_mask is not None:
            checks.check_key_mask(key_mask, tuple(shape[:2]), device)
        if cache is not None:
            sizes = (self.window_size, self.attention["keep_first"], self.attention["keep_recent"])
            own = (self.attention["mode"], shape[0], *sizes)
            sizes = (cache.window_size, cache.keep_first, cache.keep_recent)
            got = ("causal", len(cache.key), *sizes)
            if own != got:
                raise ValueError(
                    "cache: expected one for (mode, batch, window_size, keep_first, keep_recent) "
                    f"= {own}, got {got}; use make_cache()"
                )


def _check_options(attention: dict[str, Any], mesh: Mesh | None) -> None:
    known = AttentionOptions.__annotations__.keys()
    if unknown := attention.keys() - known:
        raise TypeError(f"unknown arguments {sorted(unknown)}; expected any of {sorted(known)}")
    mode, is_causal = attention["mode"], attention.get("is_causal")
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    if is_causal is (False if mode == "causal" else None):
        expected = "None or True" if mode == "causal" else "True or False"
        raise ValueError(f"is_causal: expected {expected} with mode={mode!r}, got {is_causal}")
    if mesh is not None and mode != "causal":
        raise ValueError(
            f"mode: expected 'causal' with a mesh, got {mode!r}; in the others keys do not leave, "
            "and all would have to travel"
        )
    checks.check_count("keep_first", attention["keep_first"], 0)
    checks.check_count("keep_recent", attention["keep_recent"], 0)
    checks.check_softcap(attention.get("softcap"))


def _positions(x: Tensor, key_mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The number of real tokens before each token ``x[..., S, :]`` of its sequence."""
    index = torch.arange(x.shape[-2], device=x.device)
    if cu_seqlens is not None:
        return index - sequence_bounds(cu_seqlens, len(index))[0]
    return index[None] if key_mask is None else (key_mask.cumsum(-1) - 1).clamp(min=0)


def _fit_positions(position_ids: Tensor, hidden_states: Tensor) -> Tensor:
    """Check positions and make them broadcast over ``hidden_states[..., 0]``."""
    shape, expected = position_ids.shape, hidden_states.shape[:-1]
    if not position_ids.is_floating_point():
        if len(expected) == 1 and shape == (1, *expected):
            return position_ids[0]
        if shape in (expected, (1, *expected[1:])):
            return position_ids
    raise ValueError(
        f"position_ids: expected integers of shape {tuple(expected)}, or one row for all, got "
        f"{position_ids.dtype} {tuple(shape)}"
    )


def rotate(x: Tensor, position: Tensor, theta: float) -> Tensor:
    """Rotary embedding of ``[..., S, heads, D]`` in fp32; dimensions ``d``, ``d + D / 2`` pair."""
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = position[..., None, None].float() * frequency
    first, second = x.float().split(half, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
