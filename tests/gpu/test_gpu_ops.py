"""The operators on a GPU: opcheck, compilers, graphs, checkpointing, autocast, streams, memory."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from flash_sparse_attn import (
    dynamic_mask_attn_func,
    flash_sparse_attn_func,
    prepare_selection,
    select_keys,
)

pytestmark = pytest.mark.gpu

DTYPE = torch.bfloat16


def inputs(batch=1, length=300, heads=4, kv_heads=2, dim=64, *, requires_grad=True):
    """Query, key, value and scores on the GPU."""
    tensors = [
        torch.randn(batch, length, count, dim, device="cuda", dtype=DTYPE)
        for count in (heads, kv_heads, kv_heads)
    ]
    tensors.append(torch.randn(batch, kv_heads, length, device="cuda"))
    return [tensor.requires_grad_(requires_grad) for tensor in tensors]


def gradients(function, tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
    out = function(*tensors)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad)]


def attend(query, key, value, scores, window=48):
    return dynamic_mask_attn_func(query, key, value, scores, window, backend="triton")


def test_operators_pass_opcheck():
    query, key, value, scores = inputs(length=130)
    selection = prepare_selection(select_keys(scores, 32))
    plan = selection.plan
    torch.library.opcheck(
        torch.ops.flash_sparse_attn.select,
        (scores.detach(), 32, "causal", None, None, 1, 2),
    )
    intervals = (selection.start, selection.expiry, selection.score)
    torch.library.opcheck(
        torch.ops.flash_sparse_attn.plan,
        (*intervals, None, None, None, "causal", 32, 0, 0, 130, True, True),
        # Slots past the last used block are not written.
        test_utils=("test_schema", "test_faketensor"),
    )
    mask = torch.rand(1, 1, 130, 3000, device="cuda") < 0.3
    torch.library.opcheck(
        torch.ops.flash_sparse_attn.plan_mask,
        (mask, 130, 3000, 4, 2, 1, True, True, "sm_90", 64, False),
        test_utils=("test_schema", "test_faketensor"),
    )
    call = (0.125, 0.0, False, list(plan.sizes))
    bias = scores.detach()[:, :, None].requires_grad_()
    torch.library.opcheck(
        torch.ops.flash_sparse_attn.forward,
        (query, key, value, bias, plan.tensors(), *call),
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_without_a_graph_break(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=dynamic)
    for length in (260, 390):
        tensors = inputs(length=length)
        grad = torch.randn_like(tensors[0])
        for name, got, want in zip(
            ("out", "dq", "dk", "dv", "dscores"),
            gradients(compiled, tensors, grad),
            gradients(attend, tensors, grad),
            strict=True,
        ):
            assert torch.equal(got, want), (length, name)


def test_dynamic_lengths_compile_once():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=counter)
    for length in (700, 900, 1500):
        compiled(*inputs(length=length))
    assert counter.frame_count == 1


def test_captured_in_a_graph_with_selection_and_backward():
    tensors = inputs(length=900, batch=2)
    grad = torch.randn_like(tensors[0])
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            gradients(attend, tensors, grad)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(attend, tensors, grad)
    for _ in range(2):
        with torch.no_grad():
            for tensor in tensors:
                tensor.normal_()
        graph.replay()
        for got, want in zip(captured, gradients(attend, tensors, grad), strict=True):
            assert torch.equal(got, want)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_no_synchronisation_with_the_host():
    tensors = inputs(length=700)
    grad = torch.randn_like(tensors[0])
    gradients(attend, tensors, grad)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(attend, tensors, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_checkpointing_repeats_the_selection():
    tensors = inputs(length=500)
    grad = torch.randn_like(tensors[0])

    def checkpointed(*args):
        return torch.utils.checkpoint.checkpoint(attend, *args, use_reentrant=False)

    for got, want in zip(
        gradients(checkpointed, tensors, grad), gradients(attend, tensors, grad), strict=True
    ):
        assert torch.equal(got, want)


def test_autocast_casts_query_key_value_and_leaves_scores():
    tensors = inputs(length=200)
    floats = [tensor.detach().float() for tensor in tensors]
    with torch.autocast("cuda", torch.bfloat16):
        out = attend(*floats)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, attend(*tensors))


def test_second_derivatives_are_refused():
    tensors = inputs(length=100)
    (grad,) = torch.autograd.grad(attend(*tensors).sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        grad.sum().backward()


@pytest.mark.filterwarnings("ignore:The AccumulateGrad")
def test_graph_retained_and_layers_share_a_plan_on_two_streams():
    query, key, value, scores = inputs(length=1000)
    selection = prepare_selection(select_keys(scores, 100))
    bias = scores[:, :, None]

    def layer(q, k, v):
        return flash_sparse_attn_func(q, k, v, selection, bias, backend="triton")

    want = gradients(layer, [query, key, value], torch.ones_like(query))
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results = []
    for stream in streams:
        with torch.cuda.stream(stream):
            out = layer(query, key, value)
            grads = [
                torch.autograd.grad(
                    out, [query, key, value], torch.ones_like(query), retain_graph=True
                )
                for _ in range(2)
            ]
            results.append((out, grads))
    torch.cuda.synchronize()
    for out, grads in results:
        assert torch.equal(out, want[0])
        for grad in grads:
            for got, expected in zip(grad, want[1:], strict=True):
                assert torch.equal(got, expected)


def test_fp32_runs_eager_with_one_warning_and_a_named_backend_refuses():
    floats = [tensor.detach().float() for tensor in inputs(length=64)]
    with pytest.warns(UserWarning, match="eager"):
        dynamic_mask_attn_func(*floats, 16)
    with pytest.raises(RuntimeError, match="fp16 and bf16"):
        attend(*floats)


@pytest.mark.parametrize("dim", [64, 128])
def test_repeated_launches_equal_the_first_call(dim, recordings, caplog):
    """Calls without gradients repeat recorded launches: other tensors, strides, and a plan."""
    for _ in range(3):
        query, key, value, scores = inputs(length=700, dim=dim, requires_grad=False)
        selection = prepare_selection(select_keys(scores, 100), for_backward=False)
        bias = scores[:, :, None]
        want = attend(query.requires_grad_(), key, value, scores, 100)
        with torch.no_grad():
            got = flash_sparse_attn_func(query, key, value, selection, bias)
            turned = query.transpose(1, 2).contiguous().transpose(1, 2)
            strided = flash_sparse_attn_func(turned, key, value, selection, bias)
            shared = flash_sparse_attn_func(query, key, key, selection, bias)
        assert torch.equal(got, want)
        assert torch.equal(strided, want)
        assert torch.equal(shared, attend(query, key, key, scores, 100))
    # A selection; plan and call, each with what backward needs and without; other strides.
    assert len(recordings) == 6 and not caplog.text


@pytest.mark.parametrize("dim", [64, 128])
def test_repeated_training_steps_equal_fresh_ones(dim, recordings, caplog):
    steps = []
    for _ in range(3):
        tensors = inputs(length=700, dim=dim, batch=2)
        grad = torch.randn_like(tensors[0])
        steps.append((tensors, grad, gradients(attend, tensors, grad)))
    # Selection, plan, forward, backward.
    assert len(recordings) == 4 and not caplog.text
    for tensors, grad, results in steps:
        recordings.clear()
        for got, want in zip(results, gradients(attend, tensors, grad), strict=True):
            assert torch.equal(got, want)


SELECTIONS = {
    "causal": {},
    "long prefixes": {"length": 70000, "window": 2048},
    "long prefixes of few kept": {"length": 70000, "window": 256},
    "window over everything": {"window": 3000},
    "padded": {"padded": True},
    "padded, sinks, recent": {"padded": True, "keep_first": 4, "keep_recent": 33},
    "shared, recent": {"mode": "shared", "keep_recent": 20},
    "relu, padded": {"mode": "relu", "padded": True},
    "packed": {"packed": True, "keep_first": 1},
    "packed, padded, recent": {"packed": True, "padded": True, "keep_recent": 7},
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_repeated_selections_and_plans_equal_fresh_ones(name, recordings, caplog):
    """Other scores, padding and borders at other addresses; what was given before stays as it was,
    so that an address that is not replaced shows."""
    case = {"length": 3000, "window": 100, "padded": False, "packed": False, **SELECTIONS[name]}
    length, window = case.pop("length"), case.pop("window")
    is_padded, is_packed = case.pop("padded"), case.pop("packed")
    is_causal = None if case.get("mode", "causal") == "causal" else True

    def prepare(window, inputs):
        scores, mask, borders = inputs
        chosen = select_keys(scores, window, key_mask=mask, cu_seqlens=borders, **case)
        return prepare_selection(chosen, is_causal=is_causal)

    steps = []
    for _ in range(3):
        scores = torch.randn(*(() if is_packed else (2,)), 2, length, device="cuda")
        mask = borders = None
        if is_padded:
            mask = torch.rand(*scores.shape[:-2], length, device="cuda") < 0.7
        if is_packed:
            inner = torch.randint(length, (5,), device="cuda").sort().values
            borders = torch.nn.functional.pad(inner, (1, 0))
            borders = torch.nn.functional.pad(borders, (0, 1), value=length).int()
        given = scores, mask, borders
        # Two windows by turns: the recordings of one must not serve the other.
        steps += [(width, given, prepare(width, given)) for width in (window, window // 2)]
    found = list(recordings.values())
    # Two selections, and their plans, which may be of one form.
    assert len(found) in (3, 4) and None not in found and not caplog.text
    for width, given, got in steps:
        recordings.clear()
        want = prepare(width, given)
        assert torch.equal(got.start, want.start) and torch.equal(got.expiry, want.expiry)
        for one, other in zip(got.plan.parts, want.plan.parts, strict=True):
            assert one is other is None or torch.equal(one, other)


@pytest.mark.parametrize("shape", [(2, 1, 1, 3000), (1, 4, 2000, 3000)])
def test_repeated_plans_of_masks_equal_fresh_ones(shape, recordings, caplog):
    from flash_sparse_attn.backends.triton.masks import MaskLayout
    from flash_sparse_attn.backends.triton.plan_mask import plan_mask

    layout = MaskLayout.of(shape, 2000, 3000, 4, 2, 2)
    masks = [torch.rand(shape, device="cuda") < 0.3 for _ in range(3)]
    options = {"is_causal": True, "for_backward": True}
    plans = [plan_mask(mask, layout, **options) for mask in masks]
    found = list(recordings.values())
    assert len(found) == 1 and None not in found and not caplog.text
    for mask, got in zip(masks, plans, strict=True):
        recordings.clear()
        want = plan_mask(mask, layout, **options)
        for one, other in zip(got.parts, want.parts, strict=True):
            assert one is other is None or torch.equal(one, other)


@pytest.mark.parametrize("is_shared", [False, True])
def test_repeated_plans_of_packed_sequences_equal_fresh_ones(is_shared, recordings, caplog):
    from flash_sparse_attn.backends.triton.plan_mask import plan_packed
    from flash_sparse_attn.varlen import PackedSequences

    steps = []
    for middle in (100, 900, 2600):
        keys = torch.tensor([0, middle, middle, 2700, 3000], dtype=torch.int32, device="cuda")
        queries = keys if is_shared else keys.flip(0).neg() + 3000
        packed = PackedSequences(queries, keys, 3072, 3072)
        steps.append((packed, plan_packed(packed, 3000, 3000, for_backward=True)))
    found = list(recordings.values())
    assert len(found) == 1 and None not in found and not caplog.text
    for packed, got in steps:
        recordings.clear()
        want = plan_packed(packed, 3000, 3000, for_backward=True)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.heavy  # wants the machine for itself
def test_host_time_of_a_training_call(monkeypatch):
    """Selection, plan, forward and backward: repeated launches against those of Triton."""
    launching = pytest.importorskip("flash_sparse_attn.backends.triton.launch")
    for name in ("empty", "empty_like", "empty_strided"):  # without poison
        monkeypatch.setattr(torch, name, getattr(torch, name).__wrapped__)
    tensors = inputs(length=512)  # the device would do it in no time
    grad = torch.randn_like(tensors[0])

    def host_time():
        times = []
        for _ in range(12):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(50):
                gradients(attend, tensors, grad)
            times.append((time.perf_counter() - start) / 50)
        return min(times)

    repeated = host_time()
    monkeypatch.setattr(launching, "_recordings", {})
    monkeypatch.setattr(launching, "_can_repeat", lambda device: False)
    ordinary = host_time()
    print(f"host time {repeated * 1e6:.0f} us a call with its backward, else {ordinary * 1e6:.0f}")
    assert repeated < 0.6 * ordinary


@pytest.mark.heavy  # wants the machine for itself
@pytest.mark.parametrize("dim", [64, 128])
def test_host_time_of_a_prepared_call(dim, monkeypatch):
    for name in ("empty", "empty_like", "empty_strided"):  # without poison
        monkeypatch.setattr(torch, name, getattr(torch, name).__wrapped__)
    query, key, value, scores = inputs(length=2048, dim=dim, requires_grad=False)
    selection = prepare_selection(select_keys(scores, 256), for_backward=False)
    bias = scores[:, :, None]

    def call():
        return flash_sparse_attn_func(query, key, value, selection, bias)

    times = []
    for _ in range(12):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(100):
            call()
        times.append((time.perf_counter() - start) / 100)
    print(f"host time {min(times) * 1e6:.1f} us a call")
    # 40 are asked for; a busy or slow machine takes longer.
    assert min(times) < 60e-6
