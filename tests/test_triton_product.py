"""dQ from kept gradients of scores, interpreted on the CPU: a product, and which parts it reads."""

from __future__ import annotations

import math

import pytest
import torch
from compare import largest_error
from interpreter import run_interpreted
from test_triton_attention import TOLERANCE, Case, Inputs
from torch import Tensor

from flash_sparse_attn.backends.triton.config import TileConfig
from flash_sparse_attn.backends.triton.grad_product import run_delta, run_product
from flash_sparse_attn.backends.triton.inputs import Saved
from flash_sparse_attn.backends.triton.slots import copy_slots
from flash_sparse_attn.plan import Plan

CASES = {
    "ordinary": Case(),
    "group of 4, batch": Case(batch=2, heads=8, kv_heads=2),
    "short last epoch": Case(queries=41, keys=41, heads=4),
    "fewer queries": Case(queries=19, keys=50),
    "more queries": Case(queries=50, keys=19),
    "more queries, not causal": Case(queries=50, keys=19, mode="shared", is_causal=False),
    "shared": Case(mode="shared"),
    "rising": Case(scores="rising", queries=90, keys=90, epoch=32),
    "recent keys": Case(keep_recent=10),
    "packed": Case(packed=((0, 13, 13, 40), (0, 13, 13, 40))),
}


def saved_of(inputs: Inputs) -> Saved:
    case = inputs.case
    out = torch.randn_like(inputs.query)
    norm = torch.empty(2, case.batch, case.heads, case.queries)
    delta = torch.full(norm.shape[1:], math.nan)
    tensors = (inputs.query, inputs.key, inputs.value)
    return Saved(*tensors, out, torch.randn_like(out) * 1e-3, inputs.grad, norm, delta)


def epochs_of(plan: Plan) -> list[tuple[int, int, int]]:
    """First query of every epoch, number of queries, position of the first."""
    if plan.epochs is not None:
        return [tuple(row[:3]) for row in plan.epochs.tolist()]
    firsts = range(0, plan.query_len, plan.epoch_len)
    offset = plan.key_len - plan.query_len
    return [(at, min(plan.epoch_len, plan.query_len - at), at + offset) for at in firsts]


def kept_and_product(inputs: Inputs, plan: Plan) -> tuple[Tensor, Tensor]:
    """Random numbers where a row sees a slot, as dK and dV would keep them, and dQ of them."""
    case = inputs.case
    group, rows = case.heads // case.kv_heads, case.batch * case.kv_heads
    kept = torch.zeros(rows, plan.num_epochs, plan.num_slots, plan.epoch_len, group)
    product = torch.zeros(case.batch, case.kv_heads, case.queries, group, case.dim)
    assert plan.slot_key is not None and plan.slot_start is not None
    assert plan.slot_expiry is not None
    for row in range(rows):
        batch, head = divmod(row, case.kv_heads)
        for epoch, (first, num, position) in enumerate(epochs_of(plan)):
            key = plan.slot_key[row, epoch]
            at = position + torch.arange(num)
            if plan.clamps_positions:
                at = at.clamp(min=0)
            sees = (plan.slot_start[row, epoch][:, None] <= at) & (key >= 0)[:, None]
            sees &= at < plan.slot_expiry[row, epoch][:, None]
            kept[row, epoch, :, :num] = torch.randn(*sees.shape, group) * sees[..., None]
            keys = inputs.key[batch, key.clamp(min=0).long(), head]
            part = torch.einsum("pqg,pd->qgd", kept[row, epoch, :, :num], keys)
            product[batch, head, first : first + num] = part
    whole = product.permute(0, 2, 1, 3, 4).reshape(inputs.query.shape)
    return kept.reshape(rows * plan.num_epochs * plan.num_slots, -1), whole


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("at_once", [2, None])
def test_what_is_kept_times_the_keys(name: str, at_once: int | None) -> None:
    inputs = Inputs(CASES[name])
    plan, saved = inputs.plan(), saved_of(inputs)
    kept, product = kept_and_product(inputs, plan)
    grad_query = torch.full_like(inputs.query, math.nan)
    rows = saved.rows
    slots = copy_slots(plan, inputs.key, inputs.value, None, rows)
    config = TileConfig(32, 16, 1, 1, uses_tma=True)
    units = len(rows) * plan.num_epochs
    at_once = at_once or units
    for unit in range(0, units, at_once):
        now = range(unit, min(unit + at_once, units))
        part = kept[now.start * plan.num_slots : now.stop * plan.num_slots].clone()
        run_product(plan, saved, slots, part, 0.3, config, grad_query, rows, now)
    assert largest_error(grad_query, 0.3 * product.double()) <= TOLERANCE


@pytest.mark.parametrize("name", ("ordinary", "group of 4, batch", "short last epoch"))
def test_delta(name: str) -> None:
    inputs = Inputs(CASES[name])
    case, saved = inputs.case, saved_of(inputs)
    run_delta(saved)
    assert saved.out_rest is not None
    delta = ((saved.out.double() + saved.out_rest) * inputs.grad).sum(-1)  # [B, Q, H]
    delta = delta.unflatten(2, (case.kv_heads, -1)).permute(0, 2, 1, 3)
    assert largest_error(saved.delta.view(delta.shape), delta) <= TOLERANCE


run_interpreted(globals())
