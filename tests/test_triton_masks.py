"""Bool masks and biases of every pattern, interpreted on the CPU in fp32, against fp64."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace

import pytest
import torch
from compare import assert_fair, largest_error
from interpreter import run_interpreted
from torch import Tensor

pytest.importorskip("triton")

from flash_sparse_attn.backends.triton import config, mask_ops, masks
from flash_sparse_attn.backends.triton.backward import Needs, backward
from flash_sparse_attn.backends.triton.config import TileConfig, Tiles
from flash_sparse_attn.backends.triton.forward import forward
from flash_sparse_attn.backends.triton.inputs import Bias, Call, are_short
from flash_sparse_attn.backends.triton.masks import MaskLayout
from flash_sparse_attn.backends.triton.plan_mask import plan_mask, plan_packed
from flash_sparse_attn.plan import Plan
from flash_sparse_attn.reference import attention_reference
from flash_sparse_attn.varlen import PackedSequences

# fp32 throughout: values and gradients are of order 1 to 10.
TOLERANCE = 3e-5

NAMES = ("out", "grad query", "grad key", "grad value", "grad bias")


PLANNING = importlib.import_module("flash_sparse_attn.backends.triton.plan_mask")
LISTING = importlib.import_module("flash_sparse_attn.backends.triton.block_lists")
PACKING = importlib.import_module("flash_sparse_attn.backends.triton.mask_bits")
SPREADING = importlib.import_module("flash_sparse_attn.backends.triton.grad_pair")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks are packed, scanned and counted, and gradients of biases stored, in several blocks."""
    for name, size in {"_COUNTED": 16, "_OWNED": 32}.items():
        monkeypatch.setattr(PLANNING, name, size)
    sizes = {"_PACKED": 32, "_PROGRAMS": 1, "_SCANNED": 1, "_COUNTED_WORDS": 8}
    for name, size in sizes.items():
        monkeypatch.setattr(PACKING, name, size)
    for name, size in {"_OWNERS": 4, "_SIZE": 4}.items():
        monkeypatch.setattr(LISTING, name, size)
    for name, size in {"_KEYS": 32, "_TOGETHER": 4, "_PROGRAMS": 1}.items():
        monkeypatch.setattr(SPREADING, name, size)


@dataclass(frozen=True)
class Case:
    """One call. A 1 in a shape is a broadcast dimension."""

    kind: str = "bits"
    batch: int = 1
    queries: int = 70
    keys: int = 70
    heads: int = 2
    kv_heads: int = 1
    mask: tuple[int, int, int, int] | None = (1, 1, 70, 70)
    bias: tuple[int, int, int, int] | None = None
    is_causal: bool = True
    pattern: str = "random"
    epoch: int = 32
    softcap: float = 0.0
    uses_tma: bool = False
    is_expanded: bool = False
    block_m: int = 16
    packed: tuple[tuple[int, ...], tuple[int, ...]] | None = None


def mask_of(case: Case) -> Tensor | None:
    if case.mask is None:
        return None
    query = torch.arange(case.mask[2])[:, None]
    key = torch.arange(case.mask[3])
    mask = {
        "random": torch.rand(case.mask) < 0.3,
        "sparse": torch.rand(case.mask) < 0.02,
        "window": ((key <= query) & (query < key + 20)).expand(case.mask),
        "blocks": ((query // 16 + key // 16) % 3 == 0).expand(case.mask),
        "all": torch.ones(case.mask, dtype=torch.bool),
        "none": torch.zeros(case.mask, dtype=torch.bool),
    }[case.pattern].clone()
    if case.pattern == "random" and case.mask[2] > 40:
        mask[:, :, 20:40] = False  # rows that see nothing, among them a whole tile
    return mask


def tiles_of(case: Case) -> Tiles:
    sizes = ((case.block_m, 16), (case.block_m, 16), (case.block_m, 32))
    return Tiles(*(TileConfig(*size, 1, 1, case.uses_tma) for size in sizes))


def plan_of(case: Case, mask: Tensor | None, lists_for: Tiles | None = None) -> Plan:
    """The plan of a call, with the lists for tiles of some sizes if they are given."""
    layout = MaskLayout.of(
        None if mask is None else mask.shape, case.queries, case.keys, case.heads, case.kv_heads,
        case.batch, case.kind, case.epoch,
    )  # fmt: skip
    if lists_for is not None:
        num_rows = case.batch * case.queries * case.heads
        group = case.heads // case.kv_heads
        layout = layout.with_lists(lists_for, group, num_rows, for_backward=True)
    if case.kind != "keys":
        return plan_mask(mask, layout, is_causal=case.is_causal, for_backward=True)
    epochs = use_slot = None
    sizes = layout.sizes
    if case.packed is not None:
        borders = [torch.tensor(b, dtype=torch.int32) for b in case.packed]
        packed = PackedSequences(*borders, 48, 128)
        epochs, use_slot = plan_packed(packed, case.queries, case.keys, for_backward=True)
        sizes = [48, 128, case.queries, case.keys]
    tensors = [*[None] * 7, use_slot, epochs, None, None, mask]
    return Plan.of(tensors, sizes, not case.is_causal)


def reference(case: Case, query: Tensor, key: Tensor, value: Tensor, mask, bias) -> list[Tensor]:
    """Output and lse; packed sequences one by one."""
    options = {"is_causal": case.is_causal, "softcap": case.softcap}
    if case.packed is None:
        return list(attention_reference(query, key, value, mask, bias, **options)[:2])
    outs, lses = [], []
    queries, keys = case.packed
    for q0, q1, k0, k1 in zip(queries, queries[1:], keys, keys[1:], strict=False):
        out, lse, _ = attention_reference(
            query[:, q0:q1], key[:, k0:k1], value[:, k0:k1],
            None if mask is None else mask[..., k0:k1], None if bias is None else bias[..., k0:k1],
            **options,
        )  # fmt: skip
        outs.append(out)
        lses.append(lse)
    return [torch.cat(outs, 1), torch.cat(lses, 2)]


def check(case: Case) -> None:
    torch.manual_seed(0)
    query = torch.randn(case.batch, case.queries, case.heads, 16)
    key, value = (torch.randn(case.batch, case.keys, case.kv_heads, 16) for _ in range(2))
    grad = torch.randn_like(query) * 1.7
    mask = mask_of(case)
    bias = None if case.bias is None else torch.randn(case.bias)
    if bias is not None:
        bias = torch.where(torch.rand(bias.shape) < 0.05, -torch.inf, bias)
    inputs = [query, key, value] + ([] if bias is None else [bias])
    truth_inputs = [t.double().requires_grad_() for t in inputs]
    truth, truth_lse = reference(
        case, *truth_inputs[:3], mask, truth_inputs[3] if bias is not None else None
    )
    truths = torch.autograd.grad(truth, truth_inputs, grad.double(), allow_unused=True)
    if case.is_expanded and mask is not None:
        mask = mask.expand(case.batch, case.heads, *mask.shape[2:])
    tiles = tiles_of(case)
    plan = plan_of(case, mask, tiles)
    wrapped = None if bias is None else Bias.of(bias, case.heads, case.kv_heads)
    call = Call(0.25, case.softcap, wrapped)
    out, lse, *kept = forward(plan, query, key, value, call, with_norm=True, config=tiles.forward)
    grads = backward(
        plan, query, key, value, out, *kept, grad, call, Needs(bias=bias is not None), tiles=tiles
    )
    names = ("out", "lse", "grad query", "grad key", "grad value", "grad bias")
    for name, result, expected in zip(
        names, (out, lse, *grads), (truth, truth_lse, *truths), strict=False
    ):
        assert largest_error(result, expected.detach(), name) < TOLERANCE, name


# A sequence without queries, one without keys, one with fewer keys than queries.
PACKED = ((0, 20, 20, 30, 70), (0, 25, 32, 32, 70))
CASES = {
    "bits": Case(),
    "bits, not causal": Case(is_causal=False),
    "bits, other length": Case(queries=45, mask=(1, 1, 45, 70)),
    "bits, more queries than keys": Case(keys=45, mask=(1, 1, 70, 45)),
    "bits, head mask": Case(heads=4, kv_heads=2, mask=(1, 4, 70, 70), bias=(1, 4, 70, 70)),
    "bits, rows of batch": Case(batch=2, kv_heads=2, mask=(2, 1, 70, 70), bias=(1, 1, 1, 70)),
    "bits, rows of KV heads": Case(batch=2, kv_heads=2, mask=(1, 2, 70, 70), bias=(2, 1, 70, 70)),
    "bits, expanded": Case(batch=2, mask=(1, 1, 70, 1), is_expanded=True),
    "bits, window": Case(pattern="window", bias=(1, 1, 70, 70)),
    "bits, blocks": Case(pattern="blocks", heads=1),
    "bits, aligned rows": Case(queries=96, keys=80, mask=(1, 1, 96, 80), heads=1),
    "bits, aligned rows, not causal": Case(
        queries=70, keys=96, mask=(1, 2, 70, 96), is_causal=False, epoch=64, bias=(1, 1, 70, 96)
    ),
    "bits, aligned rows, fewer queries": Case(
        queries=45, keys=112, mask=(1, 1, 45, 112), bias=(1, 2, 45, 112)
    ),
    "bits, long epochs": Case(
        queries=140, keys=80, mask=(1, 2, 140, 80), epoch=128, pattern="window"
    ),
    "bits, long epochs, aligned rows": Case(
        queries=112, keys=96, mask=(1, 1, 112, 96), epoch=128, pattern="window", is_causal=False
    ),
    "bits, sparse": Case(pattern="sparse", bias=(1, 2, 1, 70)),
    "bits, all": Case(pattern="all", bias=(1, 1, 70, 70), softcap=5.0),
    "bits, none": Case(pattern="none", bias=(1, 1, 70, 70)),
    "bits, group of 3": Case(heads=3, bias=(1, 1, 70, 70)),
    "bits, group of 3, head mask": Case(heads=3, mask=(1, 3, 70, 70), bias=(1, 3, 70, 70)),
    "bits, wide tile": Case(heads=1, block_m=64, epoch=64, bias=(1, 1, 70, 70)),
    "key mask": Case("shown", mask=(1, 1, 1, 70), bias=(1, 1, 1, 70)),
    "key mask, not causal": Case("shown", mask=(1, 1, 1, 70), is_causal=False, bias=(1, 1, 70, 70)),
    "key mask, more queries": Case("shown", keys=45, mask=(1, 1, 1, 45), bias=(1, 2, 1, 45)),
    "key mask, pair bias": Case("shown", mask=(1, 1, 1, 70), bias=(1, 1, 70, 70)),
    "key mask, pair bias, more queries": Case(
        "shown", keys=20, mask=(1, 1, 1, 20), bias=(1, 1, 70, 20)
    ),
    "runs": Case(pattern="window", uses_tma=True),
    "runs, bias of keys": Case(
        pattern="window", heads=4, kv_heads=2, mask=(1, 2, 70, 70), bias=(1, 2, 1, 70),
        is_causal=False, uses_tma=True,
    ),
    "runs, bias of heads": Case(
        pattern="window", batch=2, queries=60, mask=(2, 1, 60, 70), bias=(1, 2, 1, 70),
        softcap=5.0, uses_tma=True,
    ),
    "runs, more queries": Case(pattern="all", keys=45, mask=(1, 1, 70, 45), uses_tma=True),
    "runs, bias of pairs": Case(pattern="window", bias=(1, 1, 70, 70), uses_tma=True),
    "runs and others": Case(pattern="blocks", is_causal=False, uses_tma=True),
    "runs of nothing": Case(pattern="none", uses_tma=True),
    "key mask, batch": Case("shown", batch=2, kv_heads=2, mask=(2, 1, 1, 70), uses_tma=True),
    "key mask, none": Case("shown", mask=(1, 1, 1, 70), pattern="none", is_causal=False),
    "keys": Case("keys", mask=None, bias=(1, 1, 1, 70)),
    "keys, descriptors": Case("keys", mask=None, bias=(1, 1, 1, 70), uses_tma=True),
    "keys, not causal": Case("keys", mask=None, bias=(1, 2, 1, 70), is_causal=False),
    "keys, no bias": Case("keys", mask=None, queries=45),
    "keys, more queries": Case("keys", mask=None, keys=45, bias=(1, 1, 1, 45), epoch=96),
    "keys, pair bias": Case("keys", mask=None, batch=2, kv_heads=2, bias=(1, 1, 70, 70)),
    "keys, pair bias of groups": Case("keys", mask=None, heads=4, kv_heads=2, bias=(1, 2, 70, 70)),
    "keys, bias of queries": Case("keys", mask=None, bias=(1, 1, 70, 1)),
    "keys, mask": Case("keys", bias=(1, 1, 70, 70)),
    "keys, head mask": Case("keys", heads=4, kv_heads=2, mask=(1, 4, 70, 70), bias=(1, 4, 1, 70)),
    "keys, mask of keys": Case("keys", batch=2, mask=(2, 1, 1, 70), is_causal=False),
    "keys, aligned rows": Case("keys", keys=72, mask=(1, 1, 70, 72), bias=(1, 1, 70, 72)),
    "keys, aligned rows of heads": Case(
        "keys", batch=2, keys=88, heads=4, kv_heads=2, mask=(2, 4, 70, 88), bias=(1, 2, 70, 88),
        is_causal=False,
    ),
    "keys, aligned mask": Case("keys", keys=64, mask=(1, 1, 70, 64), uses_tma=True),
    "keys, aligned mask of keys": Case("keys", keys=72, mask=(1, 1, 1, 72), bias=(1, 1, 1, 72)),
    "keys, aligned bias": Case("keys", keys=72, mask=None, bias=(1, 2, 70, 72), epoch=96),
    "packed": Case("keys", mask=None, heads=4, kv_heads=2, bias=(1, 2, 1, 70), packed=PACKED),
    "packed, mask": Case("keys", mask=(1, 1, 1, 70), is_causal=False, packed=PACKED),
    "keys, softcap": Case("keys", softcap=5.0, bias=(1, 1, 70, 70)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_attention(name: str) -> None:
    check(CASES[name])


LISTED = ("bits", "bits, group of 3")


class Launches:
    """The names of the kernels that are launched."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        launch = LISTING.launch

        def noted(kernel, num_programs):
            self.names.append(kernel.fn.__name__)
            return launch(kernel, num_programs)

        for name in ("block_lists", "forward", "grad_key", "grad_query", "mask_bits"):
            module = importlib.import_module(f"flash_sparse_attn.backends.triton.{name}")
            patch.setattr(module, "launch", noted)


def run_passes(case: Case, plan: Plan, tiles: Tiles) -> list[Tensor]:
    """Output and gradients of a call of random tensors."""
    torch.manual_seed(1)
    query = torch.randn(case.batch, case.queries, case.heads, 16)
    key, value = (torch.randn(case.batch, case.keys, case.kv_heads, 16) for _ in range(2))
    call, grad = Call(0.25), torch.randn_like(query)
    tensors = (query, key, value)
    out, _, *kept = forward(plan, *tensors, call, with_norm=True, config=tiles.forward)
    return [out, *backward(plan, *tensors, out, *kept, grad, call, Needs(), tiles=tiles)[:3]]


@pytest.mark.parametrize("name", LISTED)
def test_lists_of_a_plan(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the passes would make, so that these make none; one launch makes all."""
    case = CASES[name]
    mask, tiles = mask_of(case), tiles_of(case)
    launches = Launches(monkeypatch)
    bare, plan = plan_of(case, mask), plan_of(case, mask, tiles)
    assert bare.lists == () and launches.names.count("list_kernel") == 1
    # Forward and dQ have tiles of the same sizes.
    assert [sizes.of_tiles for sizes in plan.list_sizes] == [True, False]
    for sizes, got in zip(plan.list_sizes, plan.lists, strict=True):
        make = LISTING.tile_lists if sizes.of_tiles else LISTING.slot_lists
        want = make(bare, *sizes[1:])
        assert got.shape == want.shape
        used = torch.arange(got.shape[-1]) < want[..., 1:2] + (3 if sizes.of_tiles else 2)
        assert torch.equal(got.where(used, 0), want.where(used, 0)) and want[..., 1].any()
    launches.names.clear()
    results = run_passes(case, plan, tiles)
    assert "list_kernel" not in launches.names
    again = run_passes(case, bare, tiles)
    assert launches.names.count("list_kernel") == 3
    assert all(torch.equal(*pair) for pair in zip(results, again, strict=True))


@pytest.mark.parametrize("bias_shape", [None, (1, 1, 40, 140)])
def test_a_call_prepares_the_lists_it_reads(
    bias_shape: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sizes are those that the passes choose; with a bias of pairs backward makes its own."""
    for name in ("forward", "backward"):
        module = importlib.import_module(f"flash_sparse_attn.backends.triton.{name}")
        monkeypatch.setattr(module, "architecture_of", lambda device: "sm_90")
    monkeypatch.setattr(masks, "DIRECT_KEYS", 0)
    query, (key, value) = torch.randn(1, 40, 2, 64), torch.randn(2, 1, 140, 1, 64)
    bias = None if bias_shape is None else torch.randn(bias_shape)
    facts = (40, 140, 2, 1, 1, True, "sm_90", 64, bias is not None)
    layout = mask_ops._layout_of((1, 1, 40, 140), *facts)
    assert len(layout.lists) == (3 if bias is None else 1)
    mask = torch.rand(1, 1, 40, 140) < 0.3
    plan = plan_mask(mask, layout, is_causal=True, for_backward=True)
    launches = Launches(monkeypatch)
    call = Call(0.125, 0.0, None if bias is None else Bias.of(bias, 2, 1))
    out, _, *kept = forward(plan, query, key, value, call, with_norm=True)
    assert "forward_kernel" in launches.names
    assert "list_kernel" not in launches.names
    grads = Needs(bias=bias is not None)
    backward(plan, query, key, value, out, *kept, torch.randn_like(out), call, grads)
    assert {"grad_query_kernel", "grad_key_kernel"} <= set(launches.names)
    assert launches.names.count("list_kernel") == (0 if bias is None else 2)


def test_lists_of_other_sizes_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan made for another head dimension, or number of heads, serves as well."""
    case = replace(CASES["bits"], queries=40, mask=(1, 1, 40, 70))
    mask = mask_of(case)
    tiles = tiles_of(case)
    expected = run_passes(case, plan_of(case, mask), tiles)
    others = Tiles(*(TileConfig(*size, 1, 1) for size in ((32, 32), (32, 64), (32, 16))))
    launches = Launches(monkeypatch)
    plan = plan_of(case, mask, others)
    assert launches.names.count("list_kernel") == 1 and len(plan.lists) == 3
    results = run_passes(case, plan, tiles)
    assert launches.names.count("list_kernel") == 4
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))
    more = replace(case, heads=4)
    expected = run_passes(more, plan_of(more, mask), tiles)
    results = run_passes(more, plan_of(case, mask, tiles), tiles)
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))


def test_tiles_of_other_epochs() -> None:
    """A key that only later epochs see has no work in earlier ones: their queries may hold NaN."""
    torch.manual_seed(0)
    query = torch.randn(1, 96, 2, 16)
    key, value = (torch.randn(1, 96, 1, 16) for _ in range(2))
    mask = (torch.arange(96) % 3 != 1)[None, None, None]
    layout = MaskLayout.of(mask.shape, 96, 96, 2, 1, 1, "shown", 32)
    plan = plan_mask(mask, layout, is_causal=True, for_backward=True)
    tiles = Tiles(*(TileConfig(16, 16, 1, 1, True) for _ in range(3)))
    call = Call(0.25)
    out, _, *kept = forward(plan, query, key, value, call, with_norm=True, config=tiles.forward)

    def run(query: Tensor) -> list[Tensor]:
        grads = backward(
            plan, query, key, value, out, *kept, torch.ones_like(out), call, Needs(), tiles=tiles
        )
        return [grad[:, 72:] for grad in grads[1:3]]  # the last block of slots

    expected = run(query)
    query = query.clone()
    query[:, 32:64] = torch.nan
    assert all(torch.equal(*pair) for pair in zip(run(query), expected, strict=True))


@pytest.mark.parametrize("name", ["bits, sparse", "keys, no bias"])
def test_offsets_of_64_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows that do not lie within 32 bits of the first."""
    long = torch.empty_strided((1, 3, 1, 16), (0, 1 << 30, 0, 1), device="meta")
    assert not are_short(long) and are_short(long[:, :2])
    used = []

    def are_long(*tensors: Tensor) -> bool:
        used.append(tensors)
        return False

    for module in ("forward", "grad_query"):
        path = f"flash_sparse_attn.backends.triton.{module}"
        monkeypatch.setattr(importlib.import_module(path), "are_short", are_long)
    check(CASES[name])
    assert len(used) == 2


@pytest.mark.parametrize("keys", [64, 70])
def test_hidden_keys_hold_nan(keys: int) -> None:
    """What no row of the mask shows changes nothing, whether its rows are aligned or not."""
    torch.manual_seed(0)
    query = torch.randn(1, 40, 2, 16)
    key, value = (torch.randn(1, keys, 1, 16) for _ in range(2))
    mask = torch.rand(1, 1, 40, keys) < 0.4
    mask[..., ::3] = False
    bias = torch.randn(1, 1, 40, keys)
    layout = MaskLayout.of(mask.shape, 40, keys, 2, 1, 1, "keys", 64)
    plan = Plan.of([*[None] * 11, mask], layout.sizes, False)
    tiles = Tiles(*(TileConfig(16, 16, 1, 1) for _ in range(3)))
    call = Call(0.25, 0.0, Bias.of(bias, 2, 1))

    def run() -> list[Tensor]:
        tensors = (query, key, value)
        out, lse, *kept = forward(plan, *tensors, call, with_norm=True, config=tiles.forward)
        grads = backward(
            plan, *tensors, out, *kept, torch.ones_like(out), call, Needs(bias=True), tiles=tiles
        )
        return [out, lse, *grads]

    expected = run()
    key[:, ::3], value[:, ::3], bias[..., ::3] = torch.nan, torch.nan, torch.nan
    assert all(torch.equal(*pair) for pair in zip(run(), expected, strict=True))
    value[:, 1] = torch.nan
    sees = mask[0, 0, :, 1] & (torch.arange(40) + keys - 40 >= 1)
    assert sees.any() and run()[0][:, sees].isnan().all()


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("shift", [0, 7])
def test_keys_behind_a_run_hold_nan(shift: int) -> None:
    """Whole blocks are read of a run of keys, and what is hidden in them changes nothing."""
    torch.manual_seed(0)
    query = torch.randn(1, 48, 2, 16)
    key, value = (torch.randn(1, 80, 1, 16) for _ in range(2))
    position = torch.arange(80)
    mask = (position >= shift) & (position < shift + 20) & (torch.rand(1, 1, 48, 80) < 0.7)
    mask[..., 0, shift : shift + 20] = True
    layout = MaskLayout.of(mask.shape, 48, 80, 2, 1, 1, "bits", 64)
    tiles = Tiles(*(TileConfig(16, 16, 1, 1, True) for _ in range(3)))
    call = Call(0.25)

    def run() -> list[Tensor]:
        tensors = (query, key, value)
        plan = plan_mask(mask, layout, is_causal=False, for_backward=True)
        out, lse, *kept = forward(plan, *tensors, call, with_norm=True, config=tiles.forward)
        grads = backward(
            plan, *tensors, out, *kept, torch.ones_like(out), call, Needs(), tiles=tiles
        )
        return [out, lse, *grads[:3]]

    expected = run()
    assert all(tensor.isfinite().all() for tensor in expected)
    hidden = (position < shift) | (position >= shift + 20)
    key[:, hidden], value[:, hidden] = torch.nan, torch.nan
    assert all(torch.equal(*pair) for pair in zip(run(), expected, strict=True))


@pytest.mark.filterwarnings("ignore:overflow encountered")  # below the largest it is -inf
@pytest.mark.parametrize("fill", [torch.finfo(torch.float32).min, 3e38, 1e6])
def test_rows_of_largest_biases(fill: float) -> None:
    """Beside a bias that takes all digits the number of keys that share a row is not lost."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 48, 1, 16) for _ in range(3))
    grad = torch.randn_like(query)
    bias = torch.full((1, 1, 48, 48), fill)
    leaves = [t.double().requires_grad_() for t in (query, key, value)]
    # One number added to all scores of a row changes nothing, but in fp32 it takes their digits.
    zero = torch.zeros_like(leaves[0]) if abs(fill) > 1e30 else leaves[0]
    truth, _, _ = attention_reference(zero, *leaves[1:], is_causal=True, softmax_scale=0.25)
    truths = torch.autograd.grad(truth, leaves, grad.double(), allow_unused=True)
    layout = MaskLayout.of(None, 48, 48, 1, 1, 1, "keys", 32)
    plan = Plan.of([], layout.sizes, False)
    tiles = Tiles(*(TileConfig(16, 16, 1, 1) for _ in range(3)))
    call = Call(0.25, 0.0, Bias.of(bias, 1, 1))
    out, _, *kept = forward(plan, query, key, value, call, with_norm=True, config=tiles.forward)
    grads = backward(plan, query, key, value, out, *kept, grad, call, Needs(), tiles=tiles)
    tolerance = 3e-5 if abs(fill) > 1e30 else 0.1
    assert largest_error(out, truth.detach()) < tolerance
    assert largest_error(grads[2], truths[2]) < tolerance


class FewKeys:
    """64 queries of 7 keys in fp16, every key with one bias for all: its gradient is a long sum."""

    def __init__(self, is_uniform: bool) -> None:
        torch.manual_seed(1)
        query, self.grad = (torch.randn(1, 64, 4, 128).half() for _ in range(2))
        key, value = (torch.randn(1, 7, 2, 128).half() for _ in range(2))
        bias = torch.randn(1, 1, 1, 7)
        if is_uniform:  # probabilities of 1 / 7: their numerators are exact in fp16
            query, bias = torch.zeros_like(query), torch.zeros_like(bias)
        self.inputs = [query, key, value, bias]

    def expected(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Output and gradients of plain PyTorch."""
        leaves = [(t if dtype is None else t.to(dtype)).requires_grad_() for t in self.inputs]
        out, _, _ = attention_reference(*leaves[:3], None, leaves[3], softmax_scale=0.1)
        grads = torch.autograd.grad(out, leaves, self.grad.to(out.dtype))
        return [tensor.detach() for tensor in (out, *grads)]

    def run(self) -> tuple[list[Tensor], Tensor | None]:
        """Output and gradients of the kernels, and what rounding took from the output."""
        query, key, value, bias = inputs = [tensor.detach() for tensor in self.inputs]
        layout = MaskLayout.of(None, 64, 7, 4, 2, 1, "keys", 32)
        plan = Plan.of([], layout.sizes, True)
        call = Call(0.1, 0.0, Bias.of(bias, 4, 2))
        tiles = Tiles(*(TileConfig(16, 16, 1, 1) for _ in range(3)))
        out, _, norm, rest = forward(plan, *inputs[:3], call, with_norm=True, config=tiles.forward)
        grads = backward(
            plan, query, key, value, out, norm, rest, self.grad, call, Needs(bias=True), tiles=tiles
        )
        return [out, *grads], rest


@pytest.mark.parametrize("is_uniform", (True, False))
def test_small_outputs_keep_what_rounding_took(
    is_uniform: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In calls with few keys that is most of the error of the gradient of a bias."""
    case = FewKeys(is_uniform)
    truths, plain = case.expected(torch.float64), case.expected()
    results, rest = case.run()
    assert rest is not None and rest.dtype == torch.float16
    monkeypatch.setattr(config, "REST_ELEMENTS", results[0].numel() - 1)
    rounded, nothing = case.run()
    assert nothing is None and torch.equal(results[0], rounded[0])
    for name, truth, *found in zip(NAMES, truths, results, rounded, plain, strict=True):
        for result in found[:2]:
            assert_fair(result, truth, found[2], name)
    error, without = (float((each[4] - truths[4]).norm()) for each in (results, rounded))
    if is_uniform:
        assert largest_error(results[0].double() + rest.double(), truths[0]) < 2e-6
        assert largest_error(results[4], truths[4]) < TOLERANCE < 1e-3 < without
    else:
        assert 1.5 * error < without


run_interpreted(globals())
