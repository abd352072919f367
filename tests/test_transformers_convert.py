"""Dense models with dynamic masks: what converting does, training, caches, saving, the monitor."""

from __future__ import annotations

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tiny_models import greedy, make, padding, tokens, with_attention
from torch import Tensor, nn

from flash_sparse_attn import select_keys
from flash_sparse_attn.integrations import transformers as integration
from flash_sparse_attn.integrations.monitor import head_statistics
from flash_sparse_attn.integrations.window_layer import WindowLayer

pytestmark = pytest.mark.filterwarnings("ignore")
integration.register()
WINDOW, RECENT, FIRST = 6, 3, 2


def converted(name: str = "Llama", window_size: object = WINDOW, **changes: object) -> nn.Module:
    """A converted model whose scores differ, as after training."""
    model = integration.convert(
        make(name, **changes), window_size, keep_recent=RECENT, keep_first=FIRST
    )
    for layer in model.model.layers:
        if hasattr(layer.self_attn, "A"):
            layer.self_attn.A.data = torch.tensor([0.5, -0.7])
            nn.init.normal_(layer.self_attn.dt_proj.weight, std=0.4)
    return model


class ByHand(nn.Module):
    """The same attention from the definition: dense mask, additive bias, eager softmax."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states: Tensor, **kwargs: object) -> tuple[Tensor, None]:
        inner = self.attention
        value = inner.v_proj(hidden_states)
        scores = (inner.A * F.softplus(inner.dt_proj(value))).transpose(1, 2)
        mask, keep = kwargs.pop("attention_mask"), {"keep_recent": RECENT, "keep_first": FIRST}
        real = None if mask is None else mask[:, 0, -1] == 0  # eager: 0 or the smallest number
        visible = select_keys(scores, WINDOW, key_mask=real, **keep).to_dense()
        bias = scores[:, :, None].masked_fill(~visible, -1e30).repeat_interleave(2, dim=1)
        return type(inner).forward(inner, hidden_states, attention_mask=bias, **kwargs)


def by_hand(model: nn.Module) -> nn.Module:
    """A copy of a converted model that runs `ByHand` over the dense layers."""
    other = copy.deepcopy(model)
    for layer in other.model.layers:
        inner = layer.self_attn
        inner.__class__ = type(inner).__mro__[3]
        layer.self_attn = ByHand(inner)
    other.set_attn_implementation("eager")
    return other


@pytest.mark.parametrize("kind", [None, "left", "right"])
@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
def test_logits_and_gradients_are_those_of_the_definition(name, kind):
    model = converted(name)
    plain, mask = by_hand(model), padding(kind, 2, 40)
    weight = torch.ones(2, 40) if mask is None else mask
    found = []
    for other in (model, plain):
        logits = other(tokens(2, 40), attention_mask=mask, use_cache=False).logits
        (logits.square().mean(-1) * weight).sum().backward()
        grads = {n.replace(".attention.", "."): p.grad for n, p in other.named_parameters()}
        found.append((logits * weight[..., None], grads))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-5)
    assert found[0][1].keys() == found[1][1].keys()
    for key, grad in found[0][1].items():
        torch.testing.assert_close(grad, found[1][1][key], rtol=1e-3, atol=1e-4)
    assert found[0][1]["model.layers.0.self_attn.dt_proj.weight"].abs().max() > 0


def test_before_training_it_is_a_sliding_window():
    dense = make("Mistral", sliding_window=None)
    model = integration.convert(copy.deepcopy(dense), WINDOW, keep_recent=RECENT)
    window = make("Mistral", sliding_window=WINDOW)
    window.load_state_dict(dense.state_dict())
    text = tokens(2, 40)
    torch.testing.assert_close(model(text).logits, window(text).logits, rtol=1e-4, atol=1e-5)
    model(text, labels=text).loss.backward()
    attention = model.model.layers[0].self_attn
    assert attention.A.grad.abs().min() > 0 and not attention.dt_proj.weight.grad.any()


def test_a_window_of_the_whole_text_changes_nothing():
    dense = make("Qwen3")
    model = integration.convert(copy.deepcopy(dense), 64)
    text = tokens(2, 40)
    torch.testing.assert_close(model(text).logits, dense(text).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("window_size", [WINDOW, [WINDOW, None], [None, WINDOW]], ids=str)
def test_generation_with_a_cache_equals_without(window_size, cache):
    model, text = converted(window_size=window_size), tokens(2, 20)
    options = {"attention_mask": padding("left", 2, 20)}
    expected, expected_logits = greedy(model, text, 8, use_cache=False, **options)
    for more in ({}, {"prefill_chunk_size": 7}):
        found, logits = greedy(model, text, 8, cache_implementation=cache, **options, **more)
        assert torch.equal(found, expected)
        torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-5)


def test_only_dense_layers_keep_all_keys():
    model = converted(window_size=[WINDOW, None])
    cache = model(tokens(2, 40), use_cache=True).past_key_values
    assert isinstance(cache.layers[0], WindowLayer)
    assert cache.layers[0].keys.shape[2] == WINDOW + RECENT + FIRST
    assert cache.layers[1].keys.shape[2] == 40


def test_no_token_sees_the_future():
    model, text = converted(), tokens(1, 40)
    before = model(text).logits
    text[0, 25] = 3 + (text[0, 25] - 2) % 297
    after = model(text).logits
    assert torch.equal(before[:, :25], after[:, :25])
    assert not torch.equal(before[:, 25:], after[:, 25:])


def test_packed_rows_equal_texts_on_their_own():
    model = converted()
    texts = tokens(1, 70).split([20, 1, 37, 12], dim=1)
    expected = torch.cat([model(text).logits for text in texts], dim=1)
    position_ids = torch.cat([torch.arange(text.shape[1]) for text in texts])[None]
    found = model(torch.cat(texts, 1), position_ids=position_ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shards", [None, "100KB"])
def test_saving_and_loading(tmp_path, shards):
    model = converted(window_size=[WINDOW, None])
    model.save_pretrained(tmp_path, **({"max_shard_size": shards} if shards else {}))
    again = integration.load_converted(tmp_path)
    assert torch.equal(again(tokens(2, 40)).logits, model(tokens(2, 40)).logits)
    make("Llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="holds no converted model"):
        integration.load_converted(tmp_path / "dense")


def test_what_cannot_be_done_is_refused():
    with pytest.raises(ValueError, match="window_size: expected an int or one per layer, 2, got 3"):
        integration.convert(make("Llama"), [4, 4, 4])
    with pytest.raises(ValueError, match="window_size: expected at least 1"):
        integration.convert(make("Llama"), 0)
    with pytest.raises(ValueError, match="has a sliding window, expected None"):
        integration.convert(make("Mistral", sliding_window=8), 4)
    with pytest.raises(ValueError, match="has a dynamic mask already"):
        integration.convert(converted(), 4)
    with pytest.raises(TypeError, match="model: expected attention layers with q_proj"):
        integration.convert(nn.Linear(2, 2), 4)
    with pytest.raises(ValueError, match="attn_implementation: expected one of"):
        with_attention(converted(), "eager")(tokens(1, 20))


def test_gradient_checkpointing():
    model = converted().train()
    inputs = {"input_ids": tokens(2, 40), "labels": tokens(2, 40), "use_cache": False}
    model(**inputs).loss.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(**inputs).loss.backward()
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, grad)


def test_statistics_of_known_selections():
    length, window = 40, 8
    equal = torch.zeros(1, 1, length)
    falling = torch.arange(length, 0, -1.0)[None, None]
    mixed = torch.rand(1, 1, length, generator=torch.Generator().manual_seed(0))
    scores = torch.cat([equal, falling, mixed], dim=1)
    sliding, stuck, free = head_statistics(select_keys(scores, window))
    assert sliding["outlive"] == 0.0 and sliding["chosen"] == 1.0
    assert stuck["chosen"] == 0.0 and stuck["outlive"] == window / length
    assert free["outlive"] > 0 and 0 < free["chosen"] < 1
    # Query t of the sliding window sees keys 0 ... min(t, 7) tokens back.
    seen = [age for t in range(length) for age in range(min(t + 1, window))]
    assert sliding["age"] == pytest.approx(sum(seen) / len(seen))
    packed = select_keys(scores[0], window, cu_seqlens=torch.tensor([0, length]).int())
    assert head_statistics(packed)[2] == free
    assert head_statistics(select_keys(scores, length)) == []
    recent = head_statistics(select_keys(scores, window, keep_recent=4))
    assert recent[0]["outlive"] == 0.0 and recent[1]["chosen"] == 0.0


def test_the_monitor_warns_once_of_heads_that_choose_nothing():
    model = converted()
    for layer in model.model.layers:
        layer.self_attn.A.data[0] = 0.0
    monitor = integration.SelectionMonitor(every=2, patience=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(12):
            state = SimpleNamespace(global_step=step)
            monitor.on_step_begin(None, state, None, model=model)
            model(tokens(2, 40), use_cache=False)
            monitor.on_step_end(None, SimpleNamespace(global_step=step + 1), None, model=model)
    said = [str(warning.message) for warning in caught if "collapsed" in str(warning.message)]
    assert len(said) == 2
    assert all("KV head 0 chooses the newest keys only" in text for text in said)
    assert len(monitor.history) == 6 * 2 * 2
    logs, state = {"loss": 1.0}, SimpleNamespace(log_history=[{"loss": 1.0, "step": 12}])
    monitor.on_log(None, state, None, logs=logs)
    assert set(logs) == {"loss", "selection/outlive", "selection/chosen", "selection/age"}
    assert state.log_history == [{**logs, "step": 12}]
    assert all(layer.self_attn.watched is None for layer in model.model.layers)
