"""Lists of blocks, interpreted on the CPU: plans against those of masks, results against fp64."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from compare import largest_error
from interpreter import run_interpreted
from oracles import check_attention
from torch import Tensor

pytest.importorskip("triton")

from flash_sparse_attn.backends import triton
from flash_sparse_attn.backends.triton import block_calls, block_ops
from flash_sparse_attn.backends.triton.block_calls import BlockLists
from flash_sparse_attn.backends.triton.config import TileConfig, Tiles
from flash_sparse_attn.backends.triton.masks import MaskLayout
from flash_sparse_attn.backends.triton.plan_blocks import plan_blocks
from flash_sparse_attn.backends.triton.plan_mask import plan_mask
from flash_sparse_attn.integrations.block_sparse import block_sparse_attention
from flash_sparse_attn.plan import Plan
from flash_sparse_attn.reference import attention_reference

# fp32 throughout: values and gradients are of order 1 to 10.
TOLERANCE = 3e-5
PLANNING = importlib.import_module("flash_sparse_attn.backends.triton.plan_blocks")
TILES = Tiles(*(TileConfig(*size, 1, 1) for size in ((16, 16), (16, 16), (16, 32))))


@pytest.fixture(autouse=True)
def _small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists, words and keys are read in several blocks, and tiles are small."""
    for name, size in {"_LISTED": 2, "_CLEARED": 16, "_SEEN": 32}.items():
        monkeypatch.setattr(PLANNING, name, size)
    for name in ("forward", "backward"):
        module = importlib.import_module(f"flash_sparse_attn.backends.triton.{name}")
        monkeypatch.setattr(module, "tiles_for", lambda *_: TILES)


@dataclass(frozen=True)
class Case:
    """One call; `seen` is the shape of a mask of keys."""

    block_size: int = 17
    batch: int = 1
    queries: int = 70
    keys: int = 70
    heads: int = 2
    kv_heads: int = 1
    list_heads: int = 1
    topk: int = 3
    seen: tuple[int, ...] | None = None
    is_causal: bool = True
    dtype: torch.dtype = torch.int64
    epoch: int = 32


CASES = {
    "blocks": Case(),
    "blocks, not causal": Case(is_causal=False),
    "blocks of 1": Case(block_size=1, topk=9),
    "blocks of 64": Case(block_size=64, topk=1, keys=150, dtype=torch.int32),
    "one block": Case(block_size=100, topk=2),
    "fewer queries": Case(queries=45, keys=96),
    "fewer queries, not causal": Case(queries=45, keys=96, is_causal=False),
    "more queries": Case(queries=70, keys=45),
    "more queries, not causal": Case(queries=70, keys=45, is_causal=False),
    "KV heads": Case(batch=2, queries=40, keys=50, heads=4, kv_heads=2, list_heads=2),
    "heads": Case(queries=50, heads=4, kv_heads=2, list_heads=4, block_size=5),
    "heads, not causal": Case(heads=4, kv_heads=2, list_heads=4, is_causal=False),
    "group of 3": Case(heads=6, kv_heads=2, list_heads=2, queries=40),
    "group of 3, heads": Case(heads=3, kv_heads=1, list_heads=3, queries=40),
    "shared by heads": Case(batch=2, heads=4, kv_heads=2, list_heads=1, queries=40),
    "keys hidden": Case(batch=2, queries=50, seen=(2, 1, 1, 70)),
    "keys hidden for all": Case(batch=2, seen=(1, 1, 1, 70), is_causal=False),
    "everything hidden": Case(batch=2, seen=(2, 1, 1, 1)),
    "no lists": Case(topk=0),
}


def lists_of(case: Case) -> tuple[Tensor, Tensor | None, Tensor]:
    """Lists with holes, blocks named twice and empty rows; a mask of keys; the mask of both."""
    num_blocks = -(-case.keys // case.block_size)
    shape = (case.batch, case.list_heads, case.queries, case.topk)
    lists = torch.randint(0, num_blocks, shape, dtype=case.dtype)
    lists = torch.where(torch.rand(shape) < 0.3, -1, lists)
    lists[:, :, 5:9] = -1
    if case.topk > 1:
        lists[:, :, 20:30, 1] = lists[:, :, 20:30, 0]
    listed = torch.zeros(*shape[:3], num_blocks + 1, dtype=torch.bool)
    listed = listed.scatter(3, torch.where(lists < 0, num_blocks, lists).long(), True)
    mask = listed[..., :num_blocks].repeat_interleave(case.block_size, 3)[..., : case.keys]
    visible = None if case.seen is None else torch.rand(case.seen) < 0.6
    return lists, visible, mask if visible is None else mask & visible


def plans_of(case: Case, lists: Tensor, visible: Tensor | None, mask: Tensor) -> list[Plan]:
    layout = MaskLayout.of(
        tuple(mask.shape), case.queries, case.keys, case.heads, case.kv_heads, case.batch, "bits",
        case.epoch,
    )  # fmt: skip
    options = {"is_causal": case.is_causal, "for_backward": True}
    return [
        plan_blocks(lists, visible, case.block_size, layout, **options),
        plan_mask(mask, layout, **options),
    ]


@pytest.mark.parametrize("name", CASES)
def test_the_plan_is_that_of_the_mask(name: str) -> None:
    case = CASES[name]
    found, wanted = plans_of(case, *lists_of(case))
    assert found.sizes == wanted.sizes and found.clamps_positions == wanted.clamps_positions
    assert torch.equal(found.counts, wanted.counts)
    assert torch.equal(found.use_slot, wanted.use_slot)
    slots = torch.arange(found.num_slots)
    used = slots < -(-wanted.counts[..., :1] // 128) * 128  # what lies behind is not written
    for part in ("slot_key", "slot_bits", "block_bits"):
        one, other = getattr(found, part), getattr(wanted, part)
        written = used
        if part == "slot_bits":
            written = used[:, :, :, None, None]
        elif part == "block_bits":
            written = used[:, :, :, None, None, ::32, None]
        assert torch.equal(torch.where(written, one, 0), torch.where(written, other, 0)), part


def inputs_of(case: Case) -> list[Tensor]:
    query = torch.randn(case.batch, case.queries, case.heads, 16)
    key, value = (torch.randn(case.batch, case.keys, case.kv_heads, 16) for _ in range(2))
    return [query, key, value, torch.randn_like(query) * 1.7]


@pytest.mark.parametrize(
    ("name", "plan_bytes"),
    [
        *(("blocks", 1 << 27), ("blocks", 1), ("blocks of 1", 1), ("blocks of 64", 1 << 27)),
        *(("fewer queries, not causal", 1), ("more queries", 1), ("more queries", 1 << 27)),
        *(("KV heads", 1), ("heads", 1), ("group of 3", 1), ("group of 3, heads", 1)),
        *(("keys hidden", 1), ("no lists", 1)),
    ],
)
def test_attention(name: str, plan_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All queries together, and an epoch at a time, against fp64."""
    monkeypatch.setattr(block_calls, "_PLAN_BYTES", plan_bytes)
    monkeypatch.setattr(block_calls, "_SHORT_EPOCH", 32)
    monkeypatch.setattr(block_calls, "_QUERY_SHARE", 1 << 30)
    monkeypatch.setattr(block_calls, "mask_epoch_length", lambda _: 32)
    case = CASES[name]
    lists, visible, mask = lists_of(case)
    *inputs, grad = inputs_of(case)
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    truth, _, _ = attention_reference(*exact, mask, is_causal=case.is_causal, softcap=5.0)
    truths = torch.autograd.grad(truth, exact, grad.double())
    call = BlockLists(lists, visible, case.block_size, case.is_causal)
    factors = (0.25, 5.0)
    out, norm = block_calls.run_block_forward(*inputs, call, *factors)
    grads = block_calls.run_block_backward(
        grad, *inputs, call, out, norm, *factors, (True, True, True)
    )
    parts = list(block_calls._parts(inputs[0], inputs[1], call))
    assert len(parts) > 1 or plan_bytes > 1
    names = ("out", "grad query", "grad key", "grad value")
    for name, found, expected in zip(names, (out, *grads), (truth, *truths), strict=True):
        assert largest_error(found, expected.detach(), name) < TOLERANCE, name


@pytest.mark.parametrize(
    ("batch", "heads", "queries", "keys", "epoch", "parts"),
    [
        (1, 2, 65536, 65536, 2048, 8),
        (1, 2, 1 << 20, 1 << 20, 1024, 1024),  # a 16th of the bytes of the queries
        (1, 4, 300, 300, 128, 1),
        (1, 4, 4096, 65536, 256, 1),
        (8, 64, 2048, 131072, 128, 16),  # one epoch of so many rows is more
        (1, 1, 65536, 32768, 2048, 1),  # the first half of the queries sees nothing
    ],
)
def test_parts_have_few_bits(
    batch: int, heads: int, queries: int, keys: int, epoch: int, parts: int
) -> None:
    query = torch.empty(batch, queries, 16 * heads, 64, device="meta", dtype=torch.bfloat16)
    key = torch.empty(batch, keys, heads, 64, device="meta")
    indices = torch.empty(batch, heads, queries, 16, dtype=torch.int64, device="meta")
    found = list(block_calls._parts(query, key, BlockLists(indices, None, 64, True)))
    assert len(found) == parts and all(part.epoch_len == epoch for part in found)
    assert found[-1].queries.stop == queries and found[-1].key_len == keys
    assert found[0].queries.start == (0 if queries <= keys else found[0].queries.start)
    borders = [part.queries.stop for part in found]
    assert [part.queries.start for part in found][1:] == borders[:-1]
    for part in found:
        length = part.queries.stop - part.queries.start
        assert length % epoch == 0 or part is found[-1]
        assert part.key_len == min(keys, keys - queries + part.queries.stop)
        size = batch * heads * length * part.key_len // 8
        most = max(block_calls._PLAN_BYTES, query.nbytes // 16)
        assert size <= max(most, batch * heads * 128 * keys // 8)


def test_gradients_of_parts_are_added_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded once: as near to fp64 as those of all queries together, in fp16."""
    monkeypatch.setattr(block_calls, "_SHORT_EPOCH", 32)
    monkeypatch.setattr(block_calls, "_QUERY_SHARE", 1 << 30)
    monkeypatch.setattr(block_calls, "mask_epoch_length", lambda _: 32)
    case = Case(queries=160, keys=20, block_size=10, topk=2, heads=1, is_causal=False)
    lists, _, mask = lists_of(case)
    *inputs, grad = (tensor.half() for tensor in inputs_of(case))
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    truth, _, _ = attention_reference(*exact, mask, is_causal=False)
    truths = torch.autograd.grad(truth, exact, grad.double())
    call = BlockLists(lists, None, case.block_size, False)
    errors = []
    for plan_bytes in (1 << 27, 1):
        monkeypatch.setattr(block_calls, "_PLAN_BYTES", plan_bytes)
        out, norm = block_calls.run_block_forward(*inputs, call, 0.25, 0.0)
        tensors = (grad, *inputs, call, out, norm)
        grads = block_calls.run_block_backward(*tensors, 0.25, 0.0, (True, True, True))
        assert all(g.dtype == torch.float16 for g in grads)
        errors.append([largest_error(g, t, "gradient") for g, t in zip(grads, truths, strict=True)])
    assert all(few <= 1.01 * one + 1e-6 for one, few in zip(*errors, strict=True)), errors


def test_gradients_that_nobody_needs_are_left_out() -> None:
    case = CASES["one block"]
    lists, visible, _ = lists_of(case)
    *inputs, grad = inputs_of(case)
    call = BlockLists(lists, visible, case.block_size, case.is_causal)
    out, norm = block_calls.run_block_forward(*inputs, call, 0.25, 0.0)
    tensors = (grad, *inputs, call, out, norm)
    every = block_calls.run_block_backward(*tensors, 0.25, 0.0, (True, True, True))
    some = block_calls.run_block_backward(*tensors, 0.25, 0.0, (False, False, True))
    assert some[:2] == (None, None) and torch.equal(some[2], every[2])


@pytest.fixture
def _operators(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The operators and what leads to them take tensors on the CPU."""
    monkeypatch.setattr(triton, "unavailable", lambda: [])
    monkeypatch.setattr(triton, "unsupported", lambda problem: [])
    library = torch.library.Library("flash_sparse_attn", "IMPL")
    library.impl("block_forward", block_ops._forward.__wrapped__, "CPU")
    library.impl("block_backward", block_ops._backward.__wrapped__, "CPU")
    yield
    library._destroy()


@pytest.mark.usefixtures("_operators")
@pytest.mark.parametrize("is_compiled", [False, True])
def test_from_the_function_to_the_kernels(is_compiled: bool) -> None:
    """With a mask of keys, of the same tensors that attention functions take, as one graph."""
    case = Case(batch=2, queries=40, keys=40, heads=2, kv_heads=2, list_heads=2, seen=(2, 1, 1, 40))
    lists, visible, mask = lists_of(case)
    *inputs, grad = inputs_of(case)
    inputs[0] = inputs[0].transpose(1, 2).contiguous().transpose(1, 2)
    leaves = [tensor.requires_grad_() for tensor in inputs]

    def attend(*tensors: Tensor) -> Tensor:
        options = {"visible": visible, "softmax_scale": 0.3, "softcap": 5.0}
        return block_sparse_attention(*tensors, lists, case.block_size, **options)

    if is_compiled:
        out = torch.compile(attend, backend="aot_eager", fullgraph=True)(*leaves)
    else:
        out = attend(*leaves)
    grads = torch.autograd.grad(out, leaves, grad, create_graph=not is_compiled)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    options = {"is_causal": True, "softmax_scale": 0.3, "softcap": 5.0}
    truth, _, _ = attention_reference(*exact, mask, **options)
    truths = torch.autograd.grad(truth, exact, grad.double())
    for found, expected in zip((out, *grads), (truth, *truths), strict=True):
        assert largest_error(found, expected.detach()) < TOLERANCE
    if not is_compiled:
        with pytest.raises(RuntimeError, match="no second derivatives"):
            grads[0].sum().backward()


@pytest.mark.usefixtures("_operators")
@pytest.mark.parametrize("name", ["blocks of 1", "more queries"])
def test_in_half_precision(name: str) -> None:
    """Every element as near to fp64 as plain PyTorch in fp16, or twice as far."""
    case = CASES[name]
    lists, visible, mask = lists_of(case)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return block_sparse_attention(query, key, value, lists, case.block_size, visible=visible)

    inputs = [tensor.half() for tensor in inputs_of(case)[:3]]
    check_attention(attend, *inputs, mask, is_causal=True)


@pytest.mark.usefixtures("_operators")
def test_operators_are_as_their_schemas_and_fakes_say() -> None:
    case = Case(queries=16, keys=16, heads=1, block_size=8)
    lists, _, _ = lists_of(case)
    *inputs, grad = inputs_of(case)
    checks = ("test_schema", "test_faketensor")
    call = (*inputs, lists, None, case.block_size, True, 0.25, 0.0)
    operators = torch.ops.flash_sparse_attn
    torch.library.opcheck(operators.block_forward, call, test_utils=checks)
    out, norm = operators.block_forward(*call)
    call = (grad, *call, out, norm, [True, False, True])
    torch.library.opcheck(operators.block_backward, call, test_utils=checks)


run_interpreted(globals())
