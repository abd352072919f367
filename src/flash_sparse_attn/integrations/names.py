"""The names under which Transformers knows this attention."""

from __future__ import annotations

from typing import Any

NAMES = ("fsa", "fsa_deterministic")
"""The attention implementations; the second is bitwise repeatable, gradients included.

None contains "flash", "sdpa" or "flex_attention": Transformers takes such names for its own.
"""


def is_deterministic(config: Any) -> bool | None:
    """Whether the name in a model's configuration asks for repeatable results; ``None``: no.

    Raises:
        ValueError: It is not one of ours, so that its masks are made for something else.
    """
    name = config._attn_implementation
    if name not in NAMES:
        raise ValueError(
            f"attn_implementation: expected one of {NAMES} in a model with dynamic masks, got "
            f"{name!r}; use set_attn_implementation"
        )
    return True if name == NAMES[1] else None
