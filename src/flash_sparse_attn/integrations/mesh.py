"""Models of Transformers over texts that are cut along the ranks of a mesh."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel

from .dynamic import dynamic_layers

if TYPE_CHECKING:
    from ..distributed.ranks import Mesh


def check_mesh(model: PreTrainedModel, mesh: Mesh | None) -> None:
    """Whether a model can be laid along a mesh.

    Raises:
        TypeError, ValueError: It is no mesh of one dimension with this process in it.
        ValueError: Rotary frequencies follow the length of the text, which no rank knows.
    """
    if mesh is None:
        return
    # Here, because there are builds of PyTorch without torch.distributed.
    from ..distributed.ranks import Ranks

    Ranks.of(mesh)
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    by_layer_type = [part for part in rope.values() if isinstance(part, dict)]
    for kind in [part.get("rope_type") for part in (rope, *by_layer_type)]:
        if kind in ("dynamic", "longrope"):
            raise ValueError(
                f"mesh: expected rotary embeddings of fixed frequencies, got rope_type {kind!r}, "
                "whose frequencies follow the length of the text; train without mesh"
            )


def lay_along(model: PreTrainedModel, mesh: Mesh | None) -> None:
    """Let all dynamic layers attend along the ranks of a mesh, or with ``None`` within a process.

    Positions are counted in the whole texts, unless `position_ids` are passed.
    """
    for layer in dynamic_layers(model):
        layer.mesh = mesh
    base = model.base_model
    if mesh is not None and _add_positions not in base._forward_pre_hooks.values():
        base.register_forward_pre_hook(_add_positions, with_kwargs=True)


def _add_positions(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a model of one process would take as positions, and no cache unless asked for."""
    mesh = next(iter(dynamic_layers(model))).mesh
    if mesh is None:
        return args, kwargs
    from ..distributed import token_positions

    kwargs = dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) | kwargs
    if kwargs.get("use_cache") is None:
        kwargs["use_cache"] = False
    if kwargs.get("position_ids") is None:
        tokens = kwargs.get("input_ids")
        tokens = kwargs["inputs_embeds"] if tokens is None else tokens
        borders = kwargs.get("cu_seq_lens_q")
        if borders is None:
            kwargs["position_ids"] = token_positions(tokens, mesh)
        else:
            kwargs["position_ids"] = token_positions(tokens[0], mesh, cu_seqlens=borders)[None]
    return (), kwargs
