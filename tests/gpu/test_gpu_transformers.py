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
    """Models on the CPU run the same mathematics in plain PyTorch, in fp32 and under autocast.

    Scores in half precision swap keys at near-ties, on a GPU others than on a CPU: several texts.
    """
    model = make_model().to(dtype).float()
    names = [name for name, _ in model.named_parameters()]

    def gradients(device, text, enabled):
        one = copy.deepcopy(model).to(device)
        with torch.autocast(device, dtype, enabled=enabled):
            one(text.to(device), labels=text.to(device)).loss.backward()
        return [parameter.grad.cpu().double() for parameter in one.parameters()]

    fair, error = torch.zeros(2, len(names))
    for seed in range(4):
        text = tokens(2, 140, seed)
        truth = gradients("cpu", text, False)
        for device, errors in (("cpu", fair), ("cuda", error)):
            found = gradients(device, text, True)
            distances = [(a - b).norm() / b.norm() for a, b in zip(found, truth, strict=True)]
            errors += torch.stack(distances) / 4
    for name, expected, found in zip(names, fair, error, strict=True):
        assert found < max(0.1, 2 * expected), (name, float(found), float(expected))


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
    written = model.generate(
        text, max_new_tokens=12, do_sample=False, output_logits=True, return_dict_in_generate=True,
        cache_implementation=cache,
    )  # fmt: skip
    with torch.no_grad():
        expected = model(written.sequences[:, :-1], use_cache=False).logits[:, 59:].float()
    found = torch.stack(written.logits, 1).float()
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()
    # Of the tokens that lead clearly, all are the same.
    best, second = expected.topk(2).values.unbind(-1)
    clear = best - second > 0.1 * expected.abs().max()
    assert torch.equal(found.argmax(-1)[clear], expected.argmax(-1)[clear]) and clear.any()


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
