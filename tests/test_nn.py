"""`DynamicMaskAttention`: its scores bit by bit, and the same text in every way it can be fed."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from compare import assert_fair
from oracles import visible_keys
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from flash_sparse_attn import DynamicMaskAttention
from flash_sparse_attn.reference import attention_reference

# What no kernel takes, such as fp32, runs on the eager backend, which warns on a GPU.
pytestmark = pytest.mark.filterwarnings("ignore:attention runs on the eager backend")

HIDDEN, HEADS, WINDOW, LENGTH = 24, 4, 6, 40


def make_layer(
    hidden_size=HIDDEN, window_size=WINDOW, device="cpu", dtype=torch.float32, **options
):
    """A layer whose scores differ from key to key, as after some training."""
    torch.manual_seed(0)
    options = {"num_kv_heads": 2, "rope_theta": 100.0, **options}
    layer = DynamicMaskAttention(hidden_size, HEADS, window_size, **options)
    with torch.no_grad():
        layer.A.copy_(torch.linspace(2.0, -3.0, layer.num_kv_heads))
        if layer.score_activation == "exp":  # biases of ordinary size
            layer.A.mul_(0.2)
        layer.dt_proj.weight.mul_(5.0)
    return layer.to(device, dtype)


def make_hidden(batch=2, length=LENGTH, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, length, HIDDEN, generator=generator).to(device, dtype)


def projections(layer: DynamicMaskAttention, hidden: torch.Tensor) -> list[torch.Tensor]:
    """Query, key and value, ``[B, S, heads, D]``, before normalisation and rotation."""
    return [
        project(hidden).unflatten(-1, (-1, layer.head_dim))
        for project in (layer.q_proj, layer.k_proj, layer.v_proj)
    ]


def plain_forward(layer: DynamicMaskAttention, hidden: torch.Tensor, **masking) -> torch.Tensor:
    """The definition, with the dense mask of the oracle, in the dtype of `layer` and `hidden`."""
    scores = layer.scores(hidden)
    visible = visible_keys(scores.detach(), layer.window_size, "causal", **masking)
    query, key, value = projections(layer, hidden)
    logits = layer.dt_proj(value.flatten(-2)).transpose(1, 2)
    bias = layer.A[:, None] * F.softplus(logits)
    if layer.score_activation == "exp":
        bias = bias.exp()
    if layer.qk_norm:
        query, key = layer.q_norm(query), layer.k_norm(key)
    if layer.rope_theta is not None:
        query, key = (_complex_rope(x, layer.rope_theta) for x in (query, key))
    out, _, _ = attention_reference(query, key, value, visible, bias[:, :, None])
    return layer.o_proj(out.flatten(-2))


def _complex_rope(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary embedding as a product of complex numbers, positions from 0."""
    half = x.shape[-1] // 2
    frequency = torch.tensor([theta ** (-d / half) for d in range(half)], dtype=x.dtype)
    angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None, None] * frequency
    rotated = torch.complex(x[..., :half], x[..., half:]) * torch.polar(
        torch.ones_like(angle), angle
    )
    return torch.cat([rotated.real, rotated.imag], dim=-1)


OPTIONS = [
    {},
    {"rope_theta": None},
    {"qk_norm": True, "bias": True},
    {"score_activation": "exp"},
    {"num_kv_heads": 4, "head_dim": 10},
    {"num_kv_heads": 1, "keep_first": 2, "keep_recent": 3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_forward_and_gradients_are_the_definition(options):
    layer, hidden = make_layer(**options), make_hidden().requires_grad_()
    keep = {name: options[name] for name in ("keep_first", "keep_recent") if name in options}
    exact, exact_hidden = copy.deepcopy(layer).double(), hidden.detach().double().requires_grad_()
    truth = plain_forward(exact, exact_hidden, **keep)
    plain = plain_forward(layer, hidden, **keep)
    out = layer(hidden)
    assert_fair(out, truth, plain)

    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    names, parameters = zip(*layer.named_parameters(), strict=True)
    leaves = [hidden, *parameters]
    truths = torch.autograd.grad(truth, [exact_hidden, *exact.parameters()], upstream.double())
    plains = torch.autograd.grad(plain, leaves, upstream)
    results = torch.autograd.grad(out, leaves, upstream)
    for name, result, true, fair in zip(("hidden", *names), results, truths, plains, strict=True):
        # k_proj.bias shifts all logits of a row alike unless positions rotate it.
        assert result.any() or name == "k_proj.bias", name
        assert_fair(result, true, fair, name)


@pytest.mark.parametrize("hidden_size", [1, 2, 24, 100, 129])
@pytest.mark.parametrize("score_activation", ["softplus", "exp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_have_the_same_bits_in_every_chunk(dtype, score_activation, hidden_size, device):
    layer = make_layer(
        hidden_size, head_dim=6, bias=True, score_activation=score_activation, device=device
    ).to(dtype)
    length = 2048
    hidden = torch.randn(2, length, hidden_size, dtype=dtype).to(device)
    whole = layer.scores(hidden)
    assert whole.dtype == torch.float32 and whole.shape == (2, 2, length)
    assert whole.unique().numel() > 1000 or hidden_size == 1 or dtype == torch.bfloat16
    for size in (1, 7, 2048):
        chunks = [layer.scores(chunk) for chunk in hidden.split(size, dim=1)]
        assert torch.equal(torch.cat(chunks, dim=-1), whole)
    assert torch.equal(layer.scores(hidden[1:]), whole[1:])
    assert torch.equal(layer.scores(hidden[0]), whole[0])
    padded = F.pad(hidden, (3, 5))[..., 3:-5]
    assert not padded.is_contiguous() and torch.equal(layer.scores(padded), whole)


def test_scores_do_not_depend_on_where_memory_is_cut(monkeypatch):
    layer, hidden = make_layer(), make_hidden(length=100)
    whole = layer.scores(hidden)
    for products in (1, 100, 1000):
        monkeypatch.setattr("flash_sparse_attn.scores._PRODUCTS_ON_CPU", products)
        assert torch.equal(layer.scores(hidden), whole)


def test_scores_are_the_folded_projections():
    layer, hidden = make_layer(bias=True), make_hidden()
    exact = copy.deepcopy(layer).double()
    logits = exact.dt_proj(exact.v_proj(hidden.double())).transpose(1, 2)
    truth = exact.A[:, None] * F.softplus(logits)
    assert (layer.scores(hidden) - truth).abs().max() < 1e-5 * truth.abs().max()


def test_scores_stay_exact_under_autocast(device):
    layer, hidden = make_layer(device=device, bias=True), make_hidden(device=device)
    scores = layer.scores(hidden)
    expected = torch.autograd.grad(scores.square().sum(), layer.parameters(), allow_unused=True)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        scores_again = layer.scores(hidden)
        out = layer(hidden)
    assert torch.equal(scores, scores_again)
    got = torch.autograd.grad(scores_again.square().sum(), layer.parameters(), allow_unused=True)
    assert out.dtype == torch.bfloat16
    for gradient, other in zip(got, expected, strict=True):
        assert gradient is other is None or torch.equal(gradient, other)


@pytest.mark.parametrize("exponential", [False, True])
def test_gradient_of_the_scores(exponential):
    """Against autograd through the plain formula; logits of exactly 0 included."""
    layer = make_layer(bias=True, score_activation="exp" if exponential else "softplus")
    with torch.no_grad():
        layer.dt_proj.weight[0].zero_()
        layer.dt_proj.bias[0].zero_()
    exact, hidden = copy.deepcopy(layer).double(), make_hidden()
    upstream = torch.randn(2, 2, LENGTH)
    logits = exact.dt_proj(exact.v_proj(hidden.double())).transpose(1, 2)
    plain = exact.A[:, None] * F.softplus(logits)
    (plain.exp() if exponential else plain).backward(upstream.double())
    layer.scores(hidden).backward(upstream)
    for name in ("A", "dt_proj.weight", "dt_proj.bias", "v_proj.weight", "v_proj.bias"):
        result, truth = layer.get_parameter(name).grad, exact.get_parameter(name).grad
        assert truth.any()
        torch.testing.assert_close(result.double(), truth, atol=1e-4, rtol=1e-4, msg=name)


def test_score_operator_is_well_formed():
    hidden = make_hidden().requires_grad_()
    shapes = ((12, HIDDEN), (12,), (2, 12), (2,), (2,))
    layers = [torch.randn(shape, requires_grad=True) for shape in shapes]
    biasless = [layers[0], None, layers[2], None, layers[4]]
    operator = torch.ops.flash_sparse_attn.key_scores.default
    for exponential, given in ((False, layers), (True, layers), (False, biasless)):
        torch.library.opcheck(operator, (hidden, *given, exponential))
    frozen = [hidden.detach(), *layers[:2], *(one.detach() for one in layers[2:])]
    torch.library.opcheck(operator, (*frozen, False))
    _, logit = operator(hidden, *layers, False)
    needs = [True, False, True, True, False, True]
    call = (torch.randn_like(logit), hidden, *layers, logit, False, needs)
    torch.library.opcheck(
        torch.ops.flash_sparse_attn.key_scores_backward.default,
        [one.detach() if isinstance(one, torch.Tensor) else one for one in call],
    )


class Seen(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("activation", ["softplus", "exp"])
def test_scores_have_the_same_bits_whoever_looks(activation):
    """Those who look at operators see one; the others are spared what it costs."""
    layer, hidden = make_layer(score_activation=activation), make_hidden().requires_grad_()
    seen = Seen()
    with seen:
        watched = layer.scores(hidden)
    assert "flash_sparse_attn::key_scores" in seen.names
    scores = layer.scores(hidden)
    assert torch.equal(scores, watched) and scores.grad_fn.name() != watched.grad_fn.name()
    leaves = [hidden, layer.A, layer.dt_proj.weight, layer.v_proj.weight]
    upstream = torch.randn_like(scores)
    for got, want in zip(
        torch.autograd.grad(scores, leaves, upstream),
        torch.autograd.grad(watched, leaves, upstream),
        strict=True,
    ):
        assert torch.equal(got, want)


def test_an_untrained_layer_is_a_sliding_window():
    layer, hidden = DynamicMaskAttention(HIDDEN, HEADS, WINDOW), make_hidden()
    assert not layer.scores(hidden).any()
    index = torch.arange(LENGTH)
    window = (index <= index[:, None]) & (index > index[:, None] - WINDOW)
    out, _, _ = attention_reference(*projections(layer, hidden), window[None, None])
    torch.testing.assert_close(layer(hidden), layer.o_proj(out.flatten(-2)), atol=1e-6, rtol=1e-5)
    layer(hidden).square().sum().backward()
    assert layer.A.grad.all()


def test_learning_moves_the_choice():
    """From the sliding window of the start, gradients alone reach A first and dt_proj then."""
    layer, hidden = DynamicMaskAttention(HIDDEN, HEADS, WINDOW, num_kv_heads=2), make_hidden()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        (layer(hidden) - hidden.roll(20, 1)).square().mean().backward()
        optimizer.step()
    for name, parameter in layer.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    assert layer.scores(hidden).unique().numel() > 1


@pytest.mark.parametrize("sizes", [[1], [7], [1, 5], [LENGTH]])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"qk_norm": True, "keep_first": 2, "keep_recent": 3},
        {"softmax_scale": 0.3, "softcap": 2.0},
    ],
    ids=str,
)
def test_decoding_is_the_full_forward(options, sizes):
    layer, hidden = make_layer(**options), make_hidden()
    whole = layer(hidden)
    cache = layer.make_cache(2)
    begin, outs = 0, []
    with torch.no_grad():
        while begin < LENGTH:
            for size in sizes:
                outs.append(layer(hidden[:, begin : begin + size], cache=cache))
                begin += size
    torch.testing.assert_close(torch.cat(outs, dim=1), whole, atol=2e-6, rtol=1e-5)
    assert cache.seen_tokens.tolist() == [LENGTH, LENGTH]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cached", [False, True])
def test_padding_does_not_matter(cached, side):
    layer, hidden = make_layer(keep_first=1, keep_recent=2), make_hidden()
    lengths = torch.tensor([[17], [LENGTH]])
    index = torch.arange(LENGTH)
    mask = index < lengths if side == "right" else index >= LENGTH - lengths
    hidden[~mask] = 1e3
    if cached:
        cache = layer.make_cache(2)
        pieces = zip(hidden.split(9, 1), mask.split(9, 1), strict=True)
        out = torch.cat([layer(h, key_mask=m, cache=cache) for h, m in pieces], dim=1)
        assert cache.seen_tokens.tolist() == [17, LENGTH]
    else:
        out = layer(hidden, key_mask=mask)
    for row in range(2):
        alone = layer(hidden[row, mask[row]][None])[0]
        torch.testing.assert_close(out[row, mask[row]], alone, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("rank", [2, 3])
def test_packed_sequences_are_separate(rank):
    layer = make_layer(keep_first=1, keep_recent=1)
    lengths = [13, 0, 1, 20, 6]
    hidden = make_hidden(batch=1, length=sum(lengths))[0]
    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    given = hidden if rank == 2 else hidden[None]
    out = layer(given, cu_seqlens=borders)
    assert out.shape == given.shape
    separate = torch.cat([layer(part[None])[0] for part in hidden.split(lengths) if len(part)])
    torch.testing.assert_close(out.view_as(separate), separate, atol=2e-6, rtol=1e-5)


def test_positions_may_be_given():
    layer, hidden = make_layer(), make_hidden()
    out = layer(hidden)
    index = torch.arange(LENGTH)
    for position_ids in (index[None], index.expand(2, -1), index[None] + 1000):
        moved = layer(hidden, position_ids=position_ids)
        torch.testing.assert_close(moved, out, atol=1e-4, rtol=1e-4)  # rotation is relative
    assert not torch.allclose(layer(hidden, position_ids=2 * index[None]), out, atol=1e-3)
    borders = torch.tensor([0, 10, LENGTH], dtype=torch.int32)
    packed = layer(hidden[:1], cu_seqlens=borders)
    ids = torch.cat([torch.arange(10), torch.arange(LENGTH - 10)])
    for position_ids in (ids, ids[None]):
        given = layer(hidden[:1], cu_seqlens=borders, position_ids=position_ids)
        assert torch.equal(given, packed)


@pytest.mark.parametrize("how", ["whole", "packed", "cached"])
def test_no_later_token_changes_an_earlier_row(how):
    layer = make_layer(keep_recent=1)
    hidden = make_hidden(batch=1)

    def run(x):
        if how == "whole":
            return layer(x)
        if how == "packed":
            return layer(x, cu_seqlens=torch.tensor([0, 30, LENGTH], dtype=torch.int32))
        cache = layer.make_cache(1)
        return torch.cat([layer(part, cache=cache) for part in x.split(7, 1)], dim=1)

    with torch.no_grad():
        out = run(hidden)
        for changed in (1, 13, LENGTH - 1):
            other = hidden.clone()
            other[:, changed:] = 3 - 2 * other[:, changed:]
            out_again = run(other)
            assert torch.equal(out_again[:, :changed], out[:, :changed])
            assert not torch.equal(out_again[:, changed:], out[:, changed:])


@pytest.mark.parametrize("mode", ["shared", "relu"])
def test_other_modes(mode):
    layer, hidden = make_layer(mode=mode, is_causal=True, rope_theta=None), make_hidden()
    visible = visible_keys(layer.scores(hidden), WINDOW, mode, is_causal=True)
    bias = layer.scores(hidden)[:, :, None]
    out, _, _ = attention_reference(*projections(layer, hidden), visible, bias)
    torch.testing.assert_close(layer(hidden), layer.o_proj(out.flatten(-2)), atol=2e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="mode: a WindowCache serves 'causal' only"):
        layer.make_cache(2)
    with pytest.raises(ValueError, match="cache: expected one for"):
        layer(hidden, cache=make_layer().make_cache(2))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_bits(reentrant):
    layer, hidden = make_layer(qk_norm=True), make_hidden().requires_grad_()
    leaves = [hidden, *layer.parameters()]

    def gradients(out):
        for leaf in leaves:
            leaf.grad = None
        out.square().sum().backward()
        return [leaf.grad for leaf in leaves]

    expected = gradients(layer(hidden))
    got = gradients(checkpoint(layer, hidden, use_reentrant=reentrant))
    for gradient, other in zip(got, expected, strict=True):
        assert torch.equal(gradient, other)


def test_state_dict_and_copies():
    layer, hidden = make_layer(qk_norm=True, bias=True), make_hidden()
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other = DynamicMaskAttention(
        HIDDEN, HEADS, WINDOW, num_kv_heads=2, rope_theta=100.0, qk_norm=True, bias=True
    )
    other.load_state_dict(torch.load(buffer))
    assert torch.equal(other(hidden), layer(hidden))
    assert torch.equal(copy.deepcopy(layer)(hidden), layer(hidden))
    assert set(layer.state_dict()) == {
        "A",
        "q_norm.weight",
        "k_norm.weight",
        *(f"{p}_proj.{w}" for p in ("q", "k", "v", "o", "dt") for w in ("weight", "bias")),
    }
    assert "window_size=6" in repr(layer) and "rope_theta=100.0" in repr(layer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype, device):
    layer, hidden = make_layer(dtype=dtype, device=device), make_hidden(dtype=dtype, device=device)
    out = layer(hidden)
    assert out.dtype == dtype and out.isfinite().all()
    cache = layer.make_cache(2)
    assert cache.key.dtype == dtype
    with torch.no_grad():
        steps = [layer(part, cache=cache) for part in hidden.split(9, 1)]
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float64: 1e-6}[dtype]
    torch.testing.assert_close(torch.cat(steps, 1), out, atol=tolerance, rtol=tolerance)


def test_autocast_with_a_cache():
    layer, hidden = make_layer(qk_norm=True), make_hidden()
    cache = layer.make_cache(2, dtype=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        whole = layer(hidden)
        steps = torch.cat([layer(part, cache=cache) for part in hidden.split(9, 1)], dim=1)
    torch.testing.assert_close(steps, whole, atol=2e-2, rtol=2e-2)


def test_a_named_backend_is_used_or_refused():
    hidden = make_hidden()
    assert torch.equal(make_layer(backend="eager")(hidden), make_layer()(hidden))
    with pytest.raises(ValueError, match="backend: expected one of"):
        make_layer(backend="none such")(hidden)
    refused = make_layer(backend="none such")
    with pytest.raises(ValueError, match="backend: expected one of"):
        refused(hidden, cache=refused.make_cache(2))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden_size": 0}, ValueError, "hidden_size: expected at least 1, got 0"),
        ({"num_heads": 0}, ValueError, "num_heads: expected at least 1"),
        ({"num_heads": 5}, ValueError, "head_dim: expected a value, because num_heads = 5"),
        ({"window_size": 0}, ValueError, "window_size: expected at least 1"),
        ({"window_size": 2.0}, TypeError, "window_size: expected an int"),
        (
            {"num_kv_heads": 3},
            ValueError,
            "num_kv_heads: expected a divisor of num_heads = 4, got 3",
        ),
        ({"num_kv_heads": 0}, ValueError, "num_kv_heads: expected at least 1"),
        ({"head_dim": 300}, ValueError, "head_dim: expected at most 256"),
        ({"head_dim": 5, "rope_theta": 1e4}, ValueError, "rope_theta: expected .* even head_dim"),
        ({"rope_theta": 0.0}, ValueError, "rope_theta: expected a positive base"),
        ({"score_activation": "relu"}, ValueError, "score_activation: expected softplus or exp"),
        ({"mode": "topk"}, ValueError, "mode: expected one of causal, shared, relu"),
        ({"mode": "shared"}, ValueError, "is_causal: expected True or False with mode='shared'"),
        ({"is_causal": False}, ValueError, "is_causal: expected None or True with mode='causal'"),
        ({"keep_first": -1}, ValueError, "keep_first: expected at least 0"),
        ({"keep_recent": 0.5}, TypeError, "keep_recent: expected an int"),
        ({"softcap": -1.0}, ValueError, "softcap: expected"),
        ({"dropout": 0.1}, TypeError, "unknown arguments .'dropout'."),
    ],
)
def test_bad_construction(changes, error, message):
    good = {"hidden_size": HIDDEN, "num_heads": HEADS, "window_size": WINDOW}
    with pytest.raises(error, match=message):
        DynamicMaskAttention(**{**good, **changes})


BORDERS = torch.tensor([0, LENGTH], dtype=torch.int32)
MASK = torch.ones(2, LENGTH, dtype=torch.bool)


@pytest.mark.parametrize(
    ("shape", "options", "error", "message"),
    [
        (
            (2, LENGTH, 23),
            {},
            ValueError,
            "hidden_states: expected .B, S, hidden_size. .* = 24, got",
        ),
        ((LENGTH, HIDDEN), {}, ValueError, "hidden_states: .* goes with cu_seqlens"),
        ((1, 2, LENGTH, HIDDEN), {}, ValueError, "hidden_states: expected"),
        (
            (2, LENGTH, HIDDEN),
            {"cu_seqlens": BORDERS},
            ValueError,
            "hidden_states: expected .T, hid",
        ),
        ((LENGTH, HIDDEN), {"cu_seqlens": BORDERS - 1}, ValueError, "cu_seqlens: expected borders"),
        (
            (LENGTH, HIDDEN),
            {"cu_seqlens": BORDERS.long()},
            TypeError,
            "cu_seqlens: expected torch.int32",
        ),
        (
            (1, LENGTH, HIDDEN),
            {"cu_seqlens": BORDERS, "key_mask": MASK[:1]},
            ValueError,
            "cu_seqlens: expected neither",
        ),
        ((2, LENGTH, HIDDEN), {"key_mask": MASK[:, 1:]}, ValueError, "key_mask: expected"),
        (
            (2, LENGTH, HIDDEN),
            {"key_mask": MASK.float()},
            TypeError,
            "key_mask: expected torch.bool",
        ),
        (
            (2, LENGTH, HIDDEN),
            {"position_ids": MASK[:, 1:].long()},
            ValueError,
            "position_ids: expected integers",
        ),
        (
            (2, LENGTH, HIDDEN),
            {"position_ids": MASK.float()},
            ValueError,
            "position_ids: expected integers",
        ),
    ],
)
def test_bad_input(shape, options, error, message):
    with pytest.raises(error, match=message):
        make_layer()(torch.zeros(shape), **options)


def test_a_cache_of_another_layer_is_refused():
    layer, hidden = make_layer(keep_first=1), make_hidden()
    for cache in (
        make_layer().make_cache(2),
        make_layer(keep_first=1, window_size=7).make_cache(2),
        layer.make_cache(3),
    ):
        with pytest.raises(ValueError, match=r"cache: expected one for .* use make_cache"):
            layer(hidden, cache=cache)
    with pytest.raises(ValueError, match=r"key: expected .* as in the cache"):
        layer(hidden, cache=make_layer(keep_first=1, num_kv_heads=4).make_cache(2))
    with pytest.raises(TypeError, match=r"key: expected torch.float64"):
        layer(hidden, cache=layer.make_cache(2, dtype=torch.float64))


def test_an_adapter_on_a_folded_projection_is_refused():
    layer = make_layer()
    layer.v_proj = torch.nn.Sequential(layer.v_proj)
    with pytest.raises(TypeError, match=r"v_proj: expected nn.Linear, got Sequential"):
        layer(make_hidden())


@pytest.mark.parametrize("shape", [(0, 5, HIDDEN), (2, 0, HIDDEN)])
def test_nothing_in_nothing_out(shape):
    assert make_layer()(torch.zeros(shape)).shape == shape
