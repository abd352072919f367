"""Attention by name in Transformers: unchanged models against their eager implementation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import (
    assert_same_function,
    greedy,
    make,
    make_minimax,
    padding,
    tokens,
    transformers,
    with_attention,
)

from flash_sparse_attn.integrations import block_sparse
from flash_sparse_attn.integrations import transformers as integration
from flash_sparse_attn.reference import attention_reference

pytestmark = pytest.mark.filterwarnings("ignore")
integration.register()
MODELS = ("Llama", "Qwen3")


def test_the_names_are_no_other_implementations():
    assert integration.NAMES == ("fsa", "fsa_deterministic")
    for name in integration.NAMES:
        assert name in transformers.AttentionInterface._global_mapping
        assert name in transformers.AttentionMaskInterface._global_mapping
        assert not any(part in name for part in ("flash", "sdpa", "flex_attention", "/"))


@pytest.mark.parametrize("found", ["None", "types.SimpleNamespace(__version__='5.16.1')"])
def test_without_the_right_transformers_the_error_says_what_to_install(found):
    source = Path(integration.__file__).parents[2]
    code = (
        f"import sys, types; sys.path.insert(0, {str(source)!r})\n"
        f"sys.modules['transformers'] = {found}\n"
        "import flash_sparse_attn.integrations.transformers"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ") and "dynamic-mask-attention[transformers]" in last


@pytest.mark.parametrize("kind", [None, "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients(name, kind):
    model = make(name)
    assert_same_function(
        with_attention(model, "fsa"), model, padding(kind, 2, 40), input_ids=tokens(2, 40)
    )


def test_deterministic_name_is_repeatable():
    model = with_attention(make("Llama"), "fsa_deterministic")
    inputs = {"input_ids": tokens(2, 40), "labels": tokens(2, 40)}
    runs = []
    for _ in range(2):
        model.zero_grad()
        model(**inputs).loss.backward()
        runs.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 7}, {"num_beams": 3}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_generation_token_by_token(name, options):
    model, mask = make(name), padding("left", 2, 20)
    options = {**options, "attention_mask": mask}
    expected, expected_logits = greedy(model, tokens(2, 20), 8, **options)
    ours = with_attention(model, "fsa")
    for cache in (None, "static"):
        found, logits = greedy(ours, tokens(2, 20), 8, cache_implementation=cache, **options)
        assert torch.equal(found, expected)
        torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-5)


def test_static_cache_by_hand_and_without_a_mask():
    model = make("Llama")
    text, results = tokens(2, 24), {}
    for name in ("eager", "fsa"):
        model.set_attn_implementation(name)
        cache = transformers.StaticCache(config=model.config, max_cache_len=40)
        parts = (text[:, :9], text[:, 9:15], *text[:, 15:].split(1, dim=1))
        with torch.no_grad():
            logits = [model(part, past_key_values=cache).logits for part in parts]
        results[name] = torch.cat(logits, dim=1)
    torch.testing.assert_close(results["fsa"], results["eager"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["positions", "positions and a cache", "borders"])
def test_packed_rows_equal_texts_on_their_own(how):
    model = with_attention(make("Qwen3"), "fsa")
    texts = tokens(1, 60).split([7, 1, 30, 22], dim=1)
    expected = torch.cat([model(text).logits for text in texts], dim=1)
    position_ids = torch.cat([torch.arange(text.shape[1]) for text in texts])[None]
    inputs = {"position_ids": position_ids, "use_cache": how == "positions and a cache"}
    if how == "borders":
        borders = torch.tensor([0, 7, 8, 38, 60], dtype=torch.int32)
        inputs |= {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders}
        inputs |= {"max_length_q": 30, "max_length_k": 30}
    found = model(torch.cat(texts, dim=1), **inputs).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    whole = model(torch.cat(texts, dim=1), use_cache=False).logits
    assert (whole - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_packed_rows(name):
    """With borders, those of the texts on their own, added up."""
    model, texts = with_attention(make(name), "fsa"), tokens(1, 60).split([22, 1, 37], dim=1)
    upstream = torch.randn(1, 60, 300)
    for text, part in zip(texts, upstream.split([22, 1, 37], dim=1), strict=True):
        (model(text).logits * part).sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    borders = torch.tensor([0, 22, 23, 60], dtype=torch.int32)
    positions = torch.cat([torch.arange(text.shape[1]) for text in texts])[None]
    packed = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "position_ids": positions}
    (model(torch.cat(texts, dim=1), **packed).logits * upstream).sum().backward()
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-3, atol=1e-3)


def test_borders_of_queries_and_keys_have_to_agree():
    model = with_attention(make("Llama"), "fsa")
    borders = torch.tensor([0, 7, 20], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seq_lens_q: expected both borders"):
        model(tokens(1, 20), cu_seq_lens_q=borders)
    other = torch.tensor([0, 8, 20], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seq_lens_k: expected the borders of cu_seq_lens_q"):
        model(tokens(1, 20), cu_seq_lens_q=borders, cu_seq_lens_k=other)


@pytest.mark.parametrize("name", MODELS)
def test_saved_models_are_loaded_by_name(tmp_path, name):
    model = with_attention(make(name), "fsa")
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="fsa")
    assert again.config._attn_implementation == "fsa"
    assert torch.equal(again(tokens(2, 20)).logits, model(tokens(2, 20)).logits)


def test_packed_rows_of_a_batch():
    model = make("Llama")
    position_ids = torch.stack([torch.arange(30), torch.arange(30) % 11])
    assert_same_function(
        with_attention(model, "fsa"),
        model,
        input_ids=tokens(2, 30),
        position_ids=position_ids,
        use_cache=False,
    )


def test_positions_are_looked_at_anew_after_a_change():
    model = with_attention(make("Llama"), "fsa")
    text, position_ids = tokens(1, 20), torch.arange(20)[None]
    whole = model(text, position_ids=position_ids, use_cache=True).logits
    position_ids.remainder_(10)
    packed = model(text, position_ids=position_ids, use_cache=True).logits
    torch.testing.assert_close(packed[:, :10], whole[:, :10], rtol=1e-4, atol=1e-5)
    alone = model(text[:, 10:]).logits
    torch.testing.assert_close(packed[:, 10:], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [None, "left"])
def test_sliding_windows(kind):
    model, mask = make("Mistral", sliding_window=6), padding(kind, 2, 20)
    ours = with_attention(model, "fsa")
    assert_same_function(ours, model, mask, input_ids=tokens(2, 20))
    expected, _ = greedy(model, tokens(2, 20), 8, attention_mask=mask)
    for cache in (None, "static"):
        found, _ = greedy(ours, tokens(2, 20), 8, attention_mask=mask, cache_implementation=cache)
        assert torch.equal(found, expected)


FAMILIES = {
    "Gemma2": {"sliding_window": 8},  # softcap, and every other layer slides
    "Cohere2": {"sliding_window": 8},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "Mixtral": {"num_local_experts": 2},
    "GPTNeoX": {},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_other_families(name):
    model, mask = make(name, **FAMILIES[name]), padding("left", 2, 20)
    ours = with_attention(model, "fsa")
    inputs = {"input_ids": tokens(2, 20), "attention_mask": mask}
    expected, found = model(**inputs).logits, ours(**inputs).logits
    real = mask.bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-5)
    written, _ = greedy(model, tokens(2, 20), 4, attention_mask=mask)
    for cache in (None, "static"):
        options = {"attention_mask": mask, "cache_implementation": cache}
        assert torch.equal(greedy(ours, tokens(2, 20), 4, **options)[0], written)


def test_sliding_window_in_packed_rows():
    model = make("Mistral", sliding_window=6)
    inputs = {"input_ids": tokens(1, 30), "position_ids": (torch.arange(30) % 13)[None]}
    assert_same_function(with_attention(model, "fsa"), model, use_cache=False, **inputs)


def test_encoders():
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.BertConfig(**sizes, attention_probs_dropout_prob=0.0)
    config._attn_implementation = "eager"
    model = transformers.BertModel(config).eval()
    mask = padding("right", 2, 20)
    for attention_mask in (None, mask):
        results = []
        for name in ("eager", "fsa"):
            model.set_attn_implementation(name)
            out = model(tokens(2, 20), attention_mask=attention_mask).last_hidden_state
            results.append(out * mask[..., None])
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks_of_the_user(dtype):
    model = make("Llama")
    visible = (torch.rand(2, 1, 20, 20) < 0.5) | torch.eye(20, dtype=torch.bool)
    mask = torch.zeros(2, 1, 20, 20).masked_fill(~visible, -1e4)
    expected = model(tokens(2, 20), attention_mask=mask).logits
    given = visible if dtype == torch.bool else mask
    found = with_attention(model, "fsa")(tokens(2, 20), attention_mask=given).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_autocast():
    """Queries and keys come in fp32, values in bf16."""
    model, inputs = make("Qwen3"), {"input_ids": tokens(2, 40), "labels": tokens(2, 40)}
    truth = model.double()(**inputs).loss.item()
    errors = {}
    for name in ("eager", "fsa"):
        other = with_attention(model.float(), name)
        with torch.autocast("cpu", torch.bfloat16):
            loss = other(**inputs).loss
        loss.backward()
        errors[name] = abs(loss.item() - truth)
        assert all(p.grad.dtype == torch.float32 for p in other.parameters())
    assert errors["fsa"] <= 2 * errors["eager"] + 1e-2


def test_half_precision_weights():
    model = with_attention(make("Llama"), "fsa").bfloat16()
    assert model(tokens(2, 40)).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("name", [*MODELS, "Mistral"])
def test_gradient_checkpointing(name):
    model = with_attention(make(name), "fsa").train()
    inputs = {"input_ids": tokens(2, 40), "labels": tokens(2, 40), "use_cache": False}
    model(**inputs).loss.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(**inputs).loss.backward()
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, grad)


@pytest.mark.parametrize("name", MODELS)
def test_compiled(name):
    model, mask = with_attention(make(name), "fsa"), padding("left", 2, 24)
    inputs = {"input_ids": tokens(2, 24), "attention_mask": mask, "use_cache": False}
    expected = model(**inputs).logits
    torch._dynamo.reset()
    found = torch.compile(model, backend="eager")(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*MODELS, "MiniMax-M3"])
def test_no_token_sees_the_future(name):
    plain = make(name) if name in MODELS else make_minimax()
    model, text = with_attention(plain, "fsa"), tokens(1, 40)
    before = model(text).logits
    text[0, 25] = 3 + (text[0, 25] - 2) % 297
    after = model(text).logits
    assert torch.equal(before[:, :25], after[:, :25])
    assert not torch.equal(before[:, 25:], after[:, 25:])


REFUSED = {
    "s_aux": torch.zeros(4),
    "position_bias": torch.zeros(1, 4, 20, 20),
    "indices": torch.zeros(1, 20, 4, dtype=torch.long),
    "head_mask": torch.ones(4),
    "output_attentions": True,
    "block_table": torch.zeros(1, 1, dtype=torch.int32),
    "something_new": torch.ones(3),
    "temperature_of_heads": 0.5,
}


@pytest.mark.parametrize("keyword", REFUSED)
def test_keywords_that_change_the_result_are_refused(keyword):
    query = torch.randn(1, 4, 20, 16)
    call = {"attention_mask": None, "scaling": 0.25, keyword: REFUSED[keyword]}
    with pytest.raises(ValueError, match=keyword):
        integration.attention(torch.nn.Module(), query, query, query, **call)


def test_dropout_is_refused():
    model = with_attention(make("Llama", attention_dropout=0.1), "fsa").train()
    with pytest.raises(ValueError, match=r"attention_dropout = 0\.0"):
        model(tokens(1, 8))


def test_softcap_is_used():
    query, key, value = (torch.randn(1, 2, 9, 8) * 3 for _ in range(3))
    found, _ = integration.attention(torch.nn.Module(), query, key, value, None, softcap=2.0)
    rows = [x.transpose(1, 2) for x in (query, key, value)]
    expected, _, _ = attention_reference(*rows, is_causal=True, softcap=2.0, softmax_scale=8**-0.5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_layer_that_keeps_its_sliding_window_to_itself_is_refused():
    module = torch.nn.Module()
    module.config = transformers.MistralConfig(sliding_window=4)
    query = torch.randn(1, 2, 9, 8)
    with pytest.raises(ValueError, match="sliding_window: Module does not pass it"):
        integration.attention(module, query, query, query, None)
    integration.attention(module, query, query, query, None, sliding_window=None)


def block_case(heads: int, kv_heads: int, rows: int) -> tuple[torch.Tensor, ...]:
    """Queries, keys, values, lists with holes and empty rows, and the mask they stand for."""
    query = torch.randn(2, 13, 4, 8, dtype=torch.float64)
    key, value = torch.randn(2, 2, 18, kv_heads, 8, dtype=torch.float64)
    lists = torch.stack([torch.randperm(5)[:3] for _ in range(2 * heads * 13)])
    lists = lists.view(2, heads, 13, 3)
    lists = torch.where(torch.rand(lists.shape) < 0.3, -1, lists)
    lists[:, :, rows] = -1
    mask = torch.zeros(2, heads, 13, 20, dtype=torch.bool)
    for place in torch.cartesian_prod(*map(torch.arange, lists.shape)).tolist():
        if (block := int(lists[tuple(place)])) >= 0:
            mask[place[0], place[1], place[2], 4 * block : 4 * block + 4] = True
    return query, key, value, lists, mask[..., :18]


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("limit", [1 << 26, 300])
def test_block_lists(monkeypatch, heads, limit):
    monkeypatch.setattr(block_sparse, "_MASK_BYTES", limit)
    query, key, value, lists, mask = block_case(heads, 2, rows=4)
    inputs = [x.requires_grad_() for x in (query, key, value)]
    key_mask = torch.ones(2, 1, 1, 18, dtype=torch.bool)
    key_mask[0, ..., :3] = False
    out = block_sparse.block_sparse_attention(*inputs, lists, 4, visible=key_mask)
    expected, _, _ = attention_reference(
        *inputs, mask & key_mask, is_causal=True, softmax_scale=8**-0.5
    )
    upstream = torch.randn_like(out)
    torch.testing.assert_close(out, expected)
    for found, truth in zip(
        torch.autograd.grad(out, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(found, truth)
    assert not out[:, 4].any()


def test_block_lists_are_checked():
    query, key, value, lists, _ = block_case(2, 2, rows=4)
    attend = block_sparse.block_sparse_attention
    with pytest.raises(ValueError, match=r"block_indices: expected -1 \(none\) to 4"):
        attend(query, key, value, lists + 3, 4)
    with pytest.raises(TypeError, match="block_indices: expected int32 or int64"):
        attend(query, key, value, lists.float(), 4)
    with pytest.raises(ValueError, match=r"block_indices: expected .* with B, Q"):
        attend(query, key, value, lists[:, :, :5], 4)


def test_what_block_lists_do_not_go_with_is_refused():
    query, lists = torch.randn(1, 2, 12, 8), torch.zeros(1, 1, 12, 1, dtype=torch.int64)

    def attend(mask=None, **keywords):
        call = {"block_indices": lists, "block_size": 4, **keywords}
        return integration.attention(torch.nn.Module(), query, query, query, mask, **call)

    with pytest.raises(ValueError, match="block_indices: expected neither an additive"):
        attend(torch.zeros(1, 1, 12, 12))
    with pytest.raises(ValueError, match=r"block_indices: expected neither .* sliding window"):
        attend(sliding_window=4)
    with pytest.raises(ValueError, match="block_size: expected the keyword beside block_indices"):
        attend(block_size=None)


@pytest.mark.parametrize("how", ["positions", "borders"])
def test_block_lists_of_packed_texts_are_refused(how):
    """Blocks are counted in whole rows, and so the model's own lists cross the borders."""
    query, lists = torch.randn(1, 2, 12, 8), torch.zeros(1, 1, 12, 1, dtype=torch.int64)
    keywords = {"position_ids": (torch.arange(12) % 7)[None]}
    if how == "borders":
        borders = torch.tensor([0, 7, 12], dtype=torch.int32)
        keywords = {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders}
    call = {"block_indices": lists, "block_size": 4, **keywords}
    with pytest.raises(ValueError, match="block_indices: expected no packed texts"):
        integration.attention(torch.nn.Module(), query, query, query, None, **call)


@pytest.mark.parametrize("kind", [None, "right"])
def test_minimax_logits_and_gradients(kind):
    model = make_minimax()
    assert_same_function(
        with_attention(model, "fsa"), model, padding(kind, 2, 30), input_ids=tokens(2, 30)
    )


def test_minimax_generation():
    model = make_minimax()
    expected, _ = greedy(model, tokens(2, 30), 12)
    found, _ = greedy(with_attention(model, "fsa"), tokens(2, 30), 12)
    assert torch.equal(found, expected)
