"""What `memory_report` counts is what stays allocated between the passes."""

from __future__ import annotations

import pytest
import torch

from flash_sparse_attn import dynamic_mask_attn_func, memory_report

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("length", [2048, 16384])
def test_a_report_is_what_stays_allocated(length):
    shapes = ((1, length, 8, 64), (1, length, 2, 64), (1, length, 2, 64))
    inputs = [torch.randn(s, device="cuda", dtype=torch.bfloat16).requires_grad_() for s in shapes]
    scores = torch.randn(1, 2, length, device="cuda").requires_grad_()
    report = memory_report(dynamic_mask_attn_func, *inputs, scores, 256)  # compiles, too
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    out = dynamic_mask_attn_func(*inputs, scores, 256)
    kept = torch.cuda.memory_allocated() - before - out.nbytes
    # Every allocation is rounded up to 512 bytes.
    assert report.extra_nbytes <= kept <= report.extra_nbytes + 512 * (len(report.tensors) + 2)
