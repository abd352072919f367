"""How calls without a selection are planned and dispatched, without a GPU: from shapes alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flash_sparse_attn import dispatch
from flash_sparse_attn.backends import sdpa
from flash_sparse_attn.backends.triton import mask_ops, ops, plan_mask
from flash_sparse_attn.backends.triton.config import DIRECT_KEYS
from flash_sparse_attn.backends.triton.masks import MaskLayout
from flash_sparse_attn.plan import Plan
from flash_sparse_attn.problem import Problem
from flash_sparse_attn.varlen import PackedSequences

LONG = 2 * DIRECT_KEYS

PLAIN = Problem(
    batch=2, query_len=300, key_len=300, num_heads=4, num_kv_heads=2, head_dim=64,
    dtype=torch.bfloat16, device=torch.device("cuda", 0), selection=None, mask_shape=None,
    bias_shape=None, bias_dtype=None, is_causal=True, softmax_scale=0.125, softcap=0.0,
    deterministic=False, requires_grad=True,
)  # fmt: skip


@pytest.mark.parametrize(
    ("mask_shape", "key_len", "kind", "rows", "members"),
    [
        (None, LONG, "keys", (1, 1), 1),
        ((1, 1, 300, 300), 300, "keys", (1, 1), 1),
        ((2, 1, 1, LONG), LONG, "shown", (2, 1), 1),
        ((1, 2, 1, LONG), LONG, "shown", (1, 2), 1),
        ((1, 4, 1, LONG), LONG, "bits", (1, 2), 2),
        ((2, 1, 500, LONG), LONG, "bits", (2, 1), 1),
        ((1, 4, 500, 1), LONG, "bits", (1, 2), 2),
    ],
)
def test_what_is_planned(mask_shape, key_len, kind, rows, members):
    layout = MaskLayout.of(mask_shape, 500, key_len, 4, 2, 2)
    assert (layout.kind, layout.rows) == (kind, rows)
    if kind != "keys":
        assert layout.members == members
    assert layout.epoch_len % 32 == 0
    assert (layout.num_epochs - 1) * layout.epoch_len < 500 <= layout.num_epochs * layout.epoch_len


@pytest.mark.parametrize(
    "mask_shape", [None, (1, 1, LONG, LONG), (2, 1, 1, LONG), (1, 4, LONG, 1), (1, 2, 9, 300)]
)
def test_operators_have_fakes_and_gradients(mask_shape):
    """A compiler sees shapes of plan, output and gradients without running a kernel."""
    queries, keys = (9, 300) if mask_shape == (1, 2, 9, 300) else (LONG, LONG)
    with FakeTensorMode():
        query = torch.empty(2, queries, 4, 64, dtype=torch.bfloat16, requires_grad=True)
        key = torch.empty(2, keys, 2, 64, dtype=torch.bfloat16, requires_grad=True)
        bias = torch.empty(1, 1, queries, keys, requires_grad=True)
        mask = None if mask_shape is None else torch.empty(mask_shape, dtype=torch.bool)
        options = {"is_causal": True, "softmax_scale": None, "softcap": 0.0, "deterministic": None}
        problem = Problem.of(query, key, key, mask, bias, **options)
        plan = mask_ops.plan_of(problem, mask)
        # Its lists, for kernels of the passes that read it.
        assert bool(plan.lists) == (plan.slots == "gathered")
        out, lse = ops.attend(problem, query, key, key, bias, plan)
        grads = torch.autograd.grad(out, (query, key, bias), torch.empty_like(out))
    assert out.shape == query.shape and lse.shape == (2, 4, queries)
    assert [g.shape for g in grads] == [query.shape, key.shape, bias.shape]
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dynamic", (False, True))
def test_a_compiler_sees_one_operator_of_planning(dynamic):
    """Nothing of how sizes are chosen breaks its graph."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return lambda *tensors: tensors[:1]  # there is nothing to run on the CPU

    def plan(mask, query, key):
        options = {"is_causal": True, "softmax_scale": None, "softcap": 0.0, "deterministic": None}
        problem = Problem.of(query, key, key, mask, None, **options)
        return mask_ops.plan_of(problem, mask).lists[0]

    torch._dynamo.reset()
    compiled = torch.compile(plan, fullgraph=True, backend=keep, dynamic=dynamic)
    query, key = torch.randn(1, 160, 4, 64), torch.randn(1, LONG, 2, 64)
    compiled(torch.ones(1, 1, 160, LONG, dtype=torch.bool), query, key)
    (graph,) = graphs
    called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert torch.ops.flash_sparse_attn.plan_mask in called


@pytest.mark.parametrize("bias_shape", [None, (1, 1, 500, LONG)])
def test_sizes_are_worked_out_once(bias_shape, monkeypatch):
    """Where no compiler sees the call; they are those that the operator finds."""
    asked, layouts = [], []

    def ask(*args, of=MaskLayout.of, **options):
        asked.append(args)
        return of(*args, **options)

    def plan(mask, layout, **options):
        layouts.append(layout)
        return Plan.of([], [0] * 4, False)

    monkeypatch.setattr(MaskLayout, "of", ask)
    monkeypatch.setattr(plan_mask, "plan_mask", plan)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: None, raising=False)
    shape = (1, 1, 500, LONG)
    sizes = {"query_len": 500, "key_len": LONG, "mask_shape": shape, "bias_shape": bias_shape}
    mask = torch.ones(shape, dtype=torch.bool)
    mask_ops.plan_of(replace(PLAIN, device=mask.device, **sizes), mask)
    assert len(asked) == 1
    call = (500, LONG, 4, 2, 2, True, True, "sm_80", 64, bias_shape is not None)
    mask_ops._plan_mask(mask, *call)
    assert layouts[0] == layouts[1] and layouts[0].lists


def test_packed_sequences_are_epochs():
    with FakeTensorMode():
        borders = torch.empty(6, dtype=torch.int32)
        packed = PackedSequences(borders, borders, 200, 100)
        plan = mask_ops.plan_of(replace(PLAIN, batch=1, packed=packed), None)
    assert (plan.slots, plan.epoch_len, plan.num_slots) == ("keys", 256, 128)
    assert plan.num_epochs == 300 // 256 + 5
    assert plan.use_slot.shape == (300,)


@pytest.mark.filterwarnings("ignore:attention runs on the eager backend")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"mask_shape": (1, 1, 1, 300)}, "no mask"),
        ({"selection": "causal"}, "no mask"),
        ({"bias_shape": (1, 1, 1, 300)}, "no bias"),
        ({"softcap": 5.0}, "softcap"),
        ({"deterministic": True}, "repeatable"),
        ({"dtype": torch.float32}, "fp16 and bf16"),
        ({"head_dim": 60}, "multiples of 8"),
        ({"query_len": 4}, "too few"),
        ({"query_len": 400}, "see no key"),
        ({"device": torch.device("cpu")}, "NVIDIA"),
    ],
)
def test_only_plain_attention_goes_to_pytorch(change, reason, monkeypatch):
    monkeypatch.setattr(sdpa, "_capability", lambda device: (9, 0))
    assert sdpa.unsupported(PLAIN) == []
    assert dispatch.choose(PLAIN) is sdpa
    problem = replace(PLAIN, **change)
    reasons = sdpa.unsupported(problem)
    assert len(reasons) == 1 and reason in reasons[0]
    monkeypatch.setattr(dispatch.triton, "unavailable", lambda: [])
    assert dispatch.choose(problem) is not sdpa


def test_a_name_is_never_replaced(monkeypatch):
    monkeypatch.setattr(sdpa, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(dispatch.triton, "unavailable", lambda: [])
    assert dispatch.choose(PLAIN, "triton") is dispatch.triton
