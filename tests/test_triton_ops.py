"""The attention operator, its gradients and who sees it, with PyTorch in place of the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flash_sparse_attn.backends.triton import config, ops
from flash_sparse_attn.backends.triton.config import keeps_rest
from flash_sparse_attn.plan import Plan
from flash_sparse_attn.problem import Problem
from flash_sparse_attn.reference import attention_reference

MASK = torch.rand(1, 1, 6, 9, generator=torch.Generator().manual_seed(0)) < 0.7


def run_forward(query, key, value, bias, plan, scale, softcap, *, with_norm):
    options = {"softmax_scale": scale, "softcap": softcap, "is_causal": not plan.clamps_positions}
    out, lse, _ = attention_reference(query, key, value, plan.mask, bias, **options)
    out, lse = out.contiguous(), lse.float()
    if not with_norm:
        return out, lse, None, None
    return out, lse, torch.stack([lse, lse]), 1e-9 * out if keeps_rest(out) else None


def run_backward(grad_out, query, key, value, bias, out, norm, rest, plan, scale, softcap, needs):
    leaves = [None if t is None else t.detach().requires_grad_() for t in (query, key, value, bias)]
    wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]

    def differentiate():
        with torch.enable_grad():
            again, lse, *_ = run_forward(*leaves, plan, scale, softcap, with_norm=False)
            return again, lse, iter(torch.autograd.grad(again, wanted, grad_out))

    # Below an operator there is no autograd, except in another thread.
    with ThreadPoolExecutor(1) as thread:
        again, lse, grads = thread.submit(differentiate).result()
    assert torch.equal(again, out) and torch.equal(norm[0], lse)
    assert torch.equal(rest, 1e-9 * out) if keeps_rest(out) else rest is None
    return [next(grads) if need else None for need in needs]


@pytest.fixture(autouse=True)
def _without_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ops, "_run_forward", run_forward)
    monkeypatch.setattr(ops, "_run_backward", run_backward)
    library = torch.library.Library("flash_sparse_attn", "IMPL")
    library.impl("forward", ops._forward, "CPU")
    library.impl("backward", ops._backward, "CPU")
    yield
    library._destroy()


def inputs(*needs: bool) -> list[Tensor]:
    """Query, key, value and bias in fp64, of which some require a gradient."""
    shapes = ((1, 6, 4, 8), (1, 9, 2, 8), (1, 9, 2, 8), (1, 2, 1, 9))
    needs = needs or (True,) * 4
    return [
        torch.randn(shape, dtype=torch.float64, requires_grad=need)
        for shape, need in zip(shapes, needs, strict=True)
    ]


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    options = {"is_causal": True, "softmax_scale": None, "softcap": 0.0, "deterministic": None}
    problem = Problem.of(query, key, value, MASK, bias, **options)
    plan = Plan.of([*[None] * 11, MASK.clone()], [16, 128, 6, 9], False)
    out, lse = ops.attend(problem, query, key, value, bias, plan)
    assert not lse.requires_grad
    return out


def truth(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    return attention_reference(query, key, value, MASK, bias, is_causal=True)[0]


class Seen(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.fixture(params=["small", "large"])
def _of_any_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs of which what rounding took is kept, and of which it is not."""
    if request.param == "large":
        monkeypatch.setattr(config, "REST_ELEMENTS", 0)


@pytest.mark.usefixtures("_of_any_size")
@pytest.mark.parametrize("needs", [(True,) * 4, (False, False, False, True), (True, False) * 2])
@pytest.mark.parametrize("is_watched", (False, True))
def test_gradients(needs: tuple[bool, ...], is_watched: bool) -> None:
    """By an operator if somebody looks at operators, and without one else."""
    tensors = inputs(*needs)
    leaves = [tensor for tensor in tensors if tensor.requires_grad]
    seen = Seen()
    if is_watched:
        with seen:
            out = attend(*tensors)
    else:
        out = attend(*tensors)
    grad = torch.randn_like(out)
    assert ("flash_sparse_attn::forward" in seen.names) == is_watched
    want = truth(*tensors)
    assert torch.equal(out, want)
    for got, expected in zip(
        torch.autograd.grad(out, leaves, grad), torch.autograd.grad(want, leaves, grad), strict=True
    ):
        assert torch.equal(got, expected)


@pytest.mark.usefixtures("_of_any_size")
def test_operator_as_its_schema_and_fake_say() -> None:
    query, key, value, bias = (tensor.detach() for tensor in inputs())
    plan = Plan.of([*[None] * 11, MASK.clone()], [16, 128, 6, 9], False)
    call = (plan.tensors(), 0.5, 0.0, False, list(plan.sizes))
    checks = ("test_schema", "test_faketensor")
    forward = torch.ops.flash_sparse_attn.forward
    torch.library.opcheck(forward, (query, key, value, bias, *call), test_utils=checks)
    _, _, _, rest = forward(query, key, value, bias, *call)
    assert rest.shape == (query.shape if keeps_rest(query) else (0,))


def test_only_the_inputs_of_a_checkpointed_call_are_kept() -> None:
    tensors = inputs()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = torch.utils.checkpoint.checkpoint(attend, *tensors, use_reentrant=False)
    assert {id(tensor) for tensor in kept} <= {id(tensor) for tensor in tensors}
    grads = torch.autograd.grad(out.sum(), tensors)
    for got, want in zip(grads, torch.autograd.grad(truth(*tensors).sum(), tensors), strict=True):
        assert torch.equal(got, want)


def test_hooks_see_all_that_is_kept() -> None:
    """The tensors of the plan as well, or they could not be moved elsewhere."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        attend(*inputs())
    assert any(torch.equal(tensor, MASK) for tensor in kept if tensor.dtype == torch.bool)
    assert len(kept) == 8  # query, key, value, bias, out, norm, what rounding took, mask


@pytest.mark.usefixtures("_of_any_size")
def test_second_derivatives_are_refused() -> None:
    tensors = inputs()
    (grad,) = torch.autograd.grad(attend(*tensors).sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        grad.sum().backward()
