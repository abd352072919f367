"""Doge with `apply_to_doge` against Doge's eager attention: training, generation, caches."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import (
    assert_same_function,
    greedy,
    make,
    padding,
    softmax_in_fp64,
    tokens,
    transformers,
    with_attention,
)
from torch import nn

from flash_sparse_attn import KeySelection
from flash_sparse_attn.integrations import dynamic
from flash_sparse_attn.integrations import transformers as integration
from flash_sparse_attn.integrations.transformers import apply_to_doge
from flash_sparse_attn.integrations.window_layer import WindowLayer

pytestmark = pytest.mark.filterwarnings("ignore")
WINDOW = 8


def doge(**changes: object) -> nn.Module:
    """Plain Doge in ``eager``, with scores that differ; those of a new model are all 1."""
    model = make("Doge", keep_window_size=WINDOW, **changes)
    for layer in model.model.layers:
        layer.self_attn.A.data = torch.tensor([0.5, -0.7])
        nn.init.normal_(layer.self_attn.dt_proj.weight, std=0.4)
    return model


def fast(model: nn.Module) -> nn.Module:
    return apply_to_doge(copy.deepcopy(model))


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("kind", [None, "left", "right"])
def test_logits_and_gradients(kind, use_cache):
    model = doge()
    results = assert_same_function(
        fast(model), model, padding(kind, 2, 40), input_ids=tokens(2, 40), use_cache=use_cache
    )
    for name in ("A", "dt_proj.weight"):
        assert results[f"model.layers.0.self_attn.{name}"].abs().max() > 1e-4


@pytest.mark.parametrize("window", [1, 40, 2048])
def test_windows_of_one_key_and_of_all(window):
    model = doge()
    for layer in model.model.layers:
        layer.self_attn.keep_window_size = window
    assert_same_function(fast(model), model, input_ids=tokens(2, 40), use_cache=False)


def test_projections_with_biases():
    model = doge(attention_bias=True)
    for layer in model.model.layers:
        nn.init.normal_(layer.self_attn.dt_proj.bias)
        nn.init.normal_(layer.self_attn.v_proj.bias)
    assert_same_function(fast(model), model, input_ids=tokens(2, 40))


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize(
    "options", [{}, {"prefill_chunk_size": 7}, {"num_beams": 3}, {"use_cache": False}], ids=str
)
def test_generation_token_by_token(options, cache):
    if cache and "use_cache" in options:
        pytest.skip("no cache to be static")
    model, mask = doge(), padding("left", 2, 20)
    # A token that comes again has the same score, and among equal ones torch.topk takes any.
    options |= {"attention_mask": mask, "no_repeat_ngram_size": 1}
    beams = {"num_beams": options.get("num_beams", 1)}
    plain = {"attention_mask": mask, "no_repeat_ngram_size": 1, **beams}
    expected, expected_logits = greedy(model, tokens(2, 20), 8, **plain)
    found, logits = greedy(fast(model), tokens(2, 20), 8, cache_implementation=cache, **options)
    assert torch.equal(found, expected)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [WINDOW, 64])
def test_assisted_generation(window):
    """Guesses are rolled back, whatever keys they evicted."""
    model = fast(doge())
    for layer in model.model.layers:
        layer.self_attn.keep_window_size = window
    text = tokens(1, 20).repeat(1, 2)  # so that there are guesses
    expected, _ = greedy(model, text, 24)
    found = model.generate(text, max_new_tokens=24, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(found[:, 40:], expected)


def test_caches_hold_the_window_however_long_the_text():
    model = fast(doge())
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens(2, 20), past_key_values=cache)
        sizes = [layer.nbytes for layer in cache.layers]
        for token in tokens(2, 60, seed=1).split(1, dim=1):
            model(token, past_key_values=cache)
    assert [layer.nbytes for layer in cache.layers] == sizes
    assert all(isinstance(layer, WindowLayer) for layer in cache.layers)
    assert all(layer.keys.shape == (2, 2, WINDOW, 16) for layer in cache.layers)
    assert int(cache.get_seq_length()) == 80
    cache.reset()
    again = model(tokens(2, 20), past_key_values=cache).logits
    torch.testing.assert_close(again, model(tokens(2, 20)).logits)


def test_a_long_text_read_in_pieces_equals_the_whole():
    model = fast(doge())
    text = torch.randint(3, 300, (2, 150))  # repeated tokens: ties
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        pieces = [model(part, past_key_values=cache).logits for part in text.split(11, dim=1)]
        whole = model(text, use_cache=False).logits
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-5)


def test_equal_scores_are_a_sliding_window():
    """At initialisation A is 0 and all scores are 1: the newer key wins."""
    model = doge()
    for layer in model.model.layers:
        nn.init.zeros_(layer.self_attn.A)
    ours = fast(model)
    text = tokens(1, 40)
    before = ours(text).logits
    text[0, 5] = 3 + (text[0, 5] - 2) % 297
    changed = (ours(text).logits != before).any(-1)[0]
    reach = 5 + 2 * (WINDOW - 1)  # through two layers
    assert changed[5 : reach + 1].all() and not changed[reach + 1 :].any()
    assert not changed[:5].any()


def test_no_token_sees_the_future():
    model, text = fast(doge()), tokens(1, 40)
    before = model(text).logits
    text[0, 25] = 3 + (text[0, 25] - 2) % 297
    after = model(text).logits
    assert torch.equal(before[:, :25], after[:, :25])
    assert not torch.equal(before[:, 25:], after[:, 25:])


def test_dropped_keys_get_no_gradient():
    """A key that no query sees, not even its own, gets none at all."""
    model = fast(doge(num_hidden_layers=1))
    attention = model.model.layers[0].self_attn
    attention.keep_selection = True
    embeddings = model.model.embed_tokens(tokens(1, 40)).detach().requires_grad_()
    value_states = []

    def remember(*call: object) -> None:
        call[-1].retain_grad()
        value_states.append(call[-1])

    attention.v_proj.register_forward_hook(remember)
    model(inputs_embeds=embeddings, use_cache=False).logits.square().sum().backward()
    selection = attention.watched
    never = (selection.expiry <= selection.start)[0]  # [Hkv, S]
    grad = value_states[0].grad[0].unflatten(-1, (2, 16)).abs().sum(-1).T
    assert never.any() and not grad[never].any()
    assert (grad[~never] > 0).float().mean() > 0.5


def test_gradient_checkpointing():
    model = fast(doge()).train()
    inputs = {"input_ids": tokens(2, 40), "labels": tokens(2, 40), "use_cache": False}
    model(**inputs).loss.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(**inputs).loss.backward()
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, grad)


def test_packed_rows_equal_texts_on_their_own():
    model = fast(doge())
    texts = tokens(1, 70).split([20, 1, 37, 12], dim=1)
    expected = torch.cat([model(text).logits for text in texts], dim=1)
    position_ids = torch.cat([torch.arange(text.shape[1]) for text in texts])[None]
    inputs = {"input_ids": torch.cat(texts, dim=1), "position_ids": position_ids}
    found = model(**inputs, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"packed texts cannot be continued.*use_cache=False"):
        model(**inputs, use_cache=True)


@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision(autocast):
    """Scores are computed in fp32 from fp32 or bf16 weights; the rest as in eager."""
    model, inputs = doge(), {"input_ids": tokens(2, 40), "labels": tokens(2, 40)}
    with softmax_in_fp64():
        truth = copy.deepcopy(model).double()(**inputs).loss.item()
    errors = []
    for other in (model, fast(model)):
        if not autocast:
            other = other.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = other(**inputs).loss
        loss.backward()
        errors.append(abs(loss.item() - truth))
    assert errors[1] <= 2 * errors[0] + 2e-2


def test_deterministic_name_is_passed_on(monkeypatch):
    model, asked = fast(doge()), []
    attend = integration.doge.attend

    def remember(*args: object, **options: object) -> torch.Tensor:
        asked.append(options["deterministic"])
        return attend(*args, **options)

    monkeypatch.setattr(integration.doge, "attend", remember)
    model(tokens(1, 20))
    model.set_attn_implementation("fsa_deterministic")
    model(tokens(1, 20))
    monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", "1")
    model.set_attn_implementation("fsa")
    model(tokens(1, 20))
    assert asked == [None, None, True, True, True, True]
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"attn_implementation: expected one of .* got 'eager'"):
        model(tokens(1, 20))


def test_compiled_steps_over_a_static_cache():
    model = fast(doge())
    text = tokens(2, 30)
    cache = transformers.StaticCache(config=model.config, max_cache_len=64)
    torch._dynamo.reset()
    step = torch.compile(model, backend="eager")
    with torch.no_grad():
        logits = [model(text[:, :20], past_key_values=cache).logits]
        with torch._dynamo.config.patch(error_on_recompile=False):
            for token in text[:, 20:24].split(1, dim=1):
                logits.append(step(token, past_key_values=cache).logits)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for token in text[:, 24:].split(1, dim=1):
                logits.append(step(token, past_key_values=cache).logits)
        whole = model(text, use_cache=False).logits
    torch.testing.assert_close(torch.cat(logits, dim=1), whole, rtol=1e-4, atol=1e-5)


def test_all_but_the_eager_backend_compiles_as_one_graph(monkeypatch):
    """On GPUs selection and attention are operators; here dense ones of PyTorch stand for them."""

    def select(scores: torch.Tensor, window_size: int, **options: object) -> KeySelection:
        position = torch.arange(scores.shape[-1], dtype=torch.int32).expand(scores.shape)
        ends = position + window_size
        mask = options["key_mask"]
        return KeySelection(position, ends, scores.detach(), "causal", window_size, key_mask=mask)

    def attend(*call: torch.Tensor, **options: object) -> torch.Tensor:
        query, key, value, selection, bias = call
        visible = selection.to_dense() & selection.key_mask[:, None, None]
        bias = bias.masked_fill(~visible, -1e30).repeat_interleave(2, dim=1)
        rows = [x.transpose(1, 2) for x in (query, key, value)]
        out = nn.functional.scaled_dot_product_attention(*rows, attn_mask=bias, enable_gqa=True)
        return out.transpose(1, 2)

    monkeypatch.setattr(dynamic, "select_keys", select)
    monkeypatch.setattr(dynamic, "flash_sparse_attn_func", attend)
    model, mask = fast(doge()), padding("left", 2, 30)
    inputs = {"input_ids": tokens(2, 30), "attention_mask": mask, "use_cache": False}
    expected = model(**inputs).logits
    torch._dynamo.reset()
    found = torch.compile(model, backend="eager", fullgraph=True)(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_compiled_training():
    """Without a mask Transformers, when compiled, takes every text for packed ones."""
    model = fast(doge()).train()
    inputs = {"input_ids": tokens(2, 30), "labels": tokens(2, 30), "use_cache": False}
    model(**inputs).loss.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    compiled(**inputs, attention_mask=torch.ones(2, 30, dtype=torch.long)).loss.backward()
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match=r"pass torch.ones_like\(input_ids\)"):
        compiled(**inputs)


def test_saved_models_load_as_plain_doge(tmp_path):
    model = doge()
    fast(model).save_pretrained(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert type(plain.model.layers[0].self_attn).__name__ == "DogeAttention"
    expected = model(tokens(2, 20)).logits
    assert torch.equal(plain(tokens(2, 20)).logits, expected)
    torch.testing.assert_close(
        apply_to_doge(plain)(tokens(2, 20)).logits, expected, rtol=1e-4, atol=1e-5
    )


def test_what_cannot_be_done_is_refused():
    with pytest.raises(TypeError, match="model: expected a Doge model, got LlamaForCausalLM"):
        apply_to_doge(make("Llama"))
    with pytest.raises(ValueError, match=r"sliding_window = None, got 16"):
        apply_to_doge(make("Doge", sliding_window=16))
    plain = doge()
    with pytest.raises(TypeError, match=r"use apply_to_doge\(model\)"):
        with_attention(plain, "fsa")(tokens(1, 20))
    model = fast(plain)
    for mask in (torch.zeros(1, 1, 20, 20), torch.ones(1, 1, 20, 20, dtype=torch.bool)):
        with pytest.raises(ValueError, match="attention_mask: dynamic masks take padding"):
            model(tokens(1, 20), attention_mask=mask)
    cache = transformers.DynamicCache(config=plain.config)
    plain(tokens(1, 20), past_key_values=cache)
    with pytest.raises(ValueError, match="layer 0 holds keys without scores"):
        model(tokens(1, 1), past_key_values=cache)
    model.train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"attention_dropout = 0\.0"):
        model(tokens(1, 20))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("count", [1, 7, 9])
def test_rolling_back_the_latest_pass(count, first):
    """Padding and evictions included, twice in a row."""
    model, text = fast(doge()), tokens(2, 60)
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[0, :5] = mask[1, 33] = 0

    def read(*parts: slice) -> tuple[transformers.Cache, torch.Tensor]:
        cache = transformers.DynamicCache(config=model.config)
        for part in parts:
            seen = mask[:, : part.stop]
            out = model(text[:, part], attention_mask=seen, past_key_values=cache)
        return cache, out.logits

    with torch.no_grad():
        passes = [slice(0, 40)] if first else [slice(0, 30), slice(30, 40)]
        cache, _ = read(*passes)
        cache.crop(-count)
        cache.crop(-1)
        end = 40 - count - 1
        assert int(cache.get_seq_length()) == end
        rest = {"attention_mask": mask[:, :50], "past_key_values": cache}
        found = model(text[:, end:50], **rest).logits
        _, expected = read(slice(0, end), slice(end, 50))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", [0, 1])
def test_a_mask_that_changes_what_was_read_is_refused(change):
    """A key that is in the window, or was, cannot be hidden later; nor padding shown."""
    model, text = fast(doge()), tokens(2, 31)
    mask = padding("left", 2, 31).long()
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(text[:, :30], attention_mask=mask[:, :30], past_key_values=cache)
        wrong = mask.clone()
        wrong[:, int(mask.sum(1).min()) if change == 0 else 0] = change
        assert not torch.equal(wrong, mask)
        with pytest.raises(ValueError, match="as when they were read"):
            model(text[:, 30:], attention_mask=wrong, past_key_values=cache)
        model(text[:, 30:], attention_mask=mask, past_key_values=cache)


def test_a_cache_does_not_hold_the_text_it_read():
    model = fast(doge())
    cache = model(tokens(1, 290), use_cache=True).past_key_values
    held = [x for layer in cache.layers for x in tensors_of(vars(layer))]
    assert len(held) > 10
    assert max(x.untyped_storage().nbytes() for x in held) <= 32 * 2 * 16 * 4


def tensors_of(value: object) -> list[torch.Tensor]:
    """All tensors anywhere inside a value."""
    if isinstance(value, torch.Tensor):
        return [value]
    if hasattr(value, "__dict__"):
        value = vars(value)
    inner = value.values() if isinstance(value, dict) else value
    if isinstance(inner, (str, bytes)) or not hasattr(inner, "__iter__"):
        return []
    return [tensor for part in inner for tensor in tensors_of(part)]


def test_rolling_back_too_far_is_refused():
    model, text = fast(doge()), tokens(2, 20)
    for mask, reason in (
        (torch.ones(2, 20), "a key was evicted"),
        (padding("left", 2, 20), "padding"),
    ):
        cache = transformers.DynamicCache(config=model.config)
        for end in (18, 19, 20):
            begin = 0 if end == 18 else end - 1
            seen = mask[:, :end].long()
            model(text[:, begin:end], attention_mask=seen, past_key_values=cache)
        with pytest.raises(ValueError, match=reason):
            cache.crop(-4)
