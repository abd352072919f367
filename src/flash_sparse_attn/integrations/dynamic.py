"""Dynamic mask attention inside Transformers' layers: scores, selection, and the cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import flash_sparse_attn_func, flash_sparse_attn_varlen_func
from ..intervals import KeySelection
from ..scores import folded_key_scores
from ..selection import select_keys
from .keywords import packed_texts
from .masks import new_token_mask
from .window_layer import WindowLayer

if TYPE_CHECKING:
    from ..distributed.ranks import Mesh


@dataclass(frozen=True)
class DynamicMask:
    """What makes an attention layer's mask dynamic.

    Attributes:
        window_size: ``W``, the best-scored keys that a query sees.
        keep_first: First tokens that stay visible, on top.
        keep_recent: Newest tokens that are visible, on top.
        exponential: Whether the score is ``exp(A * softplus(...))`` as in Doge.
    """

    window_size: int
    keep_first: int = 0
    keep_recent: int = 0
    exponential: bool = False

    @property
    def sizes(self) -> tuple[int, int, int]:
        """``(window_size, keep_first, keep_recent)``."""
        return self.window_size, self.keep_first, self.keep_recent


class DynamicMaskLayer:
    """What `attend` expects of an attention module; to be mixed into one.

    Attributes:
        A: Parameter ``[Hkv]``.
        v_proj, dt_proj: Linear layers ``hidden_size -> Hkv * D`` and ``Hkv * D -> Hkv``.
        layer_idx: Number of the layer in the model.
        mesh: The ranks along which texts are cut, or ``None``.
        keep_selection: Whether somebody wants to look at `watched`.
        watched: The selection of the latest forward pass over a whole text.
    """

    A: Tensor
    v_proj: nn.Module
    dt_proj: nn.Module
    layer_idx: int
    mesh: Mesh | None = None
    keep_selection: bool = False
    watched: KeySelection | None = None

    @property
    def dynamic_mask(self) -> DynamicMask:
        """The settings as they are now."""
        raise NotImplementedError


def dynamic_layers(model: nn.Module) -> list[DynamicMaskLayer]:
    """The layers of a model whose masks are dynamic, in order."""
    return [module for module in model.modules() if isinstance(module, DynamicMaskLayer)]


def key_scores(module: DynamicMaskLayer, hidden_states: Tensor, value: Tensor) -> Tensor:
    """Scores fp32 ``[B, Hkv, S]`` of the tokens of `hidden_states`, whose values are `value`.

    With plain linear layers their bits depend on the token's hidden state alone. With adapters or
    quantised layers they come from the values and may differ in the last bits from batch to batch,
    which decides nothing but near-ties.

    Args:
        module: The attention layer.
        hidden_states: ``[B, S, hidden_size]``.
        value: ``[B, S, Hkv, D]``.
    """
    exponential = module.dynamic_mask.exponential
    if type(module.v_proj) is nn.Linear and type(module.dt_proj) is nn.Linear:
        return folded_key_scores(
            hidden_states, module.v_proj, module.dt_proj, module.A, exponential
        )
    logit = module.dt_proj(value.flatten(2)).float()
    with torch.autocast(value.device.type, enabled=False):
        score = (module.A.float() * F.softplus(logit)).transpose(1, 2)
    return torch.exp(score) if exponential else score


def attend(
    module: DynamicMaskLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hidden_states: Tensor,
    mask: Tensor | None,
    window: WindowLayer | None,
    keywords: dict[str, Any],
    **options: Any,
) -> Tensor:
    """Dynamic mask attention of new tokens, after what `window` holds of the text so far.

    Args:
        module: The attention layer.
        query: ``[B, S, H, D]``.
        key: ``[B, S, Hkv, D]``.
        value: ``[B, S, Hkv, D]``.
        hidden_states: ``[B, S, hidden_size]``, from which the values were made.
        mask: What `masks.make_mask` returned.
        window: The layer of the cache, or ``None``.
        keywords: The model's, which may say that texts are packed.
        **options: `softmax_scale`, `softcap` and `deterministic`.

    Returns:
        ``[B, S, H, D]``.

    Raises:
        ValueError: The mask cannot be combined with a selection, or a cache comes with packed texts
            or a mesh.
    """
    if mask is None and (window is None or window.is_empty):
        mask = packed_texts(keywords)
    scores = key_scores(module, hidden_states, value)
    if module.mesh is not None:
        if window is not None:
            raise ValueError(
                "past_key_values: expected None with a mesh, got a cache: decoding needs no more "
                "than the constant-size cache of one process; pass use_cache=False, and generate "
                "with a model without mesh"
            )
        return _attend_along(
            module, module.mesh, query, key, value, scores, mask, keywords, **options
        )
    sizes = module.dynamic_mask
    keep: dict[str, Any] = {"keep_first": sizes.keep_first, "keep_recent": sizes.keep_recent}
    if mask is not None and mask.dim() == 1:
        if window is not None:
            raise ValueError(
                "past_key_values: packed texts cannot be continued, got a cache with them; pass "
                "use_cache=False"
            )
        packed_scores = scores.transpose(0, 1).flatten(1)
        selection = select_keys(packed_scores, sizes.window_size, cu_seqlens=mask, **keep)
        _watch(module, selection)
        longest = query.shape[1]
        out = flash_sparse_attn_varlen_func(
            query.flatten(0, 1),
            key.flatten(0, 1),
            value.flatten(0, 1),
            mask,
            mask,
            longest,
            longest,
            attn_mask=selection,
            attn_bias=packed_scores,
            **options,
        )
        return out.view(query.shape)

    offset = 0 if window is None else window.cumulative_length - query.shape[1]
    key_mask = new_token_mask(mask, query.shape[1], offset)
    if window is not None and not window.is_empty:
        step = {name: options[name] for name in ("softmax_scale", "softcap")}
        return window.step(query, key, value, scores, key_mask, **step)
    selection = select_keys(scores, sizes.window_size, key_mask=key_mask, **keep)
    _watch(module, selection)
    if window is not None:
        window.read(key, value, scores, key_mask)
    return flash_sparse_attn_func(query, key, value, selection, scores[:, :, None], **options)


def _attend_along(
    module: DynamicMaskLayer,
    mesh: Mesh,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Tensor,
    mask: Tensor | None,
    keywords: dict[str, Any],
    **options: Any,
) -> Tensor:
    """`attend` of a rank's own stretch of texts that lie along a mesh."""
    # Here, because there are builds of PyTorch without torch.distributed.
    from ..distributed import context_parallel_attn_func, context_parallel_attn_varlen_func

    sizes = module.dynamic_mask
    options |= {"keep_first": sizes.keep_first, "keep_recent": sizes.keep_recent, "mesh": mesh}
    if keywords.get("cu_seq_lens_q") is not None:
        if len(query) != 1:
            raise ValueError(
                f"cu_seq_lens_q: expected one row of tokens with a mesh, got {len(query)}; rows of "
                "a rank do not follow each other"
            )
        borders = packed_texts(keywords)
        assert borders is not None
        packed = (query[0], key[0], value[0], scores[0], borders)
        return context_parallel_attn_varlen_func(*packed, sizes.window_size, **options)[None]
    if mask is not None and mask.dim() == 1:
        raise ValueError(
            "position_ids: packed texts with a mesh need cu_seq_lens_q and cu_seq_lens_k, the "
            "borders in the tokens of all ranks, got positions that begin anew"
        )
    # A rank without padding must take part as those with some, and cannot know of them.
    real = new_token_mask(mask, query.shape[1], 0)
    if real is None:
        real = torch.ones(query.shape[:2], dtype=torch.bool, device=query.device)
    arguments = (query, key, value, scores, sizes.window_size)
    return context_parallel_attn_func(*arguments, key_mask=real, **options)


def _watch(module: DynamicMaskLayer, selection: KeySelection) -> None:
    if module.keep_selection:
        module.watched = selection
