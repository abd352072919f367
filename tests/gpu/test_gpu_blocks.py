"""Lists of blocks on a GPU: kernels that plan from them, what they keep, and who may see them."""

from __future__ import annotations

import pytest
import torch
from oracles import check_attention, outputs_and_gradients
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flash_sparse_attn.backends.triton.masks import MaskLayout
from flash_sparse_attn.integrations.block_sparse import block_sparse_attention

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16]
# B, H, Hkv, Q, K, D, block size, entries, heads of the lists, whether keys are hidden besides.
CASES = {
    "blocks of 64": (1, 4, 2, 700, 700, 64, 64, 4, 2, False),
    "blocks of 64, padding": (2, 4, 2, 700, 700, 64, 64, 4, 2, True),
    "blocks of 17": (2, 4, 2, 333, 333, 64, 17, 5, 1, True),
    "blocks of 1": (1, 2, 1, 130, 333, 64, 1, 40, 1, False),
    "blocks of 128": (1, 8, 2, 1000, 1000, 128, 128, 3, 2, False),
    "group of 3": (2, 6, 2, 301, 301, 64, 16, 6, 2, True),
    "lists of heads": (1, 6, 2, 301, 301, 64, 16, 6, 6, False),
    "no groups": (2, 2, 2, 301, 301, 32, 16, 6, 2, False),
    "fewer queries": (1, 4, 2, 100, 3001, 64, 64, 8, 2, True),
    "more queries": (1, 4, 2, 500, 301, 64, 16, 6, 2, False),
    "few queries": (2, 4, 2, 3, 900, 64, 64, 4, 2, True),
    "odd head": (1, 4, 2, 333, 333, 40, 32, 4, 2, False),
    "more keys than kernels take as they are": (1, 4, 1, 400, 5000, 64, 64, 16, 1, False),
}


class Seen(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name())
        return function(*args, **(kwargs or {}))


def lists_of(case, is_narrow: bool = False) -> tuple[Tensor, Tensor | None, Tensor]:
    """Lists with holes, a block named twice and empty rows; a mask of keys; the mask of both."""
    batch, _, _, queries, keys, _, size, topk, heads, is_hidden = case
    num_blocks = -(-keys // size)
    lists = torch.randint(0, num_blocks, (batch, heads, queries, topk), device="cuda")
    lists = torch.where(torch.rand(lists.shape, device="cuda") < 0.3, -1, lists)
    lists[:, :, ::7, 1] = lists[:, :, ::7, 0]
    lists[:, :, 1:2] = -1
    listed = torch.zeros(*lists.shape[:3], num_blocks + 1, dtype=torch.bool, device="cuda")
    listed = listed.scatter(3, torch.where(lists < 0, num_blocks, lists), True)
    mask = listed[..., :num_blocks].repeat_interleave(size, 3)[..., :keys]
    if not is_hidden:
        return lists.int() if is_narrow else lists, None, mask
    visible = torch.rand(batch, 1, 1, keys, device="cuda") < 0.6
    return lists.int() if is_narrow else lists, visible, mask & visible


def inputs_of(case, dtype: torch.dtype) -> list[Tensor]:
    batch, heads, kv_heads, queries, keys, dim, *_ = case
    shapes = ((queries, heads), (keys, kv_heads), (keys, kv_heads))
    return [torch.randn(batch, *shape, dim, device="cuda").to(dtype) for shape in shapes]


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_against_fp64(name: str, dtype: torch.dtype, is_causal: bool) -> None:
    case = CASES[name]
    lists, visible, mask = lists_of(case, is_narrow=is_causal)

    def attend(query, key, value):
        return block_sparse_attention(
            query, key, value, lists, case[6], visible=visible, is_causal=is_causal
        )

    with Seen() as seen:
        check_attention(attend, *inputs_of(case, dtype), mask, is_causal=is_causal)
    assert "flash_sparse_attn::block_forward" in seen.names
    assert "flash_sparse_attn::block_backward" in seen.names


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["blocks of 64, padding", "more queries", "lists of heads"])
def test_parts_against_fp64(name: str, dtype: torch.dtype, monkeypatch) -> None:
    """An epoch of 128 queries at a time: gradients of keys are sums of several."""
    calls = pytest.importorskip("flash_sparse_attn.backends.triton.block_calls")
    monkeypatch.setattr(calls, "_PLAN_BYTES", 1)
    monkeypatch.setattr(calls, "_QUERY_SHARE", 1 << 30)
    case = CASES[name]
    lists, visible, mask = lists_of(case)

    def attend(query, key, value):
        return block_sparse_attention(query, key, value, lists, case[6], visible=visible)

    check_attention(attend, *inputs_of(case, dtype), mask, is_causal=True)


def test_options_and_masks_of_queries() -> None:
    """Scale, softcap, and `visible` that depends on the query, where a mask is written out."""
    case = CASES["no groups"]
    lists, _, mask = lists_of(case)
    options = {"softmax_scale": 0.3, "softcap": 4.0}
    for shape in ((2, 1, 1, 301), (1, 1, 301, 301)):
        visible = torch.rand(shape, device="cuda") < 0.6

        def attend(query, key, value, visible=visible):
            return block_sparse_attention(query, key, value, lists, 16, visible=visible, **options)

        inputs = inputs_of(case, torch.bfloat16)
        check_attention(attend, *inputs, mask & visible, is_causal=True, **options)


def test_without_gradients_few_queries_are_decoded() -> None:
    case = CASES["few queries"]
    lists, visible, _ = lists_of(case)
    query, key, value = inputs_of(case, torch.bfloat16)

    def attend(query):
        return block_sparse_attention(query, key, value, lists, 64, visible=visible)

    with Seen() as seen, torch.no_grad():
        found = attend(query)
    assert "flash_sparse_attn::block_forward" not in seen.names
    expected = attend(query.requires_grad_())
    assert (found - expected).abs().max() <= 2e-2


def test_results_repeat_bit_for_bit_in_any_order_of_a_list() -> None:
    case = CASES["blocks of 64, padding"]
    lists, visible, _ = lists_of(case)
    names = ("query", "key", "value")
    inputs = dict(zip(names, inputs_of(case, torch.bfloat16), strict=True))
    grad = torch.randn_like(inputs["query"])

    def run(lists: Tensor) -> dict[str, Tensor]:
        def attend(query, key, value):
            return block_sparse_attention(query, key, value, lists, 64, visible=visible)

        return outputs_and_gradients(attend, inputs, grad)

    first = run(lists)
    for other in (lists, lists.flip(3), torch.cat([lists, lists[..., :1]], 3)):
        again = run(other)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_no_wait_for_the_gpu_and_one_graph() -> None:
    case = CASES["blocks of 64, padding"]
    lists, visible, _ = lists_of(case)
    inputs = [tensor.requires_grad_() for tensor in inputs_of(case, torch.bfloat16)]
    grad = torch.randn_like(inputs[0])

    def attend(query, key, value):
        return block_sparse_attention(query, key, value, lists, 64, visible=visible)

    def run(function) -> list[Tensor]:
        out = function(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad)]

    expected = run(attend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = run(attend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    compiled = run(torch.compile(attend, fullgraph=True))
    for want, *others in zip(expected, again, compiled, strict=True):
        assert all(torch.equal(want, other) for other in others)


def test_operators_pass_opcheck() -> None:
    case = (1, 2, 1, 200, 200, 64, 32, 3, 1, True)
    lists, visible, _ = lists_of(case)
    inputs = [tensor.requires_grad_() for tensor in inputs_of(case, torch.bfloat16)]
    call = (*inputs, lists, visible, 32, True, 0.125, 0.0)
    torch.library.opcheck(torch.ops.flash_sparse_attn.block_forward, call)


def test_repeated_plans_equal_fresh_ones(recordings, caplog) -> None:
    from flash_sparse_attn.backends.triton.plan_blocks import plan_blocks

    case = (2, 4, 2, 2000, 3000, 64, 64, 5, 2, True)
    layout = MaskLayout.of((2, 2, 2000, 3000), 2000, 3000, 4, 2, 2, "bits")
    given = [lists_of(case)[:2] for _ in range(3)]
    options = {"is_causal": True, "for_backward": True}
    plans = [plan_blocks(*one, 64, layout, **options) for one in given]
    found = list(recordings.values())
    assert len(found) == 1 and None not in found and not caplog.text
    for one, got in zip(given, plans, strict=True):
        recordings.clear()
        want = plan_blocks(*one, 64, layout, **options)
        for part, other in zip(got.parts, want.parts, strict=True):
            assert part is other is None or torch.equal(part, other)


def peak_of_a_step(length: int) -> int:
    """Bytes above the inputs at the peak of forward and backward, lists drawn at random."""
    case = (1, 4, 2, length, length, 64, 64, 16, 2, False)
    inputs = [tensor.requires_grad_() for tensor in inputs_of(case, torch.bfloat16)]
    position = torch.arange(length, device="cuda")[:, None]
    lists = (torch.rand(1, 2, length, 16, device="cuda") * (position // 64 + 1)).long()
    grad = torch.randn_like(inputs[0])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = block_sparse_attention(*inputs, lists, 64)
    torch.autograd.grad(out, inputs, grad)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_memory_grows_with_the_lists_not_with_the_square() -> None:
    """A mask of these queries and keys would take 8 GiB, and a bit for each pair 1 GiB.

    What does not grow: the bits of one part with their sums over 32 slots (1 / 16), words of blocks
    (1 / 64) and lists of slots and tiles, less than 1.5 times 128 MiB; and fp32 rows of dK and dV
    for every slot of its epochs of 1024 queries: 128 MiB of bits are 2 ** 30 pairs, of which every
    1024 take 2 rows of 64 numbers, 512 MiB. What grows, in bf16 tensors of the size of a query: out
    and dQ; and as much as 6 of a key, for each of dK and dV: the sum and a part in fp32, and both
    rounded.
    """
    peak_of_a_step(1024)  # compiles
    peaks = {length: peak_of_a_step(length) for length in (32768, 65536)}
    fixed = (1.5 * (1 << 27)) + (1 << 29)
    for length, peak in peaks.items():
        query, key = 2 * length * 4 * 64, 2 * length * 2 * 64
        most = fixed + 3 * query + 2 * 6 * key
        assert peak <= most, (length, peak / 2**20, most / 2**20)
    assert peaks[65536] < 1.3 * peaks[32768], peaks
