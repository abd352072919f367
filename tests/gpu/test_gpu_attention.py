"""The GPU kernels against the fp64 reference, on every element, forward and every gradient."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from compare import assert_fair, largest_error
from oracles import check_attention
from torch import Tensor

from flash_sparse_attn import (
    dynamic_mask_attn_func,
    dynamic_mask_attn_varlen_func,
    flash_sparse_attn_func,
    prepare_selection,
    select_keys,
)
from flash_sparse_attn.backends.triton import role_config
from flash_sparse_attn.reference import attention_reference

pytestmark = pytest.mark.gpu

BF16, FP16 = torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    """One call; defaults are an ordinary one."""

    batch: int = 1
    queries: int = 300
    keys: int = 300
    heads: int = 4
    kv_heads: int = 2
    dim: int = 64
    window: int = 48
    dtype: torch.dtype = BF16
    mode: str = "causal"
    is_causal: bool | None = None
    keep_first: int = 0
    keep_recent: int = 0
    pattern: str = "random"
    padding: str | None = None
    bias: tuple[int, ...] | str | None = "scores"
    bias_dtype: torch.dtype = torch.float32
    softcap: float | None = None
    scale: float | None = None


def scores_of(case: Case) -> Tensor:
    """fp32 scores ``[B, Hkv, K]`` of a pattern."""
    shape = (case.batch, case.kv_heads, case.keys)
    noise = torch.randn(shape)
    ramp = torch.linspace(-2, 2, case.keys).expand(shape)
    recursive = torch.zeros(shape)
    if case.pattern == "AR(1)":
        for t in range(1, case.keys):
            recursive[..., t] = 0.99 * recursive[..., t - 1] + 0.1 * noise[..., t]
    return {
        "random": noise,
        "equal": torch.full(shape, 0.5),
        "rising": ramp.clone(),
        "falling": -ramp,
        "two levels": (noise > 1).float(),
        "AR(1)": recursive,
        "trend up": noise + ramp,
        "trend down": noise - ramp,
        "95 values": torch.randint(0, 95, shape).float() / 40,
        "large": noise * 1e4,
        "hidden": torch.where(noise > 1.5, -torch.inf, noise),
    }[case.pattern].cuda()


def check(case: Case) -> None:
    """Output and all gradients of `case`, with random upstream gradients."""
    torch.manual_seed(0)
    query = torch.randn(case.batch, case.queries, case.heads, case.dim, device="cuda").to(
        case.dtype
    )
    key, value = (
        torch.randn(case.batch, case.keys, case.kv_heads, case.dim, device="cuda").to(case.dtype)
        for _ in range(2)
    )
    scores = scores_of(case)
    key_mask = None
    if case.padding is not None:
        key_mask = torch.ones(case.batch, case.keys, dtype=torch.bool, device="cuda")
        for row in range(case.batch):
            count = case.keys // (3 + row)
            if case.padding == "left":
                key_mask[row, :count] = False
            elif case.padding == "right":
                key_mask[row, -count:] = False
            else:
                key_mask[row, torch.randperm(case.keys)[:count]] = False
    selection = select_keys(
        scores,
        case.window,
        mode=case.mode,
        key_mask=key_mask,
        keep_first=case.keep_first,
        keep_recent=case.keep_recent,
    )
    mask = selection.to_dense(case.queries, case.is_causal)
    bias = None
    if case.bias == "scores":
        bias = scores[:, :, None].to(case.bias_dtype)
    elif case.bias is not None:
        bias = torch.randn(case.bias, device="cuda").to(case.bias_dtype)

    def attend(query, key, value, bias=None):
        return flash_sparse_attn_func(
            query,
            key,
            value,
            selection,
            bias,
            case.scale,
            case.is_causal,
            case.softcap,
            backend="triton",
        )

    results = check_attention(
        attend,
        query,
        key,
        value,
        mask,
        bias,
        softmax_scale=case.scale,
        softcap=case.softcap,
    )
    again = flash_sparse_attn_func(
        query,
        key,
        value,
        prepare_selection(selection, case.queries, is_causal=case.is_causal),
        bias,
        case.scale,
        case.is_causal,
        case.softcap,
        return_lse=True,
        backend="triton",
    )
    options = {"softmax_scale": case.scale, "softcap": case.softcap}
    wide = None if bias is None else bias.double()
    truth, lse, _ = attention_reference(
        query.double(), key.double(), value.double(), mask, wide, **options
    )
    if case.queries < 16:  # few queries without gradients are decoded
        plain, _, _ = attention_reference(query, key, value, mask, bias, **options)
        assert_fair(again[0], truth, plain, "decoded out")
    else:
        assert torch.equal(again[0], results["out"])
    size = max(1.0, float(lse[lse.isfinite()].abs().max())) if lse.isfinite().any() else 1.0
    assert largest_error(again[1], lse, "lse") <= 2e-5 * size


CASES = {
    "ordinary": Case(),
    "head dimension 20": Case(dim=20),
    "head dimension 40, fp16": Case(dim=40, dtype=FP16),
    "head dimension 80": Case(dim=80),
    "head dimension 96": Case(dim=96),
    "head dimension 128": Case(dim=128),
    "head dimension 192": Case(dim=192),
    "head dimension 256": Case(dim=256),
    "fp16": Case(dtype=FP16, dim=128),
    "one KV head": Case(heads=8, kv_heads=1),
    "no grouping": Case(heads=3, kv_heads=3),
    "group of 3": Case(heads=6, kv_heads=2),
    "group of 6": Case(heads=6, kv_heads=1, dim=128),
    "group of 7": Case(heads=7, kv_heads=1),
    "group of 8": Case(heads=16, kv_heads=2),
    "batch": Case(batch=3, queries=200, keys=200),
    "one query": Case(queries=1),
    "one key": Case(queries=1, keys=1),
    "fewer queries": Case(queries=77, keys=500),
    "more queries": Case(queries=300, keys=211),
    "odd lengths": Case(queries=127, keys=127, window=31),
    "window 1": Case(window=1),
    "window K - 1": Case(window=299),
    "window K": Case(window=300),
    "window beyond K": Case(window=1000),
    "many epochs": Case(queries=3000, keys=3000, window=64),
    "wide window": Case(queries=2500, keys=2500, window=1024, dim=128),
    "sinks and recent keys": Case(keep_first=3, keep_recent=20),
    "recent keys beyond an epoch": Case(queries=900, keys=900, keep_recent=200, window=16),
    "left padding": Case(batch=2, padding="left"),
    "right padding": Case(batch=2, padding="right"),
    "scattered padding": Case(batch=2, padding="scattered", keep_recent=9, keep_first=2),
    "shared, causal": Case(mode="shared", is_causal=True),
    "shared": Case(mode="shared", is_causal=False),
    "shared, more queries": Case(mode="shared", is_causal=False, queries=400),
    "shared, recent keys": Case(mode="shared", is_causal=False, keep_recent=7, keep_first=2),
    "relu, causal": Case(mode="relu", is_causal=True),
    "relu": Case(mode="relu", is_causal=False),
    "no bias": Case(bias=None),
    "bias per head": Case(bias=(1, 4, 1, 300)),
    "bias for all heads": Case(bias=(1, 1, 1, 300), batch=2),
    "bf16 bias": Case(bias_dtype=BF16),
    "fp16 bias": Case(bias_dtype=FP16, dtype=FP16),
    "bias per pair": Case(bias=(1, 4, 300, 300)),
    "bias per pair, shared by heads": Case(bias=(1, 1, 300, 300), batch=2),
    "bias per pair, KV heads": Case(bias=(2, 2, 300, 300), batch=2, bias_dtype=BF16),
    "bias per query": Case(bias=(1, 4, 300, 1)),
    "one bias": Case(bias=(1, 1, 1, 1)),
    "softcap": Case(softcap=5.0),
    "softcap and pair bias": Case(softcap=2.0, bias=(1, 2, 300, 300)),
    "scale": Case(scale=0.3),
    "large scores": Case(pattern="large"),
    "hidden keys": Case(pattern="hidden"),
}
for _pattern in ("equal", "rising", "falling", "two levels", "AR(1)", "trend up", "95 values"):
    CASES[f"{_pattern} scores"] = Case(pattern=_pattern, queries=700, keys=700, dim=128)
CASES["trend down scores"] = replace(CASES["trend up scores"], pattern="trend down")


@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients(name):
    check(CASES[name])


LAYOUTS = {
    "transposed": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "sliced": lambda t: torch.cat([t, t], dim=-1)[..., t.shape[-1] :],
    "unaligned": lambda t: torch.cat([t[..., :1], t], dim=-1)[..., 1:],
    "last dimension strided": lambda t: torch.stack([t, t], dim=-1)[..., 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dim", [64, 96])
def test_strides(layout, dim):
    torch.manual_seed(0)
    plain = [torch.randn(2, 200, h, dim, device="cuda", dtype=BF16) for h in (4, 2, 2)]
    scores = torch.randn(2, 2, 200, device="cuda")
    grad = torch.randn_like(plain[0])

    def run(tensors, grad):
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = dynamic_mask_attn_func(*leaves, scores, 32, backend="triton")
        return [out, *torch.autograd.grad(out, leaves, grad)]

    moved = [LAYOUTS[layout](tensor) for tensor in plain]
    for got, want in zip(run(moved, LAYOUTS[layout](grad)), run(plain, grad), strict=True):
        assert_fair(got, want.double(), want)


@pytest.mark.parametrize("dim", [64, 128])
def test_gradient_of_a_sum_has_stride_0_and_is_not_copied(dim, monkeypatch, recordings):
    # The kernels by roles do not read it: without them the same ones serve both calls.
    monkeypatch.setattr(role_config, "KEPT_BYTES", 0)
    tensors = [
        torch.randn(1, 4096, h, dim, device="cuda", dtype=BF16, requires_grad=True)
        for h in (8, 1, 1)
    ]
    scores = torch.randn(1, 1, 4096, device="cuda")

    def peak(grad):
        out = dynamic_mask_attn_func(*tensors, scores, 64, backend="triton")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        grads = torch.autograd.grad(out, tensors, grad)
        return torch.cuda.max_memory_allocated() - before, grads

    ones = torch.ones_like(tensors[0])
    # The second call of a form is like all later ones.
    (_, _), (dense, want) = peak(ones), peak(ones)
    one = torch.ones((), device="cuda", dtype=BF16).expand_as(ones)
    (_, _), (expanded, got) = peak(one), peak(one)
    assert expanded <= dense + 4096
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("lengths", [(100, 0, 1, 300, 57), (1,), (0, 0, 5)])
@pytest.mark.parametrize("mode", ["causal", "shared"])
def test_packed_sequences_equal_single_ones(lengths, mode):
    torch.manual_seed(0)
    total = sum(lengths)
    borders = torch.tensor([0, *lengths]).cumsum(0).int().cuda()
    query, key, value = (
        torch.randn(total, h, 64, device="cuda", dtype=BF16, requires_grad=True) for h in (4, 2, 2)
    )
    scores = torch.randn(2, total, device="cuda", requires_grad=True)
    leaves = (query, key, value, scores)
    options = {"mode": mode, "backend": "triton", "keep_recent": 3}
    if mode == "shared":
        options["is_causal"] = True
    out = dynamic_mask_attn_varlen_func(
        *leaves, borders, borders, max(lengths), max(lengths), 24, **options
    )
    grad = torch.randn_like(out)
    got = [out, *torch.autograd.grad(out, leaves, grad)]
    parts = []
    for begin, end in zip(borders.tolist(), borders.tolist()[1:], strict=False):
        if begin < end:
            rows = [t[None, begin:end] for t in leaves[:3]]
            parts.append(
                dynamic_mask_attn_func(*rows, scores[None, :, begin:end], 24, **options)[0]
            )
    single = torch.cat(parts)
    want = [single, *torch.autograd.grad(single, leaves, grad)]
    for a, b in zip(got, want, strict=True):
        assert_fair(a, b.double(), b)


def test_nan_in_padding_does_not_leak():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 300, h, 64, device="cuda", dtype=BF16) for h in (4, 2, 2))
    scores = torch.randn(1, 2, 300, device="cuda")
    key_mask = torch.ones(1, 300, dtype=torch.bool, device="cuda")
    key_mask[:, 200:] = False

    def run(key, value):
        leaves = [t.detach().requires_grad_() for t in (query, key, value)]
        out = dynamic_mask_attn_func(*leaves, scores, 40, key_mask=key_mask, backend="triton")
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    want = run(key, value)
    key, value = key.clone(), value.clone()
    key[:, 200:] = torch.nan
    value[:, 200:] = torch.nan
    for got, expected in zip(run(key, value), want, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(("mode", "is_causal"), [("causal", None), ("relu", True)])
def test_later_tokens_change_nothing_before(mode, is_causal):
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 900, h, 64, device="cuda", dtype=BF16) for h in (4, 2, 2))
    scores = torch.randn(1, 2, 900, device="cuda")
    grad = torch.randn_like(query)

    def run(t, *tensors):
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = dynamic_mask_attn_func(*leaves, 64, mode=mode, is_causal=is_causal, backend="triton")
        early = grad.clone()
        early[:, t:] = 0
        return out[:, :t], torch.autograd.grad(out, leaves, early)

    for t in (1, 130, 511, 640, 899):
        want, want_grads = run(t, query, key, value, scores)
        changed = [x.clone() for x in (query, key, value, scores)]
        for x in changed[:3]:
            x[:, t:] = torch.randn_like(x[:, t:])
        changed[3][..., t:] = 10 * torch.randn_like(changed[3][..., t:])
        got, got_grads = run(t, *changed)
        assert torch.equal(got, want), t
        for name, a, b in zip("qkv", got_grads, want_grads, strict=False):
            assert torch.equal(a[:, :t], b[:, :t]), (t, name)
            assert not a[:, t:].any(), (t, name)
        assert torch.equal(got_grads[3][..., :t], want_grads[3][..., :t]), t
        assert not got_grads[3][..., t:].any()


def test_runs_repeat_bit_for_bit():
    tensors = [
        torch.randn(2, 1500, h, 128, device="cuda", dtype=BF16, requires_grad=True)
        for h in (8, 2, 2)
    ]
    scores = torch.randn(2, 2, 1500, device="cuda", requires_grad=True)
    leaves = [*tensors, scores]

    def run():
        out = dynamic_mask_attn_func(*leaves, 200, deterministic=True, backend="triton")
        return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    first = run()
    for _ in range(3):
        for a, b in zip(run(), first, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("asked", [[0], [1], [2], [3], [0, 2], []])
def test_only_the_gradients_asked_for(asked):
    tensors = [torch.randn(1, 300, h, 64, device="cuda", dtype=BF16) for h in (4, 2, 2)]
    tensors.append(torch.randn(1, 2, 300, device="cuda"))

    def run(asked):
        leaves = [t.detach().requires_grad_(i in asked) for i, t in enumerate(tensors)]
        out = dynamic_mask_attn_func(*leaves, 48, backend="triton")
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        grads = torch.autograd.grad(out, wanted, torch.ones_like(out)) if wanted else []
        return out, dict(zip(asked, grads, strict=True))

    out, grads = run(asked)
    want, all_grads = run([0, 1, 2, 3])
    assert torch.equal(out, want)
    for index, grad in grads.items():
        assert torch.equal(grad, all_grads[index])


@pytest.mark.parametrize("dim", [64, 128])
def test_changing_sizes_compiles_nothing(dim):
    from flash_sparse_attn.backends.triton import forward, grad_key, grad_query

    heads = (4, 2, 2)
    kernels = [forward.forward_kernel, grad_query.grad_query_kernel, grad_key.grad_key_kernel]
    if dim == 128:
        heads = (8, 2, 2)  # rows of keys begin at multiples of 4 whatever their length
        if role_config.roles_for("sm_90", dim) is not None:
            from flash_sparse_attn.backends.triton import (
                gluon_backward,
                gluon_forward,
                grad_product,
            )

            kernels += [gluon_forward.gluon_forward_kernel, gluon_backward.gluon_grad_key_kernel]
            kernels += [grad_product.delta_kernel, grad_product.product_kernel]

    def run(batch, length, window):
        tensors = [
            torch.randn(batch, length, h, dim, device="cuda", dtype=BF16, requires_grad=True)
            for h in heads
        ]
        scores = torch.randn(batch, 2, length, device="cuda", requires_grad=True)
        dynamic_mask_attn_func(*tensors, scores, window, backend="triton").sum().backward()

    def compiled():
        device = torch.cuda.current_device()
        return [len(kernel.device_caches[device][0]) for kernel in kernels]

    run(1, 300, 48)
    run(2, 1000, 100)
    before = compiled()
    sizes = ((1, 301, 7), (3, 1777, 333), (1, 16, 1), (2, 4096, 2048), (3, 4096, 300))
    for batch, length, window in sizes:  # the last keeps nothing of what rounding takes
        run(batch, length, window)
    assert compiled() == before
