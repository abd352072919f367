"""FlexAttention backend."""

from __future__ import annotations

from typing import NoReturn

from ..problem import Problem


def unavailable() -> list[str]:
    """Why this backend cannot run on this machine."""
    return ["the FlexAttention backend is not part of this version; use backend=None"]


def unsupported(problem: Problem) -> list[str]:
    """Why this backend cannot run this call."""
    return unavailable()


def attention(problem: Problem, *tensors: object) -> NoReturn:
    """Raises: `dispatch.choose` never returns an unavailable backend."""
    raise NotImplementedError(unavailable()[0])
