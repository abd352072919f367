"""Exact decoding state of constant size: the keys that later queries can still see, and no others.

A score does not depend on the query, so a key that ``W`` better keys have overtaken is invisible
for ever. What a query sees therefore depends on the survivors alone: at most ``window_size +
keep_first + keep_recent`` keys per KV head, however long the text. A step costs O(W) time and no
new memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks
from .attention import flash_sparse_attn_func
from .backends import eager_window, triton
from .backends.triton import decode_ops
from .intervals import NEVER
from .quantize import FP8
from .selection import KeySelection, select_keys
from .window_state import EMPTY, SIZES, TENSORS, WindowState

# Tokens of a step for which the decoding kernels, which take them one by one, are fastest.
_MAX_TOKENS = 8


class WindowCache:
    """Keys, values, scores and positions of the survivors of a text that is read once, in order.

    The cache gives what `dynamic_mask_attn_func` gives over the whole text with the same scores,
    whatever the lengths of the pieces the text arrives in; ``mode="causal"`` only. The bias is the
    score. Every batch entry and KV head keeps its own survivors. The stored state carries no
    graph: a step is differentiable in its own arguments, not in those of earlier calls.

    On a GPU, `step` with up to 8 tokens of fp16 or bf16 runs two kernels for each, without autograd
    and without waiting for the GPU, and can be captured in a CUDA graph: what decides is in the
    state, at addresses that stay (but for `to`, and `reorder` to another batch size).

    Attributes:
        key: ``[B, Hkv, C, D]``, the survivors' keys in any order, with ``C = window_size +
            keep_first + keep_recent`` slots. A new key takes the slot of one that was evicted.
        value: ``[B, Hkv, C, D]``.
        score: fp32 ``[B, Hkv, C]``.
        position: int64 ``[B, Hkv, C]``, the number of real tokens before the key; -1: empty slot.
        threshold: int64 ``[B, Hkv]``, the ``W``-th best score and position in one number.
        seen_tokens: int64 ``[B]``, the number of real tokens read.
        evicted_at: int64 ``[B]``, the value of `seen_tokens` when a key was last evicted.
        key_scale, value_scale: fp32 ``[B, Hkv, C]``, what each stored key and value is multiplied
            by, for a dtype of 8 bits; else ``None``.

    Args:
        batch_size: Number of sequences ``B``.
        num_kv_heads: Number of key-value heads ``Hkv``.
        head_dim: Head dimension ``D <= 256``.
        window_size: ``W``, the number of best keys that a query sees.
        keep_first: First tokens that stay visible for ever, on top of the ``W``.
        keep_recent: Newest tokens that are visible whatever their score, on top of the ``W``.
        dtype: dtype of keys and values; default: torch's default dtype. With
            ``torch.float8_e4m3fn`` they are stored in 8 bits with a scale for each, and arrive in
            16 or 32 bits.
        device: Device of the state; default: torch's default device.
        mode: ``"causal"``; the others are refused with the reason.
    """

    key: Tensor
    value: Tensor
    score: Tensor
    position: Tensor
    threshold: Tensor
    seen_tokens: Tensor
    evicted_at: Tensor
    key_scale: Tensor | None
    value_scale: Tensor | None

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        window_size: int,
        *,
        keep_first: int = 0,
        keep_recent: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        mode: str = "causal",
    ) -> None:
        if mode != "causal":
            raise ValueError(
                f"mode: a WindowCache serves 'causal' only, got {mode!r}: there a key that leaves "
                "the window never returns and can be forgotten. 'shared' ranks the whole text, "
                "later tokens included, and 'relu' has no bound; keep all keys for them"
            )
        checks.check_count("batch_size", batch_size, 1)
        checks.check_count("num_kv_heads", num_kv_heads, 1)
        checks.check_count("head_dim", head_dim, 1)
        checks.check_count("window_size", window_size, 1)
        checks.check_count("keep_first", keep_first, 0)
        checks.check_count("keep_recent", keep_recent, 0)
        if head_dim > checks.MAX_HEAD_DIM:
            raise ValueError(f"head_dim: expected at most {checks.MAX_HEAD_DIM}, got {head_dim}")
        dtype = _float_dtype(dtype or torch.get_default_dtype())

        self.window_size = window_size
        self.keep_first = keep_first
        self.keep_recent = keep_recent
        slots = (batch_size, num_kv_heads, window_size + keep_first + keep_recent)
        self.key = torch.zeros(*slots, head_dim, dtype=dtype, device=device)
        self.value = torch.zeros_like(self.key)
        self.score = torch.zeros(slots, dtype=torch.float32, device=device)
        self.position = torch.full(slots, -1, dtype=torch.int64, device=device)
        self.threshold = torch.full(slots[:2], EMPTY, dtype=torch.int64, device=device)
        self.seen_tokens = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.evicted_at = torch.zeros_like(self.seen_tokens)
        self.key_scale = self.value_scale = None
        if dtype == FP8:
            self.key_scale, self.value_scale = torch.zeros_like(self.score), self.score.clone()

    @property
    def state(self) -> WindowState:
        """The tensors and sizes as one record."""
        return WindowState(*(getattr(self, name) for name in (*TENSORS, *SIZES)))

    @property
    def nbytes(self) -> int:
        """Bytes of the whole state. They do not depend on the length of the text."""
        return sum(tensor.nbytes for tensor in self.state.tensors())

    def prefill(
        self, key: Tensor, value: Tensor, scores: Tensor, *, key_mask: Tensor | None = None
    ) -> None:
        """Read tokens without attending, in constant extra memory: a prompt, or piece by piece.

        Args:
            key: ``[B, T, Hkv, D]`` in the dtype and on the device of the cache.
            value: ``[B, T, Hkv, D]``.
            scores: fp16, bf16 or fp32 ``[B, Hkv, T]``.
            key_mask: Bool ``[B, T]``, True for real tokens. Padding is never stored.

        Raises:
            TypeError, ValueError: An argument does not fit. The cache is unchanged.
        """
        self._check(key, value, scores, key_mask)
        eager_window.read(self.state, key, value, scores, key_mask)

    def step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scores: Tensor,
        *,
        key_mask: Tensor | None = None,
        softmax_scale: float | None = None,
        softcap: float | None = None,
        return_lse: bool = False,
        backend: str | None = None,
    ) -> Any:
        """Attend from the next ``T`` tokens, as over the whole text, then read them.

        A key that is worse than ``W`` survivors when it arrives is neither stored nor visible, not
        even to its own query, unless `keep_first` or `keep_recent` holds it.

        Args:
            query: ``[B, T, H, D]`` with ``H`` a multiple of ``Hkv``, dtype and device of the cache.
            key: ``[B, T, Hkv, D]``.
            value: ``[B, T, Hkv, D]``.
            scores: fp16, bf16 or fp32 ``[B, Hkv, T]``; they select and are the bias.
            key_mask: Bool ``[B, T]``, True for real tokens. Rows of padding see the text so far.
            softmax_scale: Factor of ``q k``; default ``D ** -0.5``.
            softcap: Cap of the logits before the bias; ``None`` or 0.0 is off.
            return_lse: Also return the log-sum-exp of the logits.
            backend: ``"eager"``, ``"triton"``, ...; default: the best available.

        Returns:
            ``[B, T, H, D]``, and with `return_lse` the fp32 ``[B, H, T]``.

        Raises:
            TypeError, ValueError: An argument does not fit. The cache is unchanged.
            RuntimeError: The named backend cannot run. The cache is unchanged.
        """
        self._check(key, value, scores, key_mask)
        checks.check_qkv(query, key, value)
        if query.shape[1] != key.shape[1]:
            raise ValueError(
                f"query: expected T = {key.shape[1]} tokens as in key, got {query.shape[1]}"
            )
        checks.check_options(softmax_scale, None)
        checks.check_softcap(softcap)
        if self._decodes(query, key, value, scores, backend):
            options: dict[str, Any] = {"softmax_scale": softmax_scale, "softcap": softcap}
            options |= {"key_mask": key_mask, "return_lse": return_lse}
            return self.decode(query, key, value, scores, **options)
        candidates = eager_window.Candidates(self.state, scores, key_mask)
        selection, score, order = self._select(candidates)

        # Survivors differ from head to head: each (batch entry, KV head) is a batch entry here.
        batch, length, heads = query.shape[:3]
        kv_heads = key.shape[2]
        result = flash_sparse_attn_func(
            query.unflatten(2, (kv_heads, -1)).transpose(1, 2).flatten(0, 1),
            eager_window.joined(self.key, self.key_scale, key, order),
            eager_window.joined(self.value, self.value_scale, value, order),
            selection,
            score[:, :, None],
            softmax_scale,
            softcap=softcap,
            return_lse=return_lse,
            backend=backend,
        )
        candidates.commit(key, value)

        out = result[0] if return_lse else result
        out = out.unflatten(0, (batch, kv_heads)).transpose(1, 2).reshape(query.shape)
        return (out, result[1].reshape(batch, heads, length)) if return_lse else out

    def decode(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scores: Tensor,
        *,
        key_mask: Tensor | None = None,
        softmax_scale: float | None = None,
        softcap: float | None = None,
        return_lse: bool = False,
    ) -> Any:
        """`step` for inference on a GPU, with the least host time: nothing is checked.

        The arguments have to be right, as `step` would take them, in fp16 or bf16: a wrong shape
        may read foreign memory. There are no gradients. Few tokens at a time; 1 is what it is for.
        """
        scale = self.key.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        result = decode_ops.window_step(
            query, key, value, scores, key_mask, self.state, scale, softcap or 0.0
        )
        return result if return_lse else result[0]

    def crop(self, length: int) -> None:
        """Forget all but the first `length` real tokens of every sequence (rejected guesses).

        Raises:
            ValueError: A key was evicted after that. It would have to return, and it is gone.
        """
        checks.check_count("length", length, 0)
        latest = int(self.evicted_at.max())
        if length < latest:
            raise ValueError(
                f"length: cannot roll back to {length} tokens: a key was evicted at {latest}; "
                "it is gone and would be visible again; keep a copy from before (copy.deepcopy)"
            )
        self.position.masked_fill_(self.position >= length, -1)
        self.seen_tokens.clamp_(max=length)
        self.threshold.copy_(eager_window.threshold(self.state))

    def reorder(self, index: Tensor) -> None:
        """Let batch entry ``b`` continue what was entry ``index[b]`` (beam search).

        Args:
            index: int32 or int64 ``[B']``. Another length than ``B`` changes the batch size.

        Raises:
            TypeError, ValueError: Not an integer vector, or out of range (looked at on CPUs).
        """
        checks.check_tensor("index", index, "[B]")
        if index.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"index: expected int32 or int64 batch entries, got {index.dtype}")
        batch = len(self.key)
        if checks.looks_at_values(index) and bool(((index < 0) | (index >= batch)).any()):
            raise ValueError(
                f"index: expected batch entries 0 ... {batch - 1}, got {index.tolist()}"
            )
        for name, state in self._tensors().items():
            moved = state.index_select(0, index)
            # In place where possible, so that captured graphs keep their addresses.
            setattr(self, name, state.copy_(moved) if len(index) == batch else moved)

    def reset(self) -> None:
        """Forget the text; the memory stays."""
        self.position.fill_(-1)
        self.threshold.fill_(EMPTY)
        self.seen_tokens.zero_()
        self.evicted_at.zero_()

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> WindowCache:
        """Move the state, in place, and return self. `dtype` is for keys and values alone."""
        dtype = None if dtype is None else _float_dtype(dtype)
        if dtype is not None and (dtype == FP8) != (self.key.dtype == FP8):
            raise TypeError(
                f"dtype: a cache of {self.key.dtype} cannot become one of {dtype}: keys of 8 bits "
                "have scales; make another cache"
            )
        for name, state in self._tensors().items():
            kind = dtype if name in ("key", "value") else None
            setattr(self, name, state.to(device=device, dtype=kind))
        return self

    def state_dict(self) -> dict[str, Any]:
        """Copies of all tensors, and the three window sizes."""
        return {name: state.clone() for name, state in self._tensors().items()} | self._sizes()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` of a cache of the same shape and window sizes gave.

        Raises:
            ValueError: An entry is missing or unknown, or differs in size. The cache is unchanged.
        """
        tensors, sizes = self._tensors(), self._sizes()
        if set(state) != {*tensors, *sizes}:
            raise ValueError(f"state: expected {[*tensors, *sizes]}, got {list(state)}")
        for name in (*sizes, *tensors):
            own, new = getattr(self, name), state[name]
            own, new = (own.shape, new.shape) if name in tensors else (own, new)
            if own != new:
                raise ValueError(f"state: expected {name} {own} as in this cache, got {new}")
        for name, tensor in tensors.items():
            tensor.copy_(state[name])

    def __repr__(self) -> str:
        batch, kv_heads, capacity, head_dim = self.key.shape
        sizes = ", ".join(f"{name}={size}" for name, size in self._sizes().items() if size)
        return (
            f"WindowCache(B={batch}, Hkv={kv_heads}, D={head_dim}, {sizes}, {capacity} slots, "
            f"{self.nbytes} bytes, {self.key.dtype}, device={self.key.device})"
        )

    def _decodes(
        self, query: Tensor, key: Tensor, value: Tensor, scores: Tensor, backend: str | None
    ) -> bool:
        """Whether the decoding kernels take this step."""
        if backend not in (None, "cuda", "triton") or not 0 < query.shape[1] <= _MAX_TOKENS:
            return False
        if triton.unavailable() or decode_ops.unsupported(query, self.key):
            return False
        needs_grad = any(tensor.requires_grad for tensor in (query, key, value, scores))
        return not (needs_grad and torch.is_grad_enabled())

    def _select(
        self, candidates: eager_window.Candidates
    ) -> tuple[KeySelection, Tensor, Tensor | None]:
        """The choice among candidates, their scores ``[B * Hkv, 1, C + T]``, and their order."""
        score = candidates.score[:, None]
        width, first, recent = self.state.sizes
        if score.shape[-1] == self.key.shape[2] + 1 and not score.is_cuda:
            # A single query sees what is kept, in whatever order.
            start = torch.arange(score.shape[-1], dtype=torch.int32).expand(score.shape)
            expiry = torch.where(candidates.kept[:, None], NEVER, start)
            sizes = self.state.sizes
            return KeySelection(start, expiry, score.detach(), "causal", *sizes), score, None
        order = candidates.order()
        score = score.gather(2, order[:, None])
        real = candidates.position.gather(1, order) >= 0
        selection = select_keys(
            score.detach(), width, key_mask=real, keep_first=first, keep_recent=recent
        )
        return selection, score, order

    def _tensors(self) -> dict[str, Tensor]:
        named = {name: getattr(self, name) for name in TENSORS}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def _sizes(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in SIZES}

    def _check(self, key: Tensor, value: Tensor, scores: Tensor, key_mask: Tensor | None) -> None:
        """The new tokens fit this cache."""
        batch, kv_heads, _, head_dim = self.key.shape
        for name, tensor in (("key", key), ("value", value)):
            checks.check_tensor(name, tensor, "[B, T, Hkv, D]")
            expected = (batch, key.shape[1], kv_heads, head_dim)
            if tensor.shape != expected:
                raise ValueError(
                    f"{name}: expected [B, T, Hkv, D] = {expected} as in the cache, got "
                    f"{tuple(tensor.shape)}"
                )
            dtype = key.dtype if self.key.dtype == FP8 else self.key.dtype
            if (tensor.dtype, tensor.device) != (dtype, self.key.device) or dtype == FP8:
                raise TypeError(
                    f"{name}: expected {dtype} on {self.key.device} as in the cache, got "
                    f"{tensor.dtype} on {tensor.device}; cast or move one of them with .to()"
                )
        checks.check_scores(scores, key)
        if scores.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise TypeError(
                f"scores: expected 16 or 32 bit floats, got {scores.dtype}; use .float()"
            )
        checks.check_selection_arguments(
            scores, self.window_size, "causal", ("causal",), key_mask, None, 0, 0
        )


def _float_dtype(dtype: torch.dtype) -> torch.dtype:
    if not dtype.is_floating_point:
        raise TypeError(f"dtype: expected a floating dtype, got {dtype}")
    return dtype
