"""Bool masks and biases on the GPU: every broadcast pattern, random cases, options and limits."""

from __future__ import annotations

import random
from itertools import product

import pytest
import torch
from compare import assert_fair, largest_error
from oracles import check_attention
from torch import Tensor

from flash_sparse_attn import flash_sparse_attn_func, flash_sparse_attn_varlen_func
from flash_sparse_attn.backends.triton import masks
from flash_sparse_attn.reference import attention_reference

pytestmark = pytest.mark.gpu

BF16, FP16 = torch.bfloat16, torch.float16
B, H, HKV, Q, K = 2, 6, 2, 65, 129
PATTERNS = list(product((1, B), (1, HKV, H), (1, Q), (1, K)))


@pytest.fixture(params=["planned", "direct"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Short masks are planned as well, or read by the kernels themselves."""
    _take(request.param, monkeypatch)
    return request.param


def _take(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "DIRECT_KEYS", 0 if path == "planned" else 1 << 30)


def inputs_of(
    shape: tuple[int, int, int, int, int, int] = (B, H, HKV, Q, K, 64), dtype: torch.dtype = BF16
) -> list[Tensor]:
    """Query, key and value of a (B, H, Hkv, Q, K, D)."""
    batch, heads, kv_heads, queries, keys, dim = shape
    torch.manual_seed(0)
    query = torch.randn(batch, queries, heads, dim, device="cuda").to(dtype)
    key, value = (
        torch.randn(batch, keys, kv_heads, dim, device="cuda").to(dtype) for _ in range(2)
    )
    return [query, key, value]


def check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    is_causal: bool = False,
    softcap: float = 0.0,
    dense_mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """Output, lse and all gradients of the kernels; `mask` may be a view with odd strides."""

    def attend(query, key, value, bias=None):
        return flash_sparse_attn_func(
            query, key, value, mask, bias, None, is_causal, softcap, backend="triton"
        )

    dense = mask if dense_mask is None else dense_mask
    results = check_attention(
        attend, query, key, value, dense, bias, is_causal=is_causal, softcap=softcap
    )
    out, lse = flash_sparse_attn_func(
        query, key, value, mask, bias, None, is_causal, softcap, return_lse=True, backend="triton"
    )
    options = {"is_causal": is_causal, "softcap": softcap}
    exact = [t.double() for t in (query, key, value)]
    wide = None if bias is None else bias.double()
    truth_out, truth, _ = attention_reference(*exact, dense, wide, **options)
    if query.shape[1] < 16:  # few queries without gradients are decoded
        plain, _, _ = attention_reference(query, key, value, dense, bias, **options)
        assert_fair(out, truth_out, plain, "decoded out")
    else:
        assert torch.equal(out, results["out"])
    # Biases beyond 2.3e38 count as that, and so does the lse of rows that see only such.
    truth = torch.where(truth.isfinite(), truth.clamp(-2.3e38, 2.3e38), truth)
    size = max(1.0, float(truth[truth.isfinite()].abs().max())) if truth.isfinite().any() else 1.0
    assert largest_error(lse, truth, "lse") <= 2e-5 * size
    return results


@pytest.mark.parametrize("number", range(len(PATTERNS)))
def test_every_pattern(number: int, path: str) -> None:
    """Each pattern of a mask, and of a bias, with another one of the other."""
    query, key, value = inputs_of()
    mask = torch.rand(PATTERNS[number], device="cuda") < 0.5
    bias = torch.randn(PATTERNS[(7 * number + 5) % len(PATTERNS)], device="cuda")
    check(query, key, value, mask, bias, is_causal=number % 2 == 1)
    if path == "direct":
        check(query, key, value, None, bias.to(BF16), is_causal=number % 2 == 0)


@pytest.mark.parametrize("dtype", [BF16, FP16, torch.float32])
@pytest.mark.parametrize("heads", [1, HKV, H])
def test_aligned_rows(heads: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are read 8 keys at a time, beside views of them whose rows begin anywhere."""
    _take("direct", monkeypatch)
    query, key, value = inputs_of((B, H, HKV, Q, 136, 64))
    wide = torch.rand(B, heads, Q, 144, device="cuda") < 0.5
    bias = torch.randn(1, H, Q, 136, device="cuda").to(dtype)
    for begin in (0, 8, 3):
        mask = wide[..., begin : begin + 136]
        check(query, key, value, mask, bias, is_causal=begin == 8)
    check(query, key, value, None, bias, is_causal=heads == 1)


def random_mask(draw: random.Random, shape: tuple[int, ...]) -> Tensor:
    query = torch.arange(shape[2], device="cuda")[:, None]
    key = torch.arange(shape[3], device="cuda")
    kind = draw.choice(["random", "sparse", "window", "blocks", "documents", "all", "none", "rows"])
    noise = torch.rand(shape, device="cuda")
    return {
        "random": noise < 0.5,
        "sparse": noise < 0.03,
        "window": ((key <= query + 3) & (query < key + 40)).expand(shape),
        "blocks": (((query // 64) * 7 + key // 64) % 3 == 0).expand(shape),
        "documents": (query // 100 == key // 100).expand(shape),
        "all": noise < 2,
        "none": noise > 2,
        "rows": (noise < 0.3) & ((query // 33) % 2 == 0),
    }[kind].clone()


def random_bias(draw: random.Random, shape: tuple[int, ...], query_dtype: torch.dtype) -> Tensor:
    dtype = draw.choice([torch.float32, BF16, FP16])
    bias = (torch.randn(shape, device="cuda") * draw.choice([0.1, 1, 3])).to(dtype)
    hidden = torch.rand(shape, device="cuda") < 0.05
    # Plain PyTorch casts the bias to the dtype of the query: it has to stay finite there.
    lowest = -3e4 if FP16 in (dtype, query_dtype) else torch.finfo(BF16).min
    fill = draw.choice([None, -torch.inf, lowest])
    return bias if fill is None else bias.masked_fill(hidden, fill)


def random_view(draw: random.Random, tensor: Tensor) -> Tensor:
    """The same values with other strides."""
    if draw.random() < 0.3:
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if draw.random() < 0.3:
        return torch.nn.functional.pad(tensor, (0, 8))[..., : tensor.shape[-1]]
    return tensor


# Most are compilation, minutes of it.
SEEDS = [pytest.param(seed, marks=[pytest.mark.heavy] * (seed % 5 > 0)) for seed in range(100)]


@pytest.mark.parametrize("seed", SEEDS)
def test_random_cases(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """5 of 500 calls: shapes, strides, patterns, dtypes, masks and biases at random."""
    # Few numbers that kernels are compiled for.
    draw = random.Random(seed // 5)
    heads, kv_heads = draw.choice([(1, 1), (2, 1), (4, 2), (3, 1), (8, 1)])
    dim, dtype = draw.choice([40, 64, 64, 128]), draw.choice([BF16, BF16, FP16])
    softcap = draw.choice([0.0, 0.0, 15.0])
    draw = random.Random(seed)
    torch.manual_seed(seed)
    for number in range(5):
        _take(draw.choice(["planned", "direct"]), monkeypatch)
        batch = draw.choice([1, 2, 3])
        queries, keys = (draw.choice([1, 7, 64, 65, 200, 333, 700]) for _ in range(2))

        def pattern(sizes: tuple[int, ...] = (batch, queries, keys)) -> tuple[int, ...]:
            batch, *lengths = (draw.choice([1, size]) for size in sizes)
            return (batch, draw.choice([1, kv_heads, heads]), *lengths)

        query, key, value = (
            random_view(draw, torch.randn(shape, device="cuda").to(dtype))
            for shape in (
                (batch, queries, heads, dim),
                (batch, keys, kv_heads, dim),
                (batch, keys, kv_heads, dim),
            )
        )
        mask = None if draw.random() < 0.2 else random_mask(draw, pattern())
        bias = None if draw.random() < 0.3 else random_bias(draw, pattern(), dtype)
        given = mask
        if mask is not None and draw.random() < 0.3:
            full = (batch, heads, queries, keys)
            given = mask if mask.shape[1] not in (1, heads) else mask.expand(full)
        try:
            check(query, key, value, given, bias, draw.random() < 0.5, softcap, mask)
        except AssertionError as error:
            facts = (
                query.shape,
                key.shape,
                getattr(mask, "shape", None),
                bias is None or bias.shape,
            )
            raise AssertionError(f"case {number} of seed {seed}: {facts}") from error


def test_skipping_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile that visits blocks which it does not see computes the same."""
    from flash_sparse_attn.backends.triton import plan_mask as planning
    from flash_sparse_attn.backends.triton.block_lists import fill_lists

    _take("planned", monkeypatch)
    query, key, value = inputs_of((1, 4, 2, 600, 600, 64))
    position = torch.arange(600, device="cuda")
    mask = (position[:, None] // 150 == position // 150) & (torch.rand(600, 600).cuda() < 0.6)
    bias = torch.randn(1, 2, 600, 600, device="cuda")
    mask = mask[None, None]
    first = check(query, key, value, mask, bias, is_causal=True)
    make = planning.plan_mask

    def without_skips(*args, **options):
        plan = make(*args, **options)
        plan.block_bits[..., 0] = -1
        fill_lists(plan, plan.lists, plan.list_sizes)
        return plan

    monkeypatch.setattr(planning, "plan_mask", without_skips)
    second = check(query, key, value, mask, bias, is_causal=True)
    for name, result in first.items():
        assert torch.equal(result, second[name]), name


def test_hidden_keys_may_hold_anything(path: str) -> None:
    query, key, value = inputs_of((1, 2, 1, 200, 200, 64))
    mask = torch.rand(1, 1, 200, 200, device="cuda") < 0.5
    mask[..., 100:140] = False
    key[:, 100:140], value[:, 100:140] = torch.nan, torch.inf
    inputs = [t.requires_grad_() for t in (query, key, value)]
    out = flash_sparse_attn_func(*inputs, mask, backend="triton")
    grads = torch.autograd.grad(out, inputs, torch.randn_like(out))
    assert all(bool(t.isfinite().all()) for t in (out, *grads))
    assert not grads[1][:, 100:140].any() and not grads[2][:, 100:140].any()


def test_rows_of_largest_biases(path: str) -> None:
    """Beside a bias near the largest number the normalization is not lost."""
    query, key, value = inputs_of((1, 2, 1, 96, 96, 64))
    mask = torch.rand(1, 1, 96, 96, device="cuda") < 0.3
    for fill in (torch.finfo(BF16).min, -3e38, 3e38, 1e6):
        bias = torch.full((1, 1, 96, 96), fill, device="cuda")
        results = check(query, key, value, mask, bias.requires_grad_())
        assert results["dvalue"].abs().max() > 0


def test_repeatable_and_captured(path: str) -> None:
    """Two runs, and a replayed graph, agree in every bit."""
    tensors = inputs_of((2, 4, 2, 500, 500, 64))
    mask = torch.rand(2, 1, 500, 500, device="cuda") < 0.2
    tensors.append(torch.randn(1, 1, 500, 500, device="cuda", dtype=BF16))
    grad = torch.randn_like(tensors[0])

    def step() -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        query, key, value, bias = leaves
        out = flash_sparse_attn_func(
            query, key, value, mask, bias, is_causal=True, deterministic=True, backend="triton"
        )
        return [out, *torch.autograd.grad(out, leaves, grad)]

    first = step()
    assert all(torch.equal(a, b) for a, b in zip(first, step(), strict=True))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(first, captured, strict=True))


def test_mask_of_more_than_2_31_elements() -> None:
    """The last batch entry of a huge mask gives the bits of a call of its own."""
    shape = (3, 2, 1, 32768, 32768, 64)
    query, key, value = inputs_of(shape)
    mask = torch.zeros(3, 1, 32768, 32768, dtype=torch.bool, device="cuda")
    mask[2, 0, torch.arange(32768), torch.randint(0, 32768, (32768,))] = True
    mask[2, 0, :, 7000:7100] = True
    results = []
    for rows in (slice(0, 3), slice(2, 3)):
        inputs = [t[rows].detach().requires_grad_() for t in (query, key, value)]
        out = flash_sparse_attn_func(*inputs, mask[rows], is_causal=True, backend="triton")
        grads = torch.autograd.grad(out[-1].float().square().sum(), inputs)
        results.append([out[-1:], *(grad[-1:] for grad in grads)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert bool(results[0][0].any())
    # An expanded mask is read as what it is.
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    flash_sparse_attn_func(query, key, value, mask[2:].expand(3, 2, -1, -1), is_causal=True)
    assert torch.cuda.max_memory_allocated() - before < 2 * mask[2:].numel()


@pytest.mark.parametrize("with_mask", [False, True])
def test_packed(with_mask: bool) -> None:
    """Packed sequences with a bias per key and a mask of keys equal one call each."""
    torch.manual_seed(0)
    lengths_q, lengths_k = [100, 0, 37, 1, 300], [130, 20, 37, 64, 250]
    borders = [
        torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device="cuda")
        for lengths in (lengths_q, lengths_k)
    ]
    total_q, total_k = sum(lengths_q), sum(lengths_k)
    query = torch.randn(total_q, 4, 64, device="cuda").to(BF16)
    key, value = (torch.randn(total_k, 2, 64, device="cuda").to(BF16) for _ in range(2))
    bias = torch.randn(2, total_k, device="cuda")
    mask = torch.rand(total_k, device="cuda") < 0.7 if with_mask else None
    leaves = [t.requires_grad_() for t in (query, key, value, bias)]

    def run(backend: str) -> list[Tensor]:
        out, lse = flash_sparse_attn_varlen_func(
            *leaves[:3], *borders, max(lengths_q), max(lengths_k), is_causal=True, attn_mask=mask,
            attn_bias=bias, return_lse=True, backend=backend,
        )  # fmt: skip
        grads = torch.autograd.grad(out, leaves, 0.1 * torch.ones_like(out))
        return [out.detach(), lse.detach(), *grads]

    for result, truth in zip(run("triton"), run("eager"), strict=True):
        finite = truth.isfinite()  # the lse of a query without keys is not
        result, truth = result.float(), truth.float()
        largest = float(truth[finite].abs().max())
        assert largest_error(result, truth.double()) < 2e-2 * max(1.0, largest)
        assert (result - truth)[finite].norm() <= 1e-2 * truth[finite].norm()


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lengths", [(300, 300), (128, 300), (300, 128)])
def test_plain_attention(lengths: tuple[int, int], is_causal: bool) -> None:
    """Without mask and bias: PyTorch's kernels where they mean the same, with ours as the judge."""
    query, key, value = inputs_of((2, 4, 2, *lengths, 64))
    results = check_attention(
        lambda query, key, value: flash_sparse_attn_func(query, key, value, is_causal=is_causal),
        query, key, value, is_causal=is_causal,
    )  # fmt: skip
    out, lse = flash_sparse_attn_func(query, key, value, is_causal=is_causal, return_lse=True)
    ours = flash_sparse_attn_func(
        query, key, value, is_causal=is_causal, return_lse=True, backend="triton"
    )
    assert torch.equal(out, results["out"]) and lse.dtype == torch.float32
    assert largest_error(lse, ours[1].double()) < 1e-4
    check(query, key, value, None, None, is_causal)
