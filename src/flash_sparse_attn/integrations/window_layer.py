"""`WindowCache` as a layer of Transformers' caches: constant size, however long the text."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticLayer

from ..checks import looks_at_values
from ..window_cache import WindowCache


class _Tokens(NamedTuple):
    """Arguments of `WindowCache.prefill`."""

    key: Tensor
    value: Tensor
    scores: Tensor
    key_mask: Tensor | None

    def part(self, begin: int, end: int) -> _Tokens:
        """Tokens `begin` to `end`, without a graph."""
        mask = None if self.key_mask is None else self.key_mask[:, begin:end]
        key, value = self.key[:, begin:end].detach(), self.value[:, begin:end].detach()
        return _Tokens(key, value, self.scores[..., begin:end].detach(), mask)

    def copied(self) -> _Tokens:
        """The same in memory of their own."""
        return _Tokens(*(None if x is None else x.clone() for x in self))  # type: ignore[arg-type]


class _Undo(NamedTuple):
    """A window's state before some tokens, and these tokens."""

    state: dict[str, Any]
    tokens: _Tokens


GUESSES = 32
"""Tokens of one pass that can be rolled back whatever they evicted (assisted generation)."""


class WindowLayer(CacheLayerMixin):
    """The survivors of one attention layer, of ``window_size + keep_first + keep_recent`` slots.

    `update` returns the new keys and values alone; the attention calls `read` or `step`, which know
    the survivors. Shapes never change, so that a compiled step serves every token.

    Args:
        window_size: Keys that a query sees by their scores.
        keep_first: First tokens that stay visible, on top.
        keep_recent: Newest tokens that are visible, on top.
    """

    is_compileable = True
    is_croppable = False  # an evicted key is gone
    supports_early_init = False
    # Masks are made for the first layer that does not slide: for full layers where there are some.
    is_sliding = True

    def __init__(self, window_size: int, keep_first: int = 0, keep_recent: int = 0) -> None:
        # Not the parent's: it would set `keys` and `values`, which are views of the window here.
        self.sizes = (window_size, keep_first, keep_recent)
        self.window: WindowCache | None = None
        self.cumulative_length = torch.tensor(0)
        self.is_initialized = False
        self.is_empty = True
        self._undo: _Undo | None = None

    @property
    def keys(self) -> Tensor | None:
        """The survivors' keys ``[B, Hkv, C, D]``, in no order."""
        return None if self.window is None else self.window.key

    @property
    def values(self) -> Tensor | None:
        """The survivors' values."""
        return None if self.window is None else self.window.value

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the window for keys and values ``[B, Hkv, T, D]`` like these."""
        if key_states.shape[-1] != value_states.shape[-1]:
            raise ValueError(
                f"value_states: expected head dimension {key_states.shape[-1]} as in key_states, "
                f"got {value_states.shape[-1]}"
            )
        window_size, keep_first, keep_recent = self.sizes
        batch, kv_heads, _, head_dim = key_states.shape
        self.window = WindowCache(
            batch,
            kv_heads,
            head_dim,
            window_size,
            keep_first=keep_first,
            keep_recent=keep_recent,
            dtype=value_states.dtype,
            device=value_states.device,
        )
        self.cumulative_length = self.cumulative_length.to(value_states.device)
        # What a mask function is given of a cache is this tensor alone.
        self.cumulative_length.layer = weakref.ref(self)  # type: ignore[attr-defined]
        if not torch.compiler.is_compiling():
            # Compiled steps change these in place, which CUDA graphs take only at fixed addresses.
            state = [x for x in vars(self.window).values() if isinstance(x, Tensor)]
            for tensor in (*state, self.cumulative_length):
                torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Count the new tokens and return their keys and values as they are."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.cumulative_length.add_(key_states.shape[-2])
        return key_states, value_states

    def read(self, key: Tensor, value: Tensor, scores: Tensor, key_mask: Tensor | None) -> None:
        """Take in the first tokens of a text; see `WindowCache.prefill`."""
        assert self.window is not None  # made by `update`
        last = max(0, key.shape[1] - GUESSES)
        new = _Tokens(key, value, scores, key_mask)
        with torch.no_grad():
            _prefill(self.window, new.part(0, last))
            newest = new.part(last, key.shape[1]).copied()  # a view would hold the whole text
            self._undo = _Undo(self.window.state_dict(), newest)
            _prefill(self.window, self._undo.tokens)
        self.is_empty = False

    def step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scores: Tensor,
        key_mask: Tensor | None,
        **options: Any,
    ) -> Tensor:
        """Attend from the next tokens and take them in; see `WindowCache.step`."""
        assert self.window is not None
        self._undo = None
        if 1 < key.shape[1] <= GUESSES:
            tokens = _Tokens(key.detach(), value.detach(), scores.detach(), key_mask)
            self._undo = _Undo(self.window.state_dict(), tokens)
        return self.window.step(query, key, value, scores, key_mask=key_mask, **options)

    def check_mask(self, attention_mask: Tensor) -> None:
        """Keys that were read are hidden by nothing later, and padding stays padding.

        Args:
            attention_mask: Bool ``[B, tokens]`` of all tokens, those before the new ones first.

        Raises:
            ValueError: It says otherwise. Looked at on CPUs, and with FLASH_SPARSE_ATTN_CHECK=1.
        """
        if self.window is None or not looks_at_values(attention_mask):
            return
        length = int(self.cumulative_length)
        real = attention_mask[:, :length].sum(1)
        if attention_mask.shape[1] < length or len(real) != len(self.window.seen_tokens):
            return
        if bool((real != self.window.seen_tokens.to(real.device)).any()):
            raise ValueError(
                f"attention_mask: expected {self.window.seen_tokens.tolist()} real tokens among "
                f"the first {length} of each row, as when they were read, got {real.tolist()}; a "
                "window cannot hide a key any more, start with an empty cache"
            )

    def get_mask_sizes(self, query_length: int) -> tuple[int, Any]:
        """Masks are for the new tokens: survivors are real tokens of the past, all of them."""
        return query_length, self.get_seq_length()

    def get_seq_length(self) -> Any:
        """Tokens read, padding included: 0, or a tensor so that a compiled step serves them all."""
        return self.cumulative_length if self.is_initialized else 0

    def get_max_length(self) -> int:
        """-1: a text may have any length."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens (negative, as Transformers counts them).

        Any number of the latest pass, if it had 2 to `GUESSES` tokens or was the first; further
        back only to where no key had to go, and without padding.

        Raises:
            ValueError: A key was evicted after the remaining ones, or rows have padding.
        """
        count = abs(int(tokens_to_remove))
        if self.window is None or count == 0:
            return
        if self._undo is not None and count <= self._undo.tokens.key.shape[1]:
            kept = self._undo.tokens.part(0, self._undo.tokens.key.shape[1] - count)
            self._undo = _Undo(self._undo.state, kept)
            self.window.load_state_dict(self._undo.state)
            _prefill(self.window, kept)
        else:
            if bool((self.window.seen_tokens != self.cumulative_length).any()):
                raise ValueError(
                    "tokens_to_remove: a window cannot be rolled back that far where rows have "
                    f"padding, got {tokens_to_remove}; leave the padding out"
                )
            self._undo = None
            self.window.crop(int(self.cumulative_length) - count)
        self.cumulative_length.sub_(count)

    def reset(self) -> None:
        """Forget the text; the memory stays."""
        self._undo = None
        if self.window is not None:
            self.window.reset()
        self.cumulative_length.zero_()
        self.is_empty = True

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row ``b`` continue what was row ``beam_idx[b]``."""
        self._undo = None
        if self.window is not None:
            self.window.reorder(beam_idx.to(self.window.key.device))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows only: integers, or a bool for each row."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero()[:, 0]
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        if self.window is not None:
            rows = torch.arange(len(self.window.key), device=self.window.key.device)
            self.reorder_cache(rows.repeat_interleave(repeats))

    def offload(self) -> None:
        """A window is small and stays where it is."""

    def prefetch(self) -> None:
        """See `offload`."""

    @property
    def nbytes(self) -> int:
        """Bytes of the window; they do not depend on the length of the text."""
        return 0 if self.window is None else self.window.nbytes

    def __repr__(self) -> str:
        return f"WindowLayer({self.window if self.window is not None else self.sizes})"


def _prefill(window: WindowCache, tokens: _Tokens) -> None:
    window.prefill(tokens.key, tokens.value, tokens.scores, key_mask=tokens.key_mask)


def window_layer(
    cache: Cache | None, layer_idx: int, sizes: tuple[int, int, int]
) -> WindowLayer | None:
    """The window of a layer in the cache of a call; an empty full layer makes room for it.

    Args:
        cache: `past_key_values` of the call: a `DynamicCache`, a `StaticCache`, or one used before.
        layer_idx: Number of the attention layer.
        sizes: ``(window_size, keep_first, keep_recent)``.

    Raises:
        ValueError: The cache has keys without scores, or is of a kind that cannot hold a window.
    """
    if cache is None:
        return None
    if getattr(cache, "offloading", False):
        raise ValueError(
            "past_key_values: offloading is not needed with windows and not supported, got "
            f"{type(cache).__name__}; use the default cache"
        )
    if (fresh := getattr(cache, "layer_class_to_replicate", None)) is not None:
        while len(cache.layers) <= layer_idx:
            cache.layers.append(fresh())
    layer = cache.layers[layer_idx]
    if isinstance(layer, WindowLayer):
        if layer.sizes != sizes:
            raise ValueError(
                f"past_key_values: layer {layer_idx} expects (window_size, keep_first, "
                f"keep_recent) = {sizes}, got a window of {layer.sizes}; it is another model's"
            )
        return layer
    if type(layer) not in (DynamicLayer, StaticLayer):
        raise ValueError(
            f"past_key_values: expected a dynamic or static cache, got {type(layer).__name__} for "
            f"layer {layer_idx}; leave cache_implementation at its default"
        )
    if int(layer.get_seq_length()):
        raise ValueError(
            f"past_key_values: layer {layer_idx} holds keys without scores, which a dynamic mask "
            "cannot use; start with an empty cache"
        )
    cache.layers[layer_idx] = window = WindowLayer(*sizes)
    return window
