"""Models of Transformers on a GPU: kernels behind Doge and conversion, caches, compiled steps."""

from __future__ import annotations

import copy

import pytest
import torch
from test_transformers_convert import converted
from test_transformers_doge import doge, fast
from tiny_models import make, tokens, transformers, with_attention

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]
DTYPES = [torch.bfloat16, torch.float16]


def hidden(model, text, **options):
    return model.model(text.cuda(), use_cache=False, **options).last_hidden_state.float()


@pytest.mark.parametrize("dtype", DTYPES)
def test_doge_against_eager(dtype):
    """Half-precision eager keeps other keys at near-ties: its error is the yardstick."""
    plain = doge(num_hidden_layers=1).cuda()
    text = tokens(2, 140)
    truth = hidden(copy.deepcopy(plain).double(), text)
    errors = [
        float((hidden(model.to(dtype), text) - truth).norm() / truth.norm())
        for model in (copy.deepcopy(plain), fast(plain))
    ]
    assert errors[1] <= 2 * errors[0] + 1e-2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make_model", [lambda: fast(doge()), converted], ids=["doge", "converted"])
def test_training_step_against_the_eager_backend(make_model, dtype):
    """The same half-precision model on the CPU runs the same mathematics in plain PyTorch."""
    reference = make_model().to(dtype).float()
    model = copy.deepcopy(reference).cuda()
    text = tokens(2, 140)
    reference(text, labels=text).loss.backward()
    with torch.autocast("cuda", dtype):
        model(text.cuda(), labels=text.cuda()).loss.backward()
    wanted = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        truth = wanted[name].grad
        error = (parameter.grad.cpu() - truth).norm() / truth.norm().clamp(min=1e-6)
        assert error < 0.1, (name, float(error))


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize(
    "make_model",
    [lambda: fast(doge()), converted, lambda: with_attention(make("Llama"), "fsa")],
    ids=["doge", "converted", "llama"],
)
def test_generation_with_a_cache_equals_without(make_model, cache):
    """With a static cache, Transformers compiles the steps and captures them in graphs."""
    model = make_model().cuda().bfloat16()
    text = tokens(2, 60).cuda()
    options = {"max_new_tokens": 12, "do_sample": False, "output_logits": True}
    options |= {"return_dict_in_generate": True}
    plain = model.generate(text, use_cache=False, **options)
    cached = model.generate(text, cache_implementation=cache, **options)
    # Compared as long as both wrote the same: half precision may break a tie of two tokens.
    for row in range(2):
        same = (plain.sequences[row, 60:] == cached.sequences[row, 60:]).cumprod(0).sum()
        for step in range(min(int(same) + 1, 12)):
            expected, found = plain.logits[step][row].float(), cached.logits[step][row].float()
            assert (found - expected).abs().max() < 0.1 * expected.abs().max()
        assert same >= 4


def test_no_token_sees_the_future():
    model, text = fast(doge()).cuda().bfloat16(), tokens(1, 140)
    before = hidden(model, text)
    text[0, 90] = 3 + (text[0, 90] - 2) % 297
    after = hidden(model, text)
    assert torch.equal(before[:, :90], after[:, :90])
    assert not torch.equal(before[:, 90:], after[:, 90:])


def test_a_forward_pass_waits_for_nothing():
    """After the first pass, neither masks nor selections need a value on the host."""
    model = fast(doge()).cuda().bfloat16()
    text = tokens(1, 140).cuda()
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(text[:, :100], past_key_values=cache)
        model(text[:, 100:101], past_key_values=cache)
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(text[:, 101:102], past_key_values=cache)
        finally:
            torch.cuda.set_sync_debug_mode("default")
