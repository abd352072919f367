"""Key scores on a GPU: exact, with every gradient, and the same bits wherever a token stands."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from compare import assert_fair
from score_cases import NAMES, make_hidden, make_layers, plain_scores, results_of
from torch import Tensor

pytest.importorskip("triton")

from flash_sparse_attn.backends.triton import launch as launching
from flash_sparse_attn.scores import folded_key_scores

pytestmark = pytest.mark.gpu

SHAPES = (
    # hidden states, KV heads, head dimension: tiles of 16 tokens from 4224 tokens on
    ((1, 5000, 1024), 4, 64),
    ((2, 3000, 300), 2, 64),
    ((3, 700, 257), 3, 20),
    ((1500, 1), 1, 1),
    ((1, 4500, 100), 9, 33),
    ((2, 3, 17, 64), 64, 8),
    ((1, 1, 2048), 8, 128),
    ((64, 1, 129), 5, 64),
)
MIXED = (torch.bfloat16, torch.float32)


class Layer(NamedTuple):
    """What is read of an ``nn.Linear``."""

    weight: Tensor
    bias: Tensor | None


def score(hidden, v_weight, v_bias, dt_weight, dt_bias, A, exponential=False):
    v_proj, dt_proj = Layer(v_weight, v_bias), Layer(dt_weight, dt_bias)
    return folded_key_scores(hidden, v_proj, dt_proj, A, exponential)


def cuda_layers(size, heads_kv, head_dim, dtype=torch.bfloat16, bias=True):
    return make_layers(size, heads_kv, head_dim, dtype, bias, "cuda")


@pytest.mark.parametrize("exponential", (False, True))
@pytest.mark.parametrize(
    "dtypes",
    (
        (torch.float32,) * 2,
        (torch.bfloat16,) * 2,
        (torch.float16,) * 2,
        MIXED,
        (torch.float64,) * 2,
    ),
    ids=str,
)
@pytest.mark.parametrize(("shape", "heads_kv", "head_dim"), SHAPES)
def test_scores_and_all_gradients(shape, heads_kv, head_dim, dtypes, exponential):
    layers = cuda_layers(shape[-1], heads_kv, head_dim, dtypes[1], bias=not exponential)
    hidden = make_hidden(*shape, dtype=dtypes[0], device="cuda")
    tensors = (hidden, *layers)
    given = [one for one in tensors if one is not None]
    names = ["score", *(n for n, one in zip(NAMES, tensors, strict=True) if one is not None)]
    upstream = make_hidden(*shape[:-2], heads_kv, shape[-2], device="cuda", seed=9) / 100
    results = results_of(score, tensors, upstream, exponential)
    truths = results_of(
        plain_scores, [None if one is None else one.double() for one in tensors], upstream,
        exponential,
    )  # fmt: skip
    plains = results_of(
        plain_scores, [None if one is None else one.float() for one in tensors], upstream,
        exponential,
    )  # fmt: skip
    for name, result, truth, plain, like in zip(
        names, results, truths, plains, [upstream, *given], strict=True
    ):
        assert result.dtype == like.dtype, name
        assert_fair(result, truth, plain.to(like.dtype), name)


def test_softplus_and_exp_are_exact_where_they_are_tiny_or_large():
    one = torch.ones(1, device="cuda")
    logit = torch.cat([torch.linspace(-86, 86, 1730), 10.0 ** torch.arange(-30, 0)]).cuda()
    softplus = torch.logaddexp(logit.double(), torch.zeros_like(logit).double())
    for exponential, truth in ((False, softplus), (True, softplus.exp())):
        got = score(logit[:, None], one[:, None], None, one[:, None], None, one, exponential)[0]
        error = ((got - truth) / truth).abs().max()
        # Of an exponential the rounding of its argument, too.
        assert error < (5e-6 if exponential else 1e-6)


def test_infinite_and_undefined_states():
    layers, hidden = cuda_layers(64, 2, 16), make_hidden(1, 4, 64, device="cuda")
    hidden[0, 1, 3], hidden[0, 2, 5] = torch.inf, torch.nan
    got = score(hidden, *layers)
    assert got[0, :, 2].isnan().all() and got[0, :, 0].isfinite().all()
    assert got[0, 1, 1].item() in (0.0, torch.inf, -torch.inf)


@pytest.mark.parametrize("heads_kv", (1, 3, 4, 8))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize("size", (1024, 300, 257, 24))
def test_bits_depend_on_the_token_alone(size, dtype, heads_kv):
    layers = cuda_layers(size, heads_kv, 16)
    hidden = make_hidden(2, 6000, size, dtype=dtype, device="cuda")
    whole = score(hidden, *layers)
    assert whole[:, -1].unique().numel() > 5000
    for length in (1, 7, 16, 1000, 4224, 5999):
        for start in (0, 1, 16, 4321):
            chunk = hidden[:, start : start + length]
            assert torch.equal(score(chunk, *layers), whole[..., start : start + length])
    for row in range(2):
        assert torch.equal(score(hidden[row], *layers), whole[row])
        assert torch.equal(score(hidden[row, 77:78].clone(), *layers), whole[row, :, 77:78])
    # As a batch of single tokens, as in decoding; and of several, in another order.
    tokens = hidden.view(-1, 1, size)
    assert torch.equal(score(tokens, *layers).view(2, 6000, -1).mT, whole)
    assert torch.equal(score(tokens[5:69], *layers)[..., 0].mT, whole[0, :, 5:69])
    turned = score(hidden.flip(1).unflatten(1, (60, 100)), *layers)
    assert torch.equal(turned.transpose(1, 2).flatten(2).flip(2), whole)
    for begin in (1, 2, 8):  # other alignments
        padded = torch.nn.functional.pad(hidden, (begin, 8))[..., begin : begin + size]
        assert torch.equal(score(padded, *layers), whole)
        moved = torch.empty(hidden.numel() + begin, dtype=dtype, device="cuda")[begin:]
        moved = moved.view_as(hidden).copy_(hidden)
        assert torch.equal(score(moved, *layers), whole)
    for given in (
        hidden.transpose(0, 1).contiguous().transpose(0, 1),
        hidden.transpose(1, 2).contiguous().transpose(1, 2),
    ):
        assert torch.equal(score(given, *layers), whole)
    assert torch.equal(score(hidden.requires_grad_(), *layers), whole)


def run(hidden, *layers):
    return score(hidden, *layers, True)


def leaves_of(length=5000, size=1024, heads_kv=4, bias=True):
    layers = cuda_layers(size, heads_kv, 64, bias=bias)
    hidden = make_hidden(2, length, size, dtype=torch.bfloat16, device="cuda")
    return [one if one is None else one.requires_grad_() for one in (hidden, *layers)]


def gradients(function, leaves, upstream):
    result = function(*leaves)
    given = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    return [result.detach(), *torch.autograd.grad(result, given, upstream)]


def test_everything_repeats_bit_for_bit():
    leaves = leaves_of()
    upstream = make_hidden(2, 4, 5000, device="cuda", seed=9)
    first = gradients(run, leaves, upstream)
    for _ in range(3):
        for got, want in zip(gradients(run, leaves, upstream), first, strict=True):
            assert torch.equal(got, want)


def test_repeated_launches_equal_fresh_ones(monkeypatch):
    monkeypatch.setattr(launching, "_recordings", {})
    upstream = make_hidden(2, 4, 5000, device="cuda", seed=9)
    for number in range(3):
        leaves = leaves_of()
        with torch.no_grad():
            leaves[0].normal_()
        got = gradients(run, leaves, upstream)
        with monkeypatch.context() as patch:
            patch.setattr(launching, "_can_repeat", lambda device: False)
            patch.setattr(launching, "_recordings", {})
            want = gradients(run, leaves, upstream)
        assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True)), number
    assert len(launching._recordings) == 2 and None not in launching._recordings.values()


@pytest.mark.parametrize("frozen", (("hidden",), ("v_weight", "dt_weight", "v_bias"), NAMES[1:]))
def test_frozen_tensors_have_no_gradients(frozen):
    leaves = leaves_of(300)
    upstream = make_hidden(2, 4, 300, device="cuda", seed=9)
    _, *every = gradients(run, leaves, upstream)
    want = [grad for name, grad in zip(NAMES, every, strict=True) if name not in frozen]
    for name, leaf in zip(NAMES, leaves, strict=True):
        leaf.requires_grad_(name not in frozen)
    _, *grads = gradients(run, leaves, upstream)
    for grad, same in zip(grads, want, strict=True):  # kernels may sum in other orders
        torch.testing.assert_close(grad, same, rtol=1e-2, atol=1e-5)


def test_gradients_of_scores_may_have_any_strides():
    leaves = leaves_of(300)
    for upstream in (
        torch.tensor(0.1, device="cuda").expand(2, 4, 300),
        make_hidden(2, 300, 4, device="cuda").mT,
        make_hidden(4, 2, 300, device="cuda").transpose(0, 1),
    ):
        want = gradients(run, leaves, upstream.contiguous())
        for got, same in zip(gradients(run, leaves, upstream), want, strict=True):
            assert torch.equal(got, same)


@pytest.mark.parametrize("dynamic", (False, True))
@pytest.mark.parametrize("bias", (False, True))
def test_compiled_has_the_same_bits(bias, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic)
    for length in (300, 5000):
        leaves = leaves_of(length, bias=bias)
        upstream = make_hidden(2, 4, length, device="cuda", seed=9)
        want = gradients(run, leaves, upstream)
        for got, same in zip(gradients(compiled, leaves, upstream), want, strict=True):
            assert torch.equal(got, same)


def test_operators_pass_opcheck():
    leaves = leaves_of(100)
    operator = torch.ops.flash_sparse_attn.key_scores.default
    torch.library.opcheck(operator, (*leaves, True))
    _, logit = operator(*leaves, True)
    detached = [leaf.detach() for leaf in leaves]
    torch.library.opcheck(
        torch.ops.flash_sparse_attn.key_scores_backward.default,
        (torch.randn_like(logit), *detached, logit.detach(), True, [True] * 4 + [False] * 2),
    )


def test_captured_in_a_graph():
    leaves, upstream = leaves_of(), make_hidden(2, 4, 5000, device="cuda", seed=9)
    with torch.cuda.stream(torch.cuda.Stream()):
        gradients(run, leaves, upstream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(run, leaves, upstream)
    for _ in range(2):
        with torch.no_grad():
            leaves[0].normal_()
            upstream.normal_()
        graph.replay()
        for got, want in zip(captured, gradients(run, leaves, upstream), strict=True):
            assert torch.equal(got, want)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_neither_waits_nor_heeds_autocast():
    leaves, upstream = leaves_of(300), make_hidden(2, 4, 300, device="cuda", seed=9)
    want = gradients(run, leaves, upstream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", torch.float16):
            results = gradients(run, leaves, upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(got, same) for got, same in zip(results, want, strict=True))


def test_second_derivatives_are_refused():
    leaves = leaves_of(100)
    upstream = make_hidden(2, 4, 100, device="cuda", seed=9).requires_grad_()
    (grad,) = torch.autograd.grad(run(*leaves), leaves[0], upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_no_tokens():
    leaves = leaves_of(0)
    got = gradients(run, leaves, torch.empty(2, 4, 0, device="cuda"))
    assert got[0].shape == (2, 4, 0) and not any(grad.any() for grad in got[1:])


def test_offsets_beyond_int32():
    layers = cuda_layers(1024, 4, 64)
    hidden = torch.empty(1, (1 << 21) + 5000, 1024, dtype=torch.bfloat16, device="cuda")
    hidden.normal_()
    upstream = torch.randn(1, 4, hidden.shape[1], device="cuda")
    hidden.requires_grad_()
    whole = score(hidden, *layers)
    (grad,) = torch.autograd.grad(whole, hidden, upstream)
    end = hidden.detach()[:, -5000:].clone().requires_grad_()
    part = score(end, *layers)
    assert torch.equal(whole[..., -5000:], part)
    (same,) = torch.autograd.grad(part, end, upstream[..., -5000:])
    assert torch.equal(grad[:, -5000:], same)
