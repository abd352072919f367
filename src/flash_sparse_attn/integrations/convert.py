"""Dynamic masks for dense models: the layers stay, and get a score for every key."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from .. import checks
from .dynamic import DynamicMask, DynamicMaskLayer
from .names import is_deterministic
from .window_layer import window_layer

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_ADDED = (".A", ".dt_proj.weight")
_classes: dict[type, type] = {}


class ConvertedLayer(DynamicMaskLayer):
    """What a dense attention layer gets mixed in. Its own forward runs, and calls `attend`."""

    settings: DynamicMask

    @property
    def dynamic_mask(self) -> DynamicMask:
        """`settings`."""
        return self.settings

    def forward(
        self, hidden_states: Tensor, *args: Any, past_key_values: Any = None, **kwargs: Any
    ) -> Any:
        """As the dense layer's, with room in the cache for the window instead of all keys."""
        is_deterministic(self.config)  # type: ignore[attr-defined]
        window = window_layer(past_key_values, self.layer_idx, self.settings.sizes)
        return super().forward(  # type: ignore[misc]
            hidden_states,
            *args,
            past_key_values=past_key_values,
            dynamic_mask_inputs=(hidden_states, window),
            **kwargs,
        )


def converted_class(dense: type) -> type:
    """The class of converted layers of a dense class, of which they remain instances."""
    if dense not in _classes:
        _classes[dense] = type(f"DynamicMask{dense.__name__}", (ConvertedLayer, dense), {})
    return _classes[dense]


def add_dynamic_masks(
    model: PreTrainedModel,
    window_size: int | Sequence[int | None],
    keep_recent: int,
    keep_first: int,
) -> None:
    """Change the layers and note it in the configuration; see `transformers.convert`."""
    layers = list(attention_layers(model))
    if isinstance(window_size, int):
        window_size = [window_size] * len(layers)
    if len(window_size) != len(layers):
        raise ValueError(
            f"window_size: expected an int or one per layer, {len(layers)}, got {len(window_size)}"
        )
    checks.check_count("keep_recent", keep_recent, 0)
    checks.check_count("keep_first", keep_first, 0)
    for layer, size in zip(layers, window_size, strict=True):
        if size is not None:
            checks.check_count("window_size", size, 1)
            _check(layer)
    for layer, size in zip(layers, window_size, strict=True):
        if size is not None:
            _convert_layer(layer, DynamicMask(size, keep_first, keep_recent), model)
    model.config.dynamic_mask = {
        "window_size": list(window_size),
        "keep_recent": keep_recent,
        "keep_first": keep_first,
    }


def attention_layers(model: nn.Module) -> Iterator[Any]:
    """The self-attention layers of a decoder with separate projections, in order.

    Raises:
        TypeError: There is none.
    """
    found = False
    for module in model.modules():
        if all(hasattr(module, name) for name in (*_PROJECTIONS, "layer_idx", "head_dim")):
            found = True
            yield module
    if not found:
        raise TypeError(
            f"model: expected attention layers with {', '.join(_PROJECTIONS)}, as in Llama and "
            f"Qwen, found none in {type(model).__name__}"
        )


def load_dense(path: str | Path, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model that was converted, and the arguments of `transformers.convert`."""
    model = AutoModelForCausalLM.from_pretrained(path, **options)
    settings = getattr(model.config, "dynamic_mask", None)
    if settings is None:
        raise ValueError(
            f"path: {path} holds no converted model (its configuration has no dynamic_mask); use "
            "from_pretrained, then convert"
        )
    return model, settings


def load_added(model: PreTrainedModel, path: str | Path) -> None:
    """Read the parameters that converting added."""
    wanted = {
        name: parameter for name, parameter in model.named_parameters() if name.endswith(_ADDED)
    }
    with torch.no_grad():
        for name, tensor in _saved_tensors(path, set(wanted)):
            wanted.pop(name).copy_(tensor)
    if wanted:
        raise ValueError(f"path: {path} has no weights for {sorted(wanted)}")


def _check(layer: Any) -> None:
    name = type(layer).__name__
    if isinstance(layer, DynamicMaskLayer):
        raise ValueError(f"model: layer {layer.layer_idx} ({name}) has a dynamic mask already")
    # Layers say None if they have none; models in which all have one leave it to the configuration.
    shared = getattr(layer.config, "sliding_window", None)
    if getattr(layer, "sliding_window", shared) is not None:
        raise ValueError(
            f"window_size: layer {layer.layer_idx} ({name}) has a sliding window, expected None "
            "for it: it stays as it is"
        )
    if not isinstance(layer.v_proj, nn.Linear):
        raise TypeError(
            f"model: expected nn.Linear as v_proj of {name}, got {type(layer.v_proj).__name__}; "
            "convert first, then add adapters"
        )


def _convert_layer(layer: Any, settings: DynamicMask, model: PreTrainedModel) -> None:
    weight = layer.v_proj.weight
    kv_heads = len(weight) // layer.head_dim
    like = {"dtype": weight.dtype, "device": weight.device}
    layer.A = nn.Parameter(torch.zeros(kv_heads, **like))
    layer.dt_proj = nn.Linear(len(weight), kv_heads, bias=False, **like)
    std = getattr(model.config.get_text_config(), "initializer_range", 0.02)
    nn.init.normal_(layer.dt_proj.weight, std=std)
    layer.settings = settings
    layer.__class__ = converted_class(type(layer))


def _saved_tensors(path: str | Path, names: set[str]) -> Iterator[tuple[str, Tensor]]:
    """Those of these tensors that a checkpoint of safetensors files has."""
    index = cached_file(path, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    if index is None:
        files = {SAFE_WEIGHTS_NAME}
    else:
        places = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        files = {file for name, file in places.items() if name in names}
    for file in sorted(files):
        with safe_open(cached_file(path, file), framework="pt") as tensors:
            for name in names & set(tensors.keys()):
                yield name, tensors.get_tensor(name)
