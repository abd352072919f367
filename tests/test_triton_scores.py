"""The kernels of key scores, interpreted on the CPU, against their definition in fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compare import assert_fair
from interpreter import run_interpreted
from score_cases import NAMES, make_hidden, make_layers, plain_scores, results_of

pytest.importorskip("triton")

from flash_sparse_attn.backends.triton import score_calls
from flash_sparse_attn.backends.triton.config import SCORE_TILES

# So small that a few dozen tokens are several tiles and chunks.
SMALL = replace(SCORE_TILES, tokens=4, lanes=8, chunk=8, max_chunks=3, grad_lanes=8, sum_chunks=2)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setattr(score_calls, "SCORE_TILES", SMALL)
    monkeypatch.setattr(score_calls, "FEW_TILES", 3)


def scores(hidden, *layers, exponential=False):
    return score_calls.score_keys(hidden, layers, exponential, False)[0]


def check(hidden, layers, exponential, grad_score=None):
    """Scores and every gradient."""
    score, logit = score_calls.score_keys(hidden, layers, exponential, True)
    upstream = make_hidden(*score.shape, seed=9) / 30 if grad_score is None else grad_score
    needs = [one is not None for one in (hidden, *layers)]
    results = [
        score,
        *score_calls.grad_scores(upstream, hidden, layers, logit, exponential, needs),
    ]
    given = [one for one in (hidden, *layers) if one is not None]
    as_double = [one if one is None else one.double() for one in (hidden, *layers)]
    as_single = [one if one is None else one.float() for one in (hidden, *layers)]
    truths = results_of(plain_scores, as_double, upstream, exponential)
    plains = results_of(plain_scores, as_single, upstream, exponential)
    names = ["score", *(n for n, need in zip(NAMES, needs, strict=True) if need)]
    results = [one for one in results if one is not None]
    dtypes = [torch.float32, *(one.dtype for one in given)]
    for name, result, truth, plain, dtype in zip(
        names, results, truths, plains, dtypes, strict=True
    ):
        assert result.dtype == dtype and result.is_contiguous()
        assert_fair(result, truth, plain.to(dtype), name)


@pytest.mark.parametrize("exponential", (False, True))
@pytest.mark.parametrize(
    ("shape", "heads_kv", "head_dim", "dtype"),
    (
        ((2, 17, 24), 2, 6, torch.float32),
        ((1, 30, 1), 1, 1, torch.float32),
        ((21, 13), 3, 5, torch.float16),
        ((2, 3, 4, 9), 5, 2, torch.float32),
        ((5, 1, 16), 9, 3, torch.float16),
        ((1, 1, 60), 4, 20, torch.float32),
    ),
)
def test_scores_and_all_gradients(shape, heads_kv, head_dim, dtype, exponential):
    layers = make_layers(shape[-1], heads_kv, head_dim, dtype, bias=not exponential)
    check(make_hidden(*shape, dtype=dtype), layers, exponential)


def test_softplus_and_exp_are_exact_where_they_are_tiny_or_large():
    one = torch.ones(1)
    layers = (one[:, None], None, one[:, None], None, one)
    logit = torch.cat([torch.linspace(-86, 86, 173), 10.0 ** torch.arange(-30, 0)])
    softplus = torch.logaddexp(logit.double(), torch.zeros(()).double())
    for exponential, truth in ((False, softplus), (True, softplus.exp())):
        score = scores(logit[:, None], *layers, exponential=exponential)[0]
        # The interpreter's fma rounds twice; on GPUs the error does not grow with the argument.
        assert (((score - truth) / truth).abs() < 1e-7 * (5 + logit.abs())).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_infinite_and_undefined_states():
    layers = make_layers(8, 2, 4)
    hidden = make_hidden(1, 4, 8)
    hidden[0, 1, 3], hidden[0, 2, 5] = torch.inf, torch.nan
    score = scores(hidden, *layers)
    assert score[0, 1, 0].isfinite() and score[0, :, 2].isnan().all()
    assert score[0, 1, 1].item() in (0.0, -0.0, torch.inf, -torch.inf)


@pytest.mark.parametrize("size", (1, 24, 50))
def test_bits_depend_on_the_token_alone(size, monkeypatch):
    layers = make_layers(size, 3, 4)
    hidden = make_hidden(2, 10, size)
    whole = scores(hidden, *layers)
    for length in (1, 4):
        chunks = [scores(chunk, *layers) for chunk in hidden.split(length, 1)]
        assert torch.equal(torch.cat(chunks, -1), whole)
    assert torch.equal(scores(hidden[1], *layers), whole[1])
    for given in (
        torch.nn.functional.pad(hidden, (3, 5))[..., 3 : 3 + size],
        hidden.transpose(0, 1).contiguous().transpose(0, 1),
        hidden.transpose(1, 2).contiguous().transpose(1, 2),
    ):
        assert torch.equal(scores(given, *layers), whole)
    # Neither on the sizes of tiles, other than those that are summed side by side.
    other = replace(SMALL, heads=2, tokens=8, fold_columns=4)
    monkeypatch.setattr(score_calls, "SCORE_TILES", other)
    assert torch.equal(scores(hidden, *layers), whole)


def test_weights_may_be_strided():
    layers = make_layers(24, 2, 6)
    strided = [one.t().contiguous().t() if one.dim() == 2 else one for one in layers]
    strided[4] = torch.stack([layers[4], layers[4]], 1)[:, 0]
    hidden = make_hidden(1, 10, 24)
    assert torch.equal(scores(hidden, *strided), scores(hidden, *layers))
    check(hidden, strided, False)


def test_gradients_of_scores_may_have_any_strides():
    layers, hidden = make_layers(9, 2, 6), make_hidden(2, 10, 9)
    check(hidden, layers, True, torch.tensor(0.1).expand(2, 2, 10))
    check(hidden, layers, True, make_hidden(2, 10, 2).transpose(1, 2) / 10)
    packed = make_hidden(2, 2, 10, seed=8).transpose(0, 1) / 10
    check(hidden.transpose(0, 1).contiguous().transpose(0, 1), layers, False, packed)


def test_only_what_is_asked_for_is_computed():
    layers, hidden = make_layers(9, 5, 3), make_hidden(2, 10, 9)
    _, logit = score_calls.score_keys(hidden, layers, True, True)
    upstream = make_hidden(*logit.shape, seed=9)
    call = (upstream, hidden, layers, logit, True)
    every = score_calls.grad_scores(*call, [True] * 6)
    for asked in ("hidden", "v_weight", "v_bias", "dt_weight", "dt_bias", "A", "hidden A"):
        needs = [name in asked.split() for name in NAMES]
        grads = score_calls.grad_scores(*call, needs)
        for grad, same, need in zip(grads, every, needs, strict=True):
            assert (grad is None) != need and (grad is None or torch.equal(grad, same))


run_interpreted(globals())
