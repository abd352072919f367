"""Transformers: attention by name, exact Doge, block lists, and dynamic masks for dense models.

Supported: Transformers 5.17 and newer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

try:
    import transformers

    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 17):
        raise ImportError(f"found Transformers {transformers.__version__}")
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
except ImportError as error:
    raise ImportError(
        "flash_sparse_attn.integrations.transformers needs Transformers 5.17 or newer; "
        f"pip install 'dynamic-mask-attention[transformers]' ({error})"
    ) from error

from ..attention import flash_sparse_attn_func, flash_sparse_attn_varlen_func
from ..intervals import KeySelection
from ..selection import select_keys
from . import convert as conversion
from . import doge
from .block_sparse import block_sparse_attention
from .doge import Model
from .dynamic import DynamicMaskLayer, attend
from .keywords import attention_options, packed_texts
from .masks import make_mask
from .mesh import check_mesh, lay_along
from .monitor import SelectionMonitor
from .names import NAMES
from .window_layer import WindowLayer

if TYPE_CHECKING:
    from ..distributed.ranks import Mesh

__all__ = [
    "NAMES",
    "SelectionMonitor",
    "WindowLayer",
    "apply_to_doge",
    "convert",
    "load_converted",
    "register",
]


def register() -> None:
    """Make ``attn_implementation="fsa"`` and ``"fsa_deterministic"`` known to Transformers.

    Any model that goes through Transformers' attention interface can name them: padding, packed
    rows, caches, sliding windows and `block_indices` work as with ``"eager"``, without a mask for
    every query and key. What would change the result and is not supported raises. Calling it again
    does no harm.
    """
    for name, deterministic in zip(NAMES, (None, True), strict=True):
        AttentionInterface.register(name, partial(attention, deterministic=deterministic))
        AttentionMaskInterface.register(name, make_mask)


def apply_to_doge(model: Model, *, mesh: Mesh | None = None) -> Model:
    """Run a Doge model's attention exactly and in O(N W) time, in training and in `generate`.

    The same scores (``exp(A * softplus(dt_proj(v)))``), selection and softmax as Doge in ``eager``.
    Scores are computed in fp32; where two keys have equal scores the newer one is kept, while
    `torch.topk` keeps any. Caches hold `keep_window_size` keys per layer. Parameters keep their
    names, and a saved model loads as plain Doge: call this again after loading.

    Args:
        model: Any model with `DogeAttention` layers. It is changed in place.
        mesh: As in `convert`.

    Returns:
        The same model.

    Raises:
        TypeError: No Doge layer in it.
        ValueError: `config.sliding_window` is set, or the mesh does not fit.
    """
    check_mesh(model, mesh)
    doge.replace_attention(model)
    lay_along(model, mesh)
    register()
    model.set_attn_implementation(NAMES[0])
    return model


def convert(
    model: Model,
    window_size: int | Sequence[int | None],
    *,
    keep_recent: int = 0,
    keep_first: int = 0,
    mesh: Mesh | None = None,
) -> Model:
    """Give a dense causal model dynamic masks, to continue its training sparsely.

    Every converted layer keeps its projections and gets the score ``A * softplus(dt_proj(v))`` for
    every key, with ``A = 0``: equal scores keep the newest keys, so that before training it is
    a sliding window of `window_size` (or `keep_recent`, if that is more) keys behind `keep_first`
    sinks. Caches of converted layers have constant size.

    Args:
        model: With separate projections, as Llama, Qwen and Mistral without sliding windows. It is
            changed in place, and its configuration notes how.
        window_size: Keys that a query sees by their scores; for all layers, or one for each, with
            None for layers that stay dense.
        keep_recent: Newest keys that a query sees besides.
        keep_first: First keys of a text that a query sees besides.
        mesh: A `DeviceMesh` of one dimension or a `ProcessGroup`: texts are cut along its ranks,
            rank 0 has the beginning, and every rank calls the model with its own tokens, as many as
            the others. Positions are counted in the whole texts. Packed texts come with
            `cu_seq_lens_q` and `cu_seq_lens_k` in the tokens of all ranks. Gradients of parameters
            are those of the rank's tokens, to be added over the ranks. No layer may stay dense, and
            there is no cache. See `distributed.context_parallel_attn_func`.

    Returns:
        The same model. `save_pretrained` saves it, `load_converted` loads it.

    Raises:
        TypeError, ValueError: The model has no such layers, or an argument does not fit.
    """
    sizes = [window_size] if isinstance(window_size, int) else list(window_size)
    if mesh is not None and None in sizes:
        raise ValueError(
            f"window_size: expected a size for every layer with a mesh, got {sizes}: a dense layer "
            "would see its own rank's keys only"
        )
    check_mesh(model, mesh)
    conversion.add_dynamic_masks(model, window_size, keep_recent, keep_first)
    lay_along(model, mesh)
    register()
    model.set_attn_implementation(NAMES[0])
    return model


def load_converted(
    path: str | Path, *, mesh: Mesh | None = None, **options: Any
) -> PreTrainedModel:
    """Load a model that `convert` changed and `save_pretrained` saved.

    Args:
        path: A folder or the name of a repository, with safetensors files.
        mesh: As in `convert`.
        **options: Of `AutoModelForCausalLM.from_pretrained`.

    Raises:
        ValueError: It is no converted model.
    """
    model, settings = conversion.load_dense(path, **options)
    convert(model, **settings, mesh=mesh)
    conversion.load_added(model, path)
    return model


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """The attention function as Transformers calls it.

    Args:
        module: The attention layer.
        query: ``[B, H, Q, D]``.
        key: ``[B, Hkv, K, D]``.
        value: ``[B, Hkv, K, D]``.
        attention_mask: What `masks.make_mask` returned, or an additive mask of the user's.
        scaling: Factor of ``q k``; default ``D ** -0.5``.
        dropout: Has to be 0.
        **keywords: See `keywords`; `softcap`, `sliding_window`, `is_causal`, `block_indices`,
            `cu_seq_lens_q` and `cu_seq_lens_k` are used.

    Returns:
        ``[B, Q, H, D]``, and None for the probabilities.

    Raises:
        ValueError: A keyword would change the result in a way that is not supported.
    """
    if type(module).__name__ == "DogeAttention":
        raise TypeError(
            "model: Doge makes its mask inside its attention layers, which would build it in full; "
            "use apply_to_doge(model) in place of attn_implementation"
        )
    own = ("block_indices", "block_size", "dynamic_mask_inputs")
    options = attention_options(module, scaling, dropout, keywords, *own)
    causal = keywords.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
    # Rotary embeddings and norms may leave queries and keys in a higher precision than values.
    query, key, value = (x.transpose(1, 2).to(value.dtype) for x in (query, key, value))

    if (inputs := keywords.get("dynamic_mask_inputs")) is not None:
        assert isinstance(module, DynamicMaskLayer)
        hidden_states, window = inputs
        inputs = (hidden_states, attention_mask, window, keywords)
        return attend(module, query, key, value, *inputs, **options), None
    if attention_mask is None and causal and query.shape[1] == key.shape[1]:
        attention_mask = packed_texts(keywords)
    newest = _sliding_window(module, key.shape[1], keywords) if causal else None
    blocks = keywords.get("block_indices")
    if attention_mask is not None and attention_mask.dim() == 1:
        if blocks is not None:
            raise ValueError(
                "block_indices: expected no packed texts with them, got several in a row: blocks "
                "are counted in whole rows; give each text a row, padded on the right"
            )
        return _attend_packed(query, key, value, attention_mask, newest, options), None

    key_mask = bias = None
    visible: Tensor | KeySelection | None = None
    if attention_mask is not None and attention_mask.dim() == 2:
        key_mask = attention_mask.bool()
        columns = key_mask.shape[1]  # keys behind them are unused memory of a cache
        key, value, visible = key[:, :columns], value[:, :columns], key_mask[:, None, None]
    elif attention_mask is not None:  # complete: causality, window, padding and all
        causal, newest = False, None
        attention_mask = attention_mask[..., : key.shape[1]]
        if attention_mask.dtype in (torch.bool, torch.uint8):
            visible = attention_mask.bool()
        else:
            bias = attention_mask

    if blocks is not None:
        if bias is not None or newest is not None:
            raise ValueError(
                "block_indices: expected neither an additive attention_mask nor a sliding window "
                "with them; write them into the lists, or use a bool mask"
            )
        size = keywords.get("block_size") or _block_size(module)
        options = {"visible": visible, "is_causal": causal, **options}
        return block_sparse_attention(query, key, value, blocks, size, **options), None
    if newest is not None:
        visible = select_keys(_equal_scores(key), newest, key_mask=key_mask)
    return flash_sparse_attn_func(
        query, key, value, visible, bias, is_causal=causal, **options
    ), None


def _attend_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    borders: Tensor,
    newest: int | None,
    options: dict[str, Any],
) -> Tensor:
    """Causal attention within each packed text; the rows of ``[B, S, ...]`` lie one after another.

    Texts have at most ``S`` tokens; to know better would be a wait for the GPU.
    """
    shape, longest = query.shape, query.shape[1]
    query, key, value = (x.flatten(0, 1) for x in (query, key, value))
    selection = None
    if newest is not None:
        selection = select_keys(_equal_scores(key[None])[0], newest, cu_seqlens=borders)
    out = flash_sparse_attn_varlen_func(
        query,
        key,
        value,
        borders,
        borders,
        longest,
        longest,
        is_causal=True,
        attn_mask=selection,
        **options,
    )
    return out.view(shape)


def _equal_scores(key: Tensor) -> Tensor:
    """Scores ``[B, Hkv, K]`` of which the newest keys are the best."""
    return torch.zeros(key.shape[0], key.shape[2], key.shape[1], device=key.device)


def _sliding_window(module: nn.Module, key_len: int, keywords: dict[str, Any]) -> int | None:
    """How many of the newest keys a query sees, ``None`` if all.

    Raises:
        ValueError: The configuration has a sliding window and the layer does not say if it is its.
    """
    window = keywords.get("sliding_window")
    if window is not None:
        return window if window < key_len else None
    window = getattr(getattr(module, "config", None), "sliding_window", None)
    if window is not None and "sliding_window" not in keywords and window < key_len:
        raise ValueError(
            f"sliding_window: {type(module).__name__} does not pass it, and its configuration has "
            f"{window}; expected the keyword (None for layers without one), use 'eager'"
        )
    return None


def _block_size(module: nn.Module) -> int:
    size = getattr(getattr(module, "indexer", None), "block_size", None)
    if size is None:
        raise ValueError(
            f"block_size: expected the keyword beside block_indices, or {type(module).__name__} "
            "with indexer.block_size, got neither"
        )
    return size
