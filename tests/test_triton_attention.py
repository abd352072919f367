"""Plans and attention kernels, interpreted on the CPU in fp32, against the fp64 reference."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace

import pytest
import torch
from compare import largest_error
from interpreter import run_interpreted
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from flash_sparse_attn.backends.triton import launch as launching
from flash_sparse_attn.backends.triton.backward import Needs, backward
from flash_sparse_attn.backends.triton.config import TileConfig, Tiles
from flash_sparse_attn.backends.triton.forward import forward
from flash_sparse_attn.backends.triton.inputs import Bias, Call
from flash_sparse_attn.backends.triton.plan import build_plan
from flash_sparse_attn.intervals import KeySelection
from flash_sparse_attn.plan import Plan
from flash_sparse_attn.reference import attention_reference
from flash_sparse_attn.selection import select_keys
from flash_sparse_attn.varlen import PackedSequences

PLANNING = importlib.import_module("flash_sparse_attn.backends.triton.plan")
COLLECTING = importlib.import_module("flash_sparse_attn.backends.triton.collect")

# fp32 throughout: values and gradients are of order 1 to 10.
TOLERANCE = 3e-5


@pytest.fixture(autouse=True)
def _short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Survivors are sorted in several runs, which then have to be merged."""
    monkeypatch.setattr(PLANNING, "_RUN", 32)


def small_tiles(uses_tma: bool) -> Tiles:
    """Tiles so small that a few dozen keys make several blocks."""
    sizes = ((16, 16), (16, 16), (16, 32))
    return Tiles(*(TileConfig(*size, 1, 1, uses_tma) for size in sizes))


@dataclass(frozen=True)
class Case:
    """One call; defaults are an ordinary one."""

    batch: int = 1
    queries: int = 40
    keys: int = 40
    heads: int = 2
    kv_heads: int = 1
    dim: int = 16
    window: int = 8
    mode: str = "causal"
    is_causal: bool = True
    keep_first: int = 0
    keep_recent: int = 0
    epoch: int | None = 16
    scores: str = "random"
    padded: bool = False
    packed: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    bias: tuple[int, ...] | str | None = "scores"
    softcap: float = 0.0
    sums: bool = False
    uses_tma: bool = False


class Inputs:
    """Tensors of a case, its selection and plan."""

    def __init__(self, case: Case):
        self.case = case
        shape = (case.batch, case.kv_heads, case.keys)
        self.query = torch.randn(case.batch, case.queries, case.heads, case.dim)
        self.key = torch.randn(case.batch, case.keys, case.kv_heads, case.dim)
        self.value = torch.randn_like(self.key)
        self.grad = torch.randn_like(self.query) * 1.7
        if case.sums:
            self.grad = torch.tensor(1.3).expand_as(self.query)
        self.scores = {
            "random": torch.randn(shape),
            "equal": torch.full(shape, 0.5),
            "rising": torch.linspace(-2, 2, case.keys).expand(shape).contiguous(),
        }[case.scores]
        self.mask = torch.rand(case.batch, case.keys) < 0.8 if case.padded else None
        self.packed = None
        if case.packed:
            borders = [torch.tensor(b, dtype=torch.int32) for b in case.packed]
            longest = [int((b[1:] - b[:-1]).max()) for b in borders]
            self.packed = PackedSequences(borders[0], borders[1], longest[0], longest[1])
        self.selection = self.select(self.scores)
        self.bias = self.scores[:, :, None] if case.bias == "scores" else None
        if isinstance(case.bias, tuple):
            self.bias = torch.randn(case.bias)

    def select(self, scores: Tensor) -> KeySelection:
        case = self.case
        return select_keys(
            scores[0] if self.packed else scores,
            case.window,
            mode=case.mode,
            key_mask=self.mask,
            cu_seqlens=self.packed.cu_seqlens_k if self.packed else None,
            keep_first=case.keep_first,
            keep_recent=case.keep_recent,
        )

    def plan(self) -> Plan:
        case = self.case
        return build_plan(
            self.selection,
            case.queries,
            is_causal=case.is_causal,
            packed=self.packed,
            epoch_len=case.epoch,
        )

    def visible(self) -> Tensor:
        """The mask ``[B, Hkv, Q, K]`` from the selection, not from the plan."""
        case, selection = self.case, self.selection
        causal = None if case.mode == "causal" else case.is_causal
        if self.packed is None:
            return selection.to_dense(case.queries, causal)
        dense = torch.zeros(1, case.kv_heads, case.queries, case.keys, dtype=torch.bool)
        for q0, q1, k0, k1 in self.packed.ranges():
            if q1 > q0 and k1 > k0:
                part = replace(
                    selection,
                    start=selection.start[None, :, k0:k1],
                    expiry=selection.expiry[None, :, k0:k1],
                    score=selection.score[None, :, k0:k1],
                    cu_seqlens=None,
                )
                dense[:, :, q0:q1, k0:k1] = part.to_dense(q1 - q0, causal)
        return dense

    def run(self) -> list[Tensor]:
        """Output, lse and all gradients from the kernels."""
        case, tiles = self.case, small_tiles(self.case.uses_tma)
        bias = None if self.bias is None else Bias.of(self.bias, case.heads, case.kv_heads)
        call = Call(case.dim**-0.5, case.softcap, bias)
        plan = self.plan()
        tensors = (self.query, self.key, self.value)
        out, lse, *kept = forward(plan, *tensors, call, with_norm=True, config=tiles.forward)
        needs = Needs(bias=bias is not None)
        grads = backward(plan, *tensors, out, *kept, self.grad, call, needs, tiles=tiles)
        return [out, lse, *(grad for grad in grads if grad is not None)]

    def truth(self) -> list[Tensor]:
        """The same from the reference in fp64; padding is zeroed, since 0 * NaN would be NaN."""
        key, value = self.key, self.value
        if self.mask is not None:
            key = torch.where(self.mask[:, :, None, None], key, 0)
            value = torch.where(self.mask[:, :, None, None], value, 0)
        leaves = [t.double().requires_grad_() for t in (self.query, key, value)]
        bias = None if self.bias is None else self.bias.double().requires_grad_()
        out, lse, _ = attention_reference(
            *leaves,
            self.visible(),
            bias,
            softmax_scale=self.case.dim**-0.5,
            softcap=self.case.softcap,
        )
        if bias is not None:
            leaves.append(bias)
        return [out, lse, *torch.autograd.grad(out, leaves, self.grad.double())]


NAMES = ("out", "lse", "grad query", "grad key", "grad value", "grad bias")

CASES = {
    "several blocks of survivors": Case(
        queries=96, keys=96, window=45, epoch=32, scores="rising", uses_tma=True
    ),
    "batch, group of 3": Case(batch=2, heads=3, queries=33, keys=33),
    "more keys, softcap, no bias": Case(keys=70, bias=None, softcap=2.0, dim=20, uses_tma=True),
    "more queries: empty rows": Case(queries=60, keys=30),
    "sinks, recent, padded with NaN": Case(keep_first=2, keep_recent=5, padded=True),
    "packed, an empty sequence": Case(
        queries=44, keys=50, heads=4, kv_heads=2, packed=((0, 14, 14, 44), (0, 14, 18, 50))
    ),
    "shared, recent, not causal": Case(
        mode="shared", is_causal=False, keep_recent=3, queries=50, keys=36
    ),
    "relu, bias per head": Case(mode="relu", bias=(1, 2, 1, 40), epoch=None, uses_tma=True),
    "pair bias shared by all": Case(batch=2, bias=(1, 1, 40, 40)),
    "one epoch, equal scores, dO of a sum": Case(epoch=128, scores="equal", sums=True),
}

HEAVY_CASES = {
    "full pair bias": Case(batch=2, heads=4, kv_heads=2, bias=(2, 4, 40, 40)),
    "bias constant along keys": Case(heads=4, kv_heads=2, bias=(1, 2, 40, 1)),
    "one bias for all": Case(bias=(1, 1, 1, 40), batch=2, kv_heads=2),
    "window over everything": Case(window=64, uses_tma=True),
    "window of one": Case(window=1, scores="rising", queries=64, keys=64),
    "group of 20 over tiles of 16 rows": Case(heads=20, queries=20, keys=20),
    "shared, causal": Case(mode="shared", keep_first=2, epoch=None, queries=64, keys=64),
    "packed, sinks and recent": Case(
        queries=90, keys=120, keep_first=1, keep_recent=5, packed=((0, 30, 90), (0, 50, 120))
    ),
    "wide head": Case(dim=80, heads=4, kv_heads=4, uses_tma=True),
}


def check(case: Case) -> None:
    inputs = Inputs(case)
    if inputs.mask is not None:
        inputs.key[~inputs.mask] = torch.nan
        inputs.value[~inputs.mask] = torch.nan
    assert torch.equal(inputs.plan().to_dense(), inputs.visible().flatten(0, 1))
    for name, result, truth in zip(NAMES, inputs.run(), inputs.truth(), strict=False):
        assert largest_error(result, truth.detach(), name) < TOLERANCE, name


@pytest.mark.parametrize("name", CASES)
def test_attention(name: str) -> None:
    """Output, lse and every gradient, on every element; fresh memory is poisoned."""
    check(CASES[name])


@pytest.mark.heavy
@pytest.mark.parametrize("name", HEAVY_CASES)
def test_attention_more(name: str) -> None:
    check(HEAVY_CASES[name])


def test_the_past_is_bit_identical() -> None:
    """Better keys later on end the life of keys, and change no bit of what came before."""
    inputs = Inputs(Case(queries=96, keys=96, window=45, epoch=32))
    before, changed = inputs.run(), 70
    inputs.scores[..., changed:] += 3.0
    inputs.key[:, changed:] += 1.0
    inputs.value[:, changed:] -= 1.0
    inputs.query[:, changed:] *= 2.0
    inputs.selection = inputs.select(inputs.scores)
    after = inputs.run()
    for index, name in ((0, "out"), (2, "grad query")):
        assert torch.equal(before[index][:, :changed], after[index][:, :changed]), name
        assert not torch.equal(before[index], after[index]), name
    assert torch.equal(before[1][..., :changed], after[1][..., :changed])


def plan_uses(plan: Plan) -> dict[int, list[int]]:
    """``epoch * P + slot`` of every (row, key), from the slots."""
    uses: dict[int, list[int]] = {}
    rows, epochs, slots = plan.slot_key.shape
    for row in range(rows):
        for epoch in range(epochs):
            old, new = plan.counts[row, epoch].tolist()
            used = [*range(old), *range(plan.old_slots, plan.old_slots + new)]
            for slot in used:
                key = int(plan.slot_key[row, epoch, slot])
                uses.setdefault(row * plan.key_len + key, []).append(epoch * slots + slot)
    return uses


PLANS = {
    "causal, several runs": Case(queries=150, keys=150, window=70, keep_first=1, keep_recent=4),
    "padded, recent": Case(queries=100, keys=100, keep_recent=12, padded=True),
    "more keys than queries": Case(queries=30, keys=100),
    "packed": Case(
        queries=140,
        keys=150,
        kv_heads=2,
        heads=2,
        packed=((0, 7, 7, 8, 140, 140), (0, 10, 20, 21, 130, 150)),
    ),
    "shared, recent, not causal": Case(
        mode="shared", is_causal=False, keep_recent=6, queries=70, keys=50
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_plan(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels rely on: prefixes, and every use of a key listed in the order of epochs."""
    # So small that a hundred keys go through two levels of coarse epochs and several pieces.
    for constant, value in (("_COARSE", 32), ("_LEVEL", 2), ("_BLOCK", 16), ("_PIECE", 32)):
        monkeypatch.setattr(COLLECTING, constant, value)
    # And its uses are summed in several pieces of several blocks.
    for constant, value in (("_USES", 16), ("_PIECES", 4)):
        monkeypatch.setattr(PLANNING, constant, value)
    inputs = Inputs(PLANS[name])
    plan = inputs.plan()
    assert torch.equal(plan.to_dense(), inputs.visible().flatten(0, 1))
    for epoch, (first, num, position) in enumerate(plan.bounds()):
        at = torch.arange(position, position + max(num, 0))[:, None]
        if plan.clamps_positions:
            at = at.clamp(min=0)
        for row in range(plan.slot_key.shape[0]):
            old, new = plan.counts[row, epoch].tolist()
            for begin, used in ((0, old), (plan.old_slots, new)):
                start = plan.slot_start[row, epoch, begin : begin + used]
                expiry = plan.slot_expiry[row, epoch, begin : begin + used]
                sees = (start <= at) & (at < expiry)
                prefix = (plan.entered if begin else plan.visible)[row, first : first + num]
                within = torch.arange(used) < prefix[:, None]
                # Old slots: exactly the prefix. New slots: nothing behind it.
                assert not (sees & ~within).any()
                assert begin or torch.equal(sees, within)
    uses, begin = plan_uses(plan), 0
    assert plan.use_end is not None and plan.use_slot is not None
    for index, end in enumerate(plan.use_end.tolist()):
        assert plan.use_slot[begin:end].tolist() == uses.get(index, [])
        begin = end


class _Operators(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function._opname)
        return function(*args, **(kwargs or {}))


def test_passes_allocate_and_launch_and_nothing_else() -> None:
    """Or a call with a bias per key could not be repeated from its recording."""
    query, key, value = (torch.randn(1, 70, heads, 16).half() for heads in (4, 2, 2))
    scores = torch.randn(1, 2, 70)
    plan = build_plan(select_keys(scores, 20), 70, is_causal=True)
    call = Call(0.25, 0.0, Bias.of(scores[:, :, None], 4, 2))
    # As in an operator: below autograd, where even a cast to the same dtype is an operator.
    with _Operators() as ran, torch._C._AutoDispatchBelowAutograd():
        out, _, *kept = forward(plan, query, key, value, call, with_norm=True)
        backward(plan, query, key, value, out, *kept, out, call, Needs(bias=True))
    interpreter = {"copy_", "set_"}
    assert ran.names - interpreter <= launching._ALLOCATIONS | launching._VIEWS


def test_plan_is_a_pytree() -> None:
    plan = Inputs(Case()).plan()
    leaves, spec = torch.utils._pytree.tree_flatten(plan)
    again = torch.utils._pytree.tree_unflatten(leaves, spec)
    assert again.slot_key is plan.slot_key and again.epoch_len == plan.epoch_len
    assert "16 queries" in repr(plan)


run_interpreted(globals())
