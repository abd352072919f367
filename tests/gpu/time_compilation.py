"""Time the first forward and the first backward pass on a GPU, with nothing compiled before.

PYTHONPATH=src python tests/gpu/time_compilation.py
"""

from __future__ import annotations

import os
import tempfile
import time


def main() -> None:
    import torch

    from flash_sparse_attn import dynamic_mask_attn_func

    like = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
    for heads, kv_heads, dim in ((2, 1, 64), (32, 8, 128)):
        query, key, value = (
            torch.randn(1, 8192, count, dim, **like) for count in (heads, kv_heads, kv_heads)
        )
        scores = torch.randn(1, kv_heads, 8192, device="cuda", requires_grad=True)
        torch.cuda.synchronize()
        marks = [time.perf_counter()]
        out = dynamic_mask_attn_func(query, key, value, scores, 1024)
        torch.cuda.synchronize()
        marks.append(time.perf_counter())
        out.backward(torch.ones_like(out))
        torch.cuda.synchronize()
        marks.append(time.perf_counter())
        ahead, back = marks[1] - marks[0], marks[2] - marks[1]
        print(f"head dimension {dim}: forward {ahead:.1f} s, backward {back:.1f} s", flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        main()
