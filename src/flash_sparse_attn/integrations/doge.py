"""Doge's own attention, exact and in O(N W): the class that `apply_to_doge` puts into a model."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.doge import modeling_doge

from .. import checks
from .dynamic import DynamicMask, DynamicMaskLayer, attend
from .keywords import attention_options
from .names import is_deterministic
from .window_layer import window_layer

Model = TypeVar("Model", bound=PreTrainedModel)


class DogeDynamicAttention(modeling_doge.DogeAttention, DynamicMaskLayer):
    """`DogeAttention` with its mask as two integers per key instead of ``Q x K`` numbers."""

    head_dim: int
    scaling: float
    attention_dropout: float
    keep_window_size: int

    @property
    def dynamic_mask(self) -> DynamicMask:
        """`keep_window_size` as it is now: it may be changed between calls."""
        return DynamicMask(self.keep_window_size, exponential=True)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """As the parent's; the weights of the attention are never made, so None stands for them."""
        dropout = self.attention_dropout if self.training else 0.0
        keywords = {"deterministic": is_deterministic(self.config), **kwargs}
        options = attention_options(self, self.scaling, dropout, keywords)
        window = window_layer(past_key_values, self.layer_idx, self.dynamic_mask.sizes)
        heads = (-1, self.head_dim)
        query = self.q_proj(hidden_states).unflatten(-1, heads)
        key = self.k_proj(hidden_states).unflatten(-1, heads)
        value = self.v_proj(hidden_states).unflatten(-1, heads)
        query, key = modeling_doge.apply_rotary_pos_emb(
            self.q_norm(query), self.k_norm(key), *position_embeddings, unsqueeze_dim=2
        )
        query, key = query.to(value.dtype), key.to(value.dtype)
        if window is not None:
            past_key_values.update(key.transpose(1, 2), value.transpose(1, 2), self.layer_idx)
        out = attend(
            self, query, key, value, hidden_states, attention_mask, window, kwargs, **options
        )
        return self.o_proj(out.flatten(2)), None


def replace_attention(model: Model) -> Model:
    """Give every `DogeAttention` of a model the class above; parameters and names stay."""
    layers = [m for m in model.modules() if isinstance(m, modeling_doge.DogeAttention)]
    if not layers:
        raise TypeError(f"model: expected a Doge model, got {type(model).__name__}")
    for layer in layers:
        config = layer.config
        if getattr(config, "sliding_window", None) is not None:
            raise ValueError(
                "model: expected config.sliding_window = None, got "
                f"{config.sliding_window}: the best keys within a sliding window are not an "
                "interval of positions each; set it to None, keep_window_size bounds the cost"
            )
        checks.check_count("config.keep_window_size", layer.keep_window_size, 1)
    for layer in layers:
        layer.__class__ = DogeDynamicAttention
    return model
