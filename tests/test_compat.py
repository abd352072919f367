"""Programs written for the predecessors run as they stand, with the import names they use."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from compare import assert_fair

import flash_dmattn
import flash_dmattn.utils.mask
import flash_dmattn.utils.padding
import flash_sparse_attn
import flash_sparse_attn.compat
import flash_sparse_attn.utils.mask
import flash_sparse_attn.utils.padding
from flash_sparse_attn import flash_sparse_attn_func, get_available_backends, select_keys
from flash_sparse_attn.reference import attention_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Their programs ask for "cuda"; where that backend cannot run, for the best one that can.
BACKEND = "cuda" if "cuda" in get_available_backends() else None


def check_program(output, query, key, value, mask, bias, softmax_scale):
    """Output and gradients that a program left behind, against fp64 on the same inputs."""
    results = [output.detach(), query.grad, key.grad, value.grad, bias.grad]
    runs = []
    for dtype in (torch.float64, output.dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (query, key, value, bias)]
        out, _, _ = attention_reference(
            *leaves[:3], mask, leaves[3], softmax_scale=softmax_scale, is_causal=True
        )
        runs.append([out.detach(), *torch.autograd.grad(out.sum(), leaves)])
    truth, plain = runs
    for result, exact, fair, name in zip(results, truth, plain, ("out", *"qkvb"), strict=True):
        assert_fair(result, exact, fair, name)


def test_quick_start_of_flash_dmattn_1_0():
    """Float masks, `scale`, and the choice made with `torch.topk` by the program itself."""
    from flash_dmattn import flash_dmattn_func_auto

    batch_size, seq_len, num_heads, num_kv_heads, head_dim = 1, 256, 2, 1, 64
    keep_window_size = 128
    device = DEVICE
    dtype = torch.bfloat16
    min_dtype = torch.finfo(dtype).min

    query = torch.randn(batch_size, seq_len, num_heads, head_dim, device=device, dtype=dtype)
    key = torch.randn(batch_size, seq_len, num_kv_heads, head_dim, device=device, dtype=dtype)
    value = torch.randn(batch_size, seq_len, num_kv_heads, head_dim, device=device, dtype=dtype)
    full = (batch_size, num_kv_heads, seq_len, seq_len)
    attention_mask = torch.ones(full, device=device, dtype=dtype)
    attention_bias = torch.randn(full, device=device, dtype=dtype)

    if seq_len > keep_window_size:
        topk_values, topk_indices = torch.topk(
            attention_bias, keep_window_size, dim=-1, largest=True, sorted=False
        )
        valid_topk = (topk_values != min_dtype).to(dtype)
        attention_mask = torch.zeros_like(attention_bias)
        attention_mask = attention_mask.scatter(-1, topk_indices, valid_topk)
        attention_bias = attention_bias.masked_fill(attention_mask == 0.0, min_dtype)

    flash_dmattn_func = flash_dmattn_func_auto(backend=BACKEND)
    output = flash_dmattn_func(
        query=query,
        key=key,
        value=value,
        attn_mask=attention_mask,
        attn_bias=attention_bias,
        is_causal=True,
        scale=1.0 / math.sqrt(head_dim),
    )
    assert output.shape == (1, 256, 2, 64)

    for tensor in (query, key, value, attention_bias):
        tensor.requires_grad_(True)
    output = flash_dmattn_func(
        query=query,
        key=key,
        value=value,
        attn_mask=attention_mask,
        attn_bias=attention_bias,
        is_causal=True,
        scale=1.0 / math.sqrt(head_dim),
    )
    loss = output.sum()
    loss.backward()

    check_program(output, query, key, value, attention_mask == 1, attention_bias, head_dim**-0.5)


def test_quick_start_of_flash_dmattn_1_2_2():
    """A bias with one row per query, and `create_mask` without a mask: per query, over all keys."""
    from flash_dmattn import flash_dmattn_func_auto
    from flash_dmattn.utils.mask import create_mask

    batch_size, seq_len, num_heads, num_kv_heads, head_dim = 1, 256, 2, 1, 64
    window_size = 128
    device = DEVICE
    dtype = torch.bfloat16
    min_dtype = torch.finfo(dtype).min

    query = torch.randn(batch_size, seq_len, num_heads, head_dim, device=device, dtype=dtype)
    key = torch.randn(batch_size, seq_len, num_kv_heads, head_dim, device=device, dtype=dtype)
    value = torch.randn(batch_size, seq_len, num_kv_heads, head_dim, device=device, dtype=dtype)
    attn_bias = torch.randn(batch_size, num_kv_heads, seq_len, seq_len, device=device, dtype=dtype)

    if seq_len > window_size:
        attn_mask = create_mask(
            attention_bias=attn_bias,
            attention_mask=None,
            batch_size=batch_size,
            query_len=seq_len,
            key_len=seq_len,
            window_size=window_size,
            min_dtype=min_dtype,
        )

    flash_dmattn_func = flash_dmattn_func_auto(backend=BACKEND)
    for tensor in (query, key, value, attn_bias):
        tensor.requires_grad_(True)
    output = flash_dmattn_func(
        query=query,
        key=key,
        value=value,
        attn_mask=attn_mask,
        attn_bias=attn_bias,
        is_causal=True,
        softmax_scale=1.0 / math.sqrt(head_dim),
    )
    loss = output.sum()
    loss.backward()

    assert attn_mask.shape == (1, 1, 256, 256) and (attn_mask.sum(-1) == 128).all()
    check_program(output, query, key, value, attn_mask, attn_bias, head_dim**-0.5)


def test_quick_start_of_flash_sparse_attn_1_2():
    """A bias per key, and `create_mask` without a mask: one choice for all queries."""
    from flash_sparse_attn import flash_sparse_attn_func_auto
    from flash_sparse_attn.utils.mask import create_mask

    batch_size, seq_len, num_heads, num_kv_heads, head_dim = 1, 256, 2, 1, 64
    window_size = 128
    device = DEVICE
    dtype = torch.bfloat16
    min_dtype = torch.finfo(dtype).min

    query = torch.randn(batch_size, seq_len, num_heads, head_dim, device=device, dtype=dtype)
    key = torch.randn(batch_size, seq_len, num_kv_heads, head_dim, device=device, dtype=dtype)
    value = torch.randn(batch_size, seq_len, num_kv_heads, head_dim, device=device, dtype=dtype)
    attn_bias = torch.randn(batch_size, num_kv_heads, 1, seq_len, device=device, dtype=dtype)

    if seq_len > window_size:
        attn_mask = create_mask(
            attention_bias=attn_bias,
            attention_mask=None,
            batch_size=batch_size,
            query_len=seq_len,
            key_len=seq_len,
            window_size=window_size,
            min_dtype=min_dtype,
        )

    flash_sparse_attn_func = flash_sparse_attn_func_auto(backend=BACKEND)
    for tensor in (query, key, value, attn_bias):
        tensor.requires_grad_(True)
    output = flash_sparse_attn_func(
        query=query,
        key=key,
        value=value,
        attn_mask=attn_mask,
        attn_bias=attn_bias,
        is_causal=True,
        softmax_scale=1.0 / math.sqrt(head_dim),
    )
    loss = output.sum()
    loss.backward()

    assert attn_mask.shape == (1, 1, 1, 256) and attn_mask.sum() == 128
    check_program(output, query, key, value, attn_mask, attn_bias, head_dim**-0.5)


def test_the_troubleshooting_call_with_short_names():
    query, key, value = inputs()
    expected = flash_sparse_attn_func(query, key, value, is_causal=True)
    for function in (flash_dmattn.flash_dmattn_func, flash_dmattn.flash_dmattn_func_auto()):
        assert torch.equal(function(q=query, k=key, v=value, is_causal=True), expected)
        assert torch.equal(function(query, k=key, value=value, is_causal=True), expected)
        assert torch.equal(function(query, key, value, is_causal=True), expected)


def inputs():
    # Kernels on a GPU take 16-bit inputs.
    dtype = torch.float16 if DEVICE.type == "cuda" else torch.float32
    shapes = ((2, 9, 4, 8), (2, 9, 2, 8), (2, 9, 2, 8))
    return [torch.randn(shape, dtype=dtype, device=DEVICE) for shape in shapes]


def test_both_names_of_the_scale_mean_the_same():
    query, key, value = inputs()
    expected = flash_sparse_attn_func(query, key, value, softmax_scale=0.3)
    assert torch.equal(flash_dmattn.flash_dmattn_func(query, key, value, scale=0.3), expected)
    by_new = flash_dmattn.flash_dmattn_func(query, key, value, softmax_scale=0.3)
    assert torch.equal(by_new, expected)
    assert torch.equal(flash_dmattn.flash_dmattn_func(query, key, value, None, None, 0.3), expected)
    none = flash_dmattn.flash_dmattn_func(query, key, value, scale=None)
    assert torch.equal(none, flash_sparse_attn_func(query, key, value))


@pytest.mark.parametrize(
    ("args", "kwargs", "names"),
    [
        (3, {"scale": 0.3, "softmax_scale": 0.3}, ["scale", "softmax_scale"]),
        (3, {"q": 0}, ["q", "query"]),
        (2, {"k": 1, "value": 2}, ["k", "key"]),
        (2, {"v": 2, "value": 2}, ["v", "value"]),
    ],
)
def test_an_argument_under_both_names_is_an_error(args, kwargs, names):
    tensors = inputs()
    given = {k: tensors[v] if isinstance(v, int) else v for k, v in kwargs.items()}
    with pytest.raises(TypeError, match=f"^{names[0]}: expected .*{names[1]}.*got both"):
        flash_dmattn.flash_dmattn_func(*tensors[:args], **given)
    with pytest.raises(TypeError, match=r"^scale: expected .*softmax_scale.*got both"):
        flash_dmattn.flash_dmattn_func(*tensors, None, None, 0.3, scale=0.3)


def test_present_functions_do_not_take_old_names():
    query, key, value = inputs()
    with pytest.raises(TypeError, match="scale"):
        flash_sparse_attn_func(query, key, value, scale=0.3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_float_masks_of_zeros_and_ones(dtype):
    query, key, value = inputs()
    visible = torch.rand(2, 2, 9, 9, device=DEVICE) < 0.5
    expected = flash_sparse_attn_func(query, key, value, visible)
    for mask in (visible, visible.to(dtype)):
        for out in (
            flash_dmattn.flash_dmattn_func(query, key, value, mask),
            flash_dmattn.flash_dmattn_func(query, key, value, attn_mask=mask),
            flash_dmattn.flash_dmattn_func_auto()(query, key, value, mask),
        ):
            assert torch.equal(out, expected)
    signed_zeros = visible.to(dtype).masked_fill(~visible, -0.0)
    assert torch.equal(flash_dmattn.flash_dmattn_func(query, key, value, signed_zeros), expected)


@pytest.mark.parametrize("bad", [-1.0, 0.5, 2.0, -math.inf, math.inf, math.nan])
def test_other_float_masks_are_refused(bad):
    query, key, value = inputs()
    mask = torch.ones(1, 1, 9, 9, device=DEVICE)
    mask[0, 0, 3, 4] = bad
    with pytest.raises(ValueError, match=r"^attn_mask: expected.*1.*0.*got .*attn_bias"):
        flash_dmattn.flash_dmattn_func(query, key, value, mask)
    # An additive mask must not be read the wrong way round.
    with pytest.raises(ValueError, match="attn_bias"):
        flash_dmattn.flash_dmattn_func(query, key, value, (mask - 1) * 1e4)


def test_integer_masks_are_still_refused():
    query, key, value = inputs()
    with pytest.raises(TypeError, match=r"^attn_mask: expected torch.bool.*int64"):
        flash_dmattn.flash_dmattn_func(
            query, key, value, torch.ones(1, 1, 9, 9, dtype=torch.int64, device=DEVICE)
        )


def test_old_functions_take_selections():
    query, key, value = inputs()
    selection = select_keys(torch.randn(2, 2, 9, device=DEVICE), 3)
    out = flash_dmattn.flash_dmattn_func(query, key, value, selection, scale=0.4)
    assert torch.equal(out, flash_sparse_attn_func(query, key, value, selection, softmax_scale=0.4))


def test_probabilities_come_as_a_third_result():
    query, key, value = inputs()
    out, lse, probs = flash_dmattn.flash_dmattn_func(query, key, value, return_attn_probs=True)
    assert out.shape == (2, 9, 4, 8) and lse.shape == (2, 4, 9) and probs.shape == (2, 4, 9, 9)


def test_packed_sequences_under_the_old_name():
    query, key, value = (t.flatten(0, 1) for t in inputs())
    borders = torch.tensor([0, 9, 18], dtype=torch.int32, device=DEVICE)
    arguments = (borders, borders, 9, 9)
    out = flash_dmattn.flash_dmattn_varlen_func(
        q=query, k=key, v=value, cu_seqlens_q=borders, cu_seqlens_k=borders,
        max_seqlen_q=9, max_seqlen_k=9, scale=0.3, is_causal=True,
    )  # fmt: skip
    expected = flash_sparse_attn_func(
        *(t.unflatten(0, (2, 9)) for t in (query, key, value)), softmax_scale=0.3, is_causal=True
    )
    torch.testing.assert_close(out.unflatten(0, (2, 9)), expected)
    masked = flash_dmattn.flash_dmattn_varlen_func(
        query, key, value, *arguments, attn_mask=torch.ones(18, device=DEVICE), scale=0.3
    )
    assert torch.equal(
        masked, flash_dmattn.flash_dmattn_varlen_func(query, key, value, *arguments, scale=0.3)
    )


class Recorder:
    """Stands for `flash_sparse_attn_func`: remembers what it is called with."""

    def __call__(self, query, key, value, attn_mask=None, attn_bias=None, **options):
        self.tensors, self.options = (query, key, value, attn_mask, attn_bias), options
        return query


@pytest.mark.parametrize("backend", ["triton", "flex"])
def test_the_argument_order_of_the_backend_functions(backend, monkeypatch):
    """Causality before the scale, unlike everywhere else; the backend is the named one."""
    recorder = Recorder()
    monkeypatch.setattr(flash_sparse_attn.compat, "flash_sparse_attn_func", recorder)
    present = getattr(flash_sparse_attn.compat, f"{backend}_sparse_attn_func")
    old = getattr(flash_dmattn, f"{backend}_dmattn_func")
    query, key, value = inputs()
    mask = torch.ones(1, 1, 9, 9, dtype=torch.bool, device=DEVICE)
    bias = torch.zeros(1, 1, 9, 9, device=DEVICE)
    for function in (present, old):
        function(query, key, value, mask, bias, True, 0.3)
        assert recorder.tensors == (query, key, value, mask, bias)
        assert recorder.options == {"is_causal": True, "softmax_scale": 0.3, "backend": backend}
        function(query, key, value, is_causal=False)
        assert recorder.options["is_causal"] is False and recorder.options["softmax_scale"] is None
        with pytest.raises(TypeError, match=r"is_causal: expected True or False.*0\.3.*scale"):
            function(query, key, value, mask, bias, 0.3, True)
    old(q=query, k=key, v=value, attn_mask=mask.float(), scale=0.3)
    assert torch.equal(recorder.tensors[3], mask)
    assert recorder.options == {
        "is_causal": backend == "flex",
        "softmax_scale": 0.3,
        "backend": backend,
    }


@pytest.mark.parametrize("backend", ["triton", "flex"])
def test_the_backend_functions_never_fall_back(backend):
    if backend in get_available_backends():
        pytest.skip(f"the {backend} backend runs here")
    query, key, value = inputs()
    for function in (
        getattr(flash_sparse_attn.compat, f"{backend}_sparse_attn_func"),
        getattr(flash_dmattn, f"{backend}_dmattn_func"),
    ):
        with pytest.raises(RuntimeError, match=backend):
            function(query, key, value)


@pytest.mark.parametrize("module", [flash_dmattn, flash_sparse_attn])
def test_availability_flags(module):
    available = get_available_backends()
    for name in ("cuda", "triton", "flex"):
        assert getattr(module, f"{name.upper()}_AVAILABLE") is (name in available)
    with pytest.raises(AttributeError, match=f"module '{module.__name__}' has no attribute 'METAL"):
        _ = module.METAL_AVAILABLE


def test_the_old_auto_function():
    with pytest.raises(ValueError, match="metal"):
        flash_dmattn.flash_dmattn_func_auto("metal")
    for name in {"cuda", "triton", "flex"} - set(get_available_backends()):
        with pytest.raises(RuntimeError, match=name):
            flash_dmattn.flash_dmattn_func_auto(backend=name)
    assert flash_dmattn.get_available_backends() == get_available_backends()


def test_the_old_import_paths_lead_to_the_present_functions():
    for module in ("mask", "padding"):
        old = getattr(flash_dmattn.utils, module)
        present = getattr(flash_sparse_attn.utils, module)
        for name in old.__all__:
            assert getattr(old, name) is getattr(present, name)
    assert {"create_mask", "topk_mask", "relu_mask", "block_smooth", "topk_indices"} == set(
        flash_dmattn.utils.mask.__all__
    )
    for name in flash_dmattn.__all__:
        assert hasattr(flash_dmattn, name)
    for name in ("triton_sparse_attn_func", "flex_sparse_attn_func"):
        assert getattr(flash_sparse_attn, name) is getattr(flash_sparse_attn.compat, name)


def test_old_functions_keep_their_signatures_and_documentation():
    assert flash_dmattn.flash_dmattn_func.__doc__ == flash_sparse_attn_func.__doc__


@pytest.mark.parametrize("module", ["flash_dmattn", "flash_dmattn.utils.mask"])
def test_importing_the_alias_imports_no_heavy_package(module):
    program = (
        f"import sys, {module}\nsys.exit(bool({{'triton', 'transformers'}} & set(sys.modules)))"
    )
    path = [*sys.path]
    subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:] = {path!r}\n{program}"], check=True
    )
