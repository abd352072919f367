"""`memory_report`: what a call keeps for its backward pass, and under which names."""

from __future__ import annotations

import pytest
import torch

from flash_sparse_attn import (
    DynamicMaskAttention,
    dynamic_mask_attn_func,
    flash_sparse_attn_func,
    memory_report,
    select_keys,
)
from flash_sparse_attn.memory import INPUT, MADE, OUTPUT

B, N, H, HKV, D, W = 2, 96, 4, 2, 16, 24


def tensors() -> tuple[torch.Tensor, ...]:
    shapes = ((B, N, H, D), (B, N, HKV, D), (B, N, HKV, D), (B, HKV, N))
    return tuple(torch.randn(shape, requires_grad=True) for shape in shapes)


def test_a_dynamic_mask_keeps_its_inputs_its_output_and_linear_extras():
    query, key, value, scores = inputs = tensors()
    report = memory_report(dynamic_mask_attn_func, *inputs, W, backend="eager")
    names = {t.name: t.nbytes for t in report.tensors if t.origin != MADE}
    kept = {"query": query, "key": key, "value": value, "scores": scores, "output": query}
    assert names == {name: tensor.nbytes for name, tensor in kept.items()}
    # The largest score and the sum of every row; start and expiry of every key.
    assert report.extra_nbytes == 4 * (2 * B * H * N + 2 * B * HKV * N)
    assert report.nbytes == sum(names.values()) + report.extra_nbytes


def test_what_is_kept_grows_with_the_length_alone():
    def extra(length: int, window: int) -> int:
        shapes = ((1, length, 2, 8), (1, length, 1, 8), (1, length, 1, 8), (1, 1, length))
        inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
        return memory_report(dynamic_mask_attn_func, *inputs, window).extra_nbytes

    assert extra(128, 16) == extra(128, 64) and extra(512, 16) == 4 * extra(128, 16)


def test_tensors_of_selections_have_names_and_are_the_callers():
    query, key, value, scores = tensors()
    selection = select_keys(scores, W)
    report = memory_report(
        flash_sparse_attn_func, query, key, value, selection, attn_bias=scores[:, :, None]
    )
    origin = {t.name: t.origin for t in report.tensors}
    assert origin["attn_mask.start"] == origin["attn_mask.expiry"] == INPUT
    assert origin["attn_bias"] == INPUT and origin["output"] == OUTPUT


def test_a_stored_square_is_seen():
    def attend(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (query @ key.transpose(-1, -2)).softmax(-1) @ key

    query, key = (torch.randn(1, N, D, requires_grad=True) for _ in range(2))
    report = memory_report(attend, query, key=key)
    made = [t for t in report.tensors if t.origin == MADE and t.nbytes]
    assert [(t.shape, t.nbytes) for t in made] == [((1, N, N), 4 * N * N)]
    assert {t.name for t in report.tensors if t.origin == INPUT} == {"query", "key"}


def test_shared_memory_counts_once_and_views_with_all_that_they_hold():
    whole = torch.randn(100, 8, requires_grad=True)
    report = memory_report(lambda x, y: x * y, whole, whole)
    assert report.nbytes == whole.nbytes and len(report.tensors) == 2
    report = memory_report(lambda x: x * x, whole[:5])
    assert report.nbytes == whole.nbytes and report.tensors[0].shape == (5, 8)


def test_without_gradients_nothing_is_kept():
    inputs = [tensor.detach() for tensor in tensors()]
    report = memory_report(dynamic_mask_attn_func, *inputs, W)
    assert report.tensors == () and report.nbytes == report.extra_nbytes == 0
    with torch.no_grad():  # as a training step would run it
        assert memory_report(dynamic_mask_attn_func, *tensors(), W).nbytes > 0


def test_modules_methods_and_functions_without_a_signature():
    layer = DynamicMaskAttention(32, 2, 8)
    hidden = torch.randn(1, 40, 32)
    for call in (layer, layer.forward):
        names = {t.name for t in memory_report(call, hidden).tensors if t.origin == INPUT}
        assert {"hidden_states", "o_proj.weight", "v_proj.weight", "A"} <= names
    query = tensors()[0]
    report = memory_report(torch.matmul, query, query.detach().transpose(-1, -2))
    assert {t.name for t in report.tensors} == {"argument 1"}
    report = memory_report(lambda pair, more: pair[0] * more["x"], [query], {"x": query.detach()})
    assert (
        report.tensors[-1].name in ("more['x']", "pair[0]") and report.tensors[-1].origin == INPUT
    )


def test_the_backward_pass_still_runs_and_hooks_are_gone():
    inputs = tensors()
    memory_report(dynamic_mask_attn_func, *inputs, W)
    dynamic_mask_attn_func(*inputs, W).sum().backward()
    assert all(tensor.grad is not None for tensor in inputs)


def test_its_text_is_a_table_with_the_sums():
    report = memory_report(dynamic_mask_attn_func, *tensors(), W)
    head, *lines, total, made = str(report).splitlines()
    assert head.split() == ["origin", "name", "dtype", "shape", "bytes"]
    assert len(lines) == len(report.tensors) and len({len(line) for line in [head, *lines]}) == 1
    assert total.startswith("kept for backward") and total.endswith(f"{report.nbytes:,}")
    assert made.endswith(f"{report.extra_nbytes:,}") and len(made) == len(total) == len(head)


def test_something_else_than_a_function_is_refused():
    with pytest.raises(TypeError, match=r"function: expected something to be called, got Tensor"):
        memory_report(tensors()[0])
