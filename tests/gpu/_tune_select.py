import sys, time
sys.path.insert(0, "tests/gpu")
import torch
from dataclasses import replace
from time_select import *
from flash_sparse_attn.backends import eager_select
from flash_sparse_attn.backends.triton.select import SelectTiles, TILES, select_intervals

def check(score, W, tiles, name, **o):
    a = select_intervals(score, W, tiles=tiles, **o)
    b = eager_select.intervals(score, W, o.get("mode", "causal"), o.get("key_mask"), o.get("cu_seqlens"), o.get("keep_first", 0), o.get("keep_recent", 0))
    bad = [int((x != y).sum()) for x, y in zip(a, b)]
    if any(bad):
        print("MISMATCH", name, tuple(score.shape), W, tiles, bad, flush=True)
    return not any(bad)

def profile(score, W, tiles):
    from torch.profiler import profile, ProfilerActivity
    for _ in range(3): select_intervals(score, W, tiles=tiles)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as p:
        for _ in range(5): select_intervals(score, W, tiles=tiles)
        torch.cuda.synchronize()
    return {e.key.split("(")[0][:16]: round(e.self_device_time_total / 5, 1) for e in p.key_averages() if e.self_device_time_total > 0}

V = {
 "c64 n1024 w2": SelectTiles(chunk=64, node=1024, chunk_warps=2),
 "c64 n1024 w1 s8": SelectTiles(chunk=64, node=1024, chunk_warps=1, rivals=8),
 "c64 n1024 w4": SelectTiles(chunk=64, node=1024, chunk_warps=4),
 "c64 n2048 w2": SelectTiles(chunk=64, node=2048, chunk_warps=2),
 "c64 n2048 w4": SelectTiles(chunk=64, node=2048, chunk_warps=4),
 "c128 n2048 w4": SelectTiles(chunk=128, node=2048, chunk_warps=4),
 "c128 n2048 w2": SelectTiles(chunk=128, node=2048, chunk_warps=2),
 "c64 n1024 w2 nw16": SelectTiles(chunk=64, node=1024, chunk_warps=2, node_warps=16),
 "c64 n1024 w2 512/4": SelectTiles(chunk=64, node=1024, chunk_warps=2, words=512, node_warps=4),
 "c64 n1024 w2 512/8": SelectTiles(chunk=64, node=1024, chunk_warps=2, words=512, node_warps=8),
 "c64 n1024 w2 2048/16": SelectTiles(chunk=64, node=1024, chunk_warps=2, words=2048, node_warps=16),
 "c64 n1024 w2 f16": SelectTiles(chunk=64, node=1024, chunk_warps=2, fan_out=16),
 "c64 n1024 w2 f64": SelectTiles(chunk=64, node=1024, chunk_warps=2, fan_out=64),
 "c64 n1024 w2 e32": SelectTiles(chunk=64, node=1024, chunk_warps=2, encode_words=32),
 "c64 n1024 w2 e128": SelectTiles(chunk=64, node=1024, chunk_warps=2, encode_words=128),
}
if __name__ == "__main__":
    t0 = time.time()
    print(torch.__version__, triton.__version__, torch.cuda.get_device_name())
    base = V["c64 n1024 w2"]
    for name, tiles in V.items():
        for R, K, W in [(2, 5000, 100), (3, 40000, 2048), (1, 40001, 5000)]:
            for pattern in ("random", "two levels", "rising", "falling"):
                check(scores_of_pattern(pattern, R, K), W, tiles, name + " " + pattern)
    print("checked variants", round(time.time() - t0, 1), flush=True)
    for R, K, W in [(1, 32768, 1024), (8, 32768, 2048), (8, 131072, 2048), (8, 1048576, 2048), (1, 1048576, 2048)]:
        for name, tiles in V.items():
            s = scores_of_pattern("random", R, K)
            try:
                print(R, K, W, name, "warm/cold ms %.4f %.4f" % time_select(s, W, tiles), profile(s, W, tiles), flush=True)
            except Exception as e:
                print(R, K, W, name, "FAIL", repr(e)[:200], flush=True)
        print(round(time.time() - t0, 1), flush=True)
    for p in PATTERNS:
        for R, K, W in SHAPES:
            s = scores_of_pattern(p, R, K)
            print(R, K, W, p, "warm/cold ms %.4f %.4f" % time_select(s, W, base), flush=True)
    big = scores_of_pattern("random", 8, 1048576)
    for W in (64, 2048, 20000, 200000, 1000000):
        print("W", W, "warm/cold ms %.4f %.4f" % time_select(big, W, base), profile(big, W, base), flush=True)
    for p in ("random", "two levels", "equal", "95 values"):
        s = scores_of_pattern(p, 2, 300000)
        for W in (7, 2048, 70000):
            check(s, W, base, p)
    print("done", round(time.time() - t0, 1))
