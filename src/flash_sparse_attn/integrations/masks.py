"""What Transformers asks of a mask function, answered without a ``Q x K`` mask where possible.

The answer goes to every layer untouched, and for caches of fixed size it comes back as the input of
a second call. It is one of

* ``None``: causal (or, for encoders, nothing hidden), queries at the end of the keys;
* bool ``[B, C]``: True for real tokens; keys from ``C`` on are unused memory of a cache;
* int32 ``[N + 1]``: borders of packed texts in the rows one after another (`cu_seqlens`);
* uint8 ``[B, 1, Q, K]``: causality and padding for a cache that counts its tokens on the device;
* bool ``[B, 1, Q, K]``: anything else.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import masking_utils

_MaskFunction = Callable[..., Any]


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: _MaskFunction = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Tensor | None:
    """The mask function that is registered beside the attention functions.

    Args:
        batch_size: ``B``.
        q_length: New tokens ``Q``.
        kv_length: Keys ``K`` that the cache will return; with a cache of fixed size all its memory.
        q_offset: Tokens before the first query; a tensor if a cache of fixed size counts them.
        kv_offset: Tokens before the first key; a tensor if only the new tokens' keys are meant, as
            with `WindowLayer`.
        mask_function: What Transformers composed; unknown compositions are written out.
        attention_mask: Bool ``[B, tokens so far]``, True for real tokens.
        use_vmap: Whether `mask_function` has parts that need ``vmap``.
        device: Of the result.

    Returns:
        See the module's docstring.
    """
    parts = None if use_vmap else _parts(mask_function)
    if isinstance(kv_offset, Tensor) and parts is not None:
        return _new_columns(attention_mask, kv_offset, kv_length)
    if isinstance(q_offset, Tensor) or parts is None:
        mask = masking_utils.sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            use_vmap=use_vmap,
            device=device,
        )
        return mask if parts is None else mask.to(torch.uint8)
    causal, texts = parts
    if texts is not None:
        return _borders(texts[:, 1:] != texts[:, :-1])
    columns = kv_length
    if causal:  # memory of a cache behind the last query is unused
        columns = min(kv_length, q_offset + q_length - int(kv_offset))
    real = None
    if attention_mask is not None:
        # A mask of exactly these columns is one that was given before.
        begin = 0 if attention_mask.shape[1] == columns else int(kv_offset)
        real = attention_mask.bool()[:, begin : begin + columns]
        real = F.pad(real, (0, columns - real.shape[1]))  # as in Transformers: unknown is padding
        if q_length > 1 and _may_look(real) and bool(real.all()):
            real = None
    if real is None and columns != kv_length:
        real = torch.ones(batch_size, columns, dtype=torch.bool, device=device)
    return real


def packed_borders(position_ids: Tensor | None) -> Tensor | None:
    """Borders of packed texts in one row whose positions begin anew; ``None`` for a single text.

    Transformers looks at the positions only where no cache is used. All layers of a model get the
    same tensor: it is looked at once, which waits for a GPU.

    Args:
        position_ids: Integer ``[1, S]``; other shapes are not packed.
    """
    if position_ids is None or position_ids.dim() != 2 or len(position_ids) != 1:
        return None
    if position_ids.shape[1] < 2 or not _may_look(position_ids):
        return None
    seen, version, borders = _latest
    if seen() is not position_ids or version != position_ids._version:
        borders = _borders(position_ids.diff() != 1)
        borders = None if len(borders) == 2 else borders
        _latest[:] = weakref.ref(position_ids), position_ids._version, borders
    return borders


def new_token_mask(mask: Tensor | None, query_len: int, offset: int | Tensor) -> Tensor | None:
    """Which of the `query_len` newest tokens are real, bool ``[B, Q]``, from a model's mask.

    Args:
        mask: What `make_mask` returned, except borders.
        query_len: ``Q``.
        offset: Tokens before the first query, for masks that say which slot sees which.

    Raises:
        ValueError: The mask says more than what is padding.
    """
    if mask is None:
        return None
    if mask.dtype == torch.bool and mask.dim() == 2:
        return mask[:, mask.shape[1] - query_len :]
    if mask.dtype == torch.uint8 and mask.dim() == 4:  # a real token sees itself
        own = torch.arange(query_len, device=mask.device) + offset
        own = own.view(1, 1, -1, 1).expand(*mask.shape[:2], -1, -1)
        return mask.gather(3, own)[:, 0, :, 0].bool()
    raise ValueError(
        "attention_mask: dynamic masks take padding as 0/1 [B, tokens], got a mask for every query "
        f"and key, {mask.dtype} {tuple(mask.shape)}, which cannot be combined with a selection; "
        "when compiling pass torch.ones_like(input_ids), because without a mask Transformers "
        "makes one for packed texts"
    )


def _parts(mask_function: _MaskFunction) -> tuple[bool, Tensor | None] | None:
    """Whether a composed function is causal, and the text numbers ``[B, S]`` of packed rows.

    ``None`` if it is anything else. A sliding window counts as causal here: the attention function
    gets it as a keyword.
    """
    if mask_function is masking_utils.causal_mask_function:
        return True, None
    if mask_function is masking_utils.bidirectional_mask_function:
        return False, None
    if torch.compiler.is_compiling():  # what follows reads closures, which compilers cannot
        return None
    causal, texts = False, None
    for part in _flatten(mask_function):
        name = getattr(part, "__qualname__", "")
        if part is masking_utils.causal_mask_function:
            causal = True
        elif name.startswith("packed_sequence_mask_function."):
            texts = _closure(part)["packed_sequence_mask"]
        elif not name.startswith("sliding_window_overlay."):
            return None
    return (causal, texts) if causal else None


def _flatten(mask_function: _MaskFunction) -> list[_MaskFunction]:
    """The parts of which ``and_masks`` made a function.

    A part that counts positions within each text is causal, or a window, like what it wraps.
    """
    name = getattr(mask_function, "__qualname__", "")
    if name.startswith("remap_positions_for_packed_sequence."):
        return _flatten(_closure(mask_function)["mask_function"])
    if name != "and_masks.<locals>.and_mask":
        return [mask_function]
    parts = _closure(mask_function)["mask_functions"]
    return [inner for part in parts for inner in _flatten(part)]


def _closure(function: Any) -> dict[str, Any]:
    cells = (cell.cell_contents for cell in function.__closure__)
    return dict(zip(function.__code__.co_freevars, cells, strict=True))


def _new_columns(attention_mask: Tensor | None, offset: Tensor, length: int) -> Tensor | None:
    """The columns of the newest tokens. A mask of exactly that many is one this gave before."""
    if attention_mask is None or attention_mask.shape[1] == length:
        return attention_mask
    if not torch.compiler.is_compiling():
        layer = getattr(offset, "layer", lambda: None)()
        if layer is not None and layer.cumulative_length is offset:  # not of a copy of the cache
            layer.check_mask(attention_mask)
    column = (torch.arange(length, device=offset.device) + offset)[None]
    known = column < attention_mask.shape[1]
    column = column.clamp(max=attention_mask.shape[1] - 1).expand(len(attention_mask), -1)
    return attention_mask.gather(1, column) & known


def _borders(changes: Tensor) -> Tensor:
    """int32 borders ``[N + 1]`` from ``changes [B, S - 1]``, True where another text begins."""
    begins = F.pad(changes, (1, 0), value=True).flatten()
    return F.pad(begins.nonzero()[:, 0], (0, 1), value=len(begins)).int()


def _may_look(tensor: Tensor) -> bool:
    """Whether the host may wait for values: not while compiling or capturing a graph."""
    if torch.compiler.is_compiling() or tensor.is_meta:
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _nothing() -> None:
    return None


_latest: list[Any] = [_nothing, 0, None]
"""The positions that were last looked at (a weak reference), their version, and the answer."""
