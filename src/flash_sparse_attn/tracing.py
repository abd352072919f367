"""Who looks at a call: nobody, or a compiler, a fake mode or another that has to see operators."""

from __future__ import annotations

import torch
from torch import Tensor


def is_traced(tensor: Tensor) -> bool:
    """Whether a compiler, a fake mode or another subclass has to see operators, not launches."""
    return torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter)


def is_watched(tensor: Tensor) -> bool:
    """Whether somebody has to see operators: as above, or to choose what checkpoints keep."""
    return is_traced(tensor) or torch._C._len_torch_dispatch_stack() > 0
