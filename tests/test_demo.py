"""The demo: its task, its models, and that what it concludes comes from its numbers."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from flash_sparse_attn import DynamicMaskAttention, __main__, info
from flash_sparse_attn.bench.console import Progress
from flash_sparse_attn.demo import cost, decode, model, recall, text, training
from flash_sparse_attn.demo.model import ModelConfig, PlainAttention, SmallModel

SIZES = ModelConfig(
    tokens=256, classes=256, width=32, layers=2, heads=4, kv_heads=2, head_dim=16, window=6
)
CPU = torch.device("cpu")


def test_every_question_has_its_answer_in_the_text():
    generator = torch.Generator().manual_seed(0)
    tokens, values, places = recall.make_sequences(50, 128, 16, generator)
    assert tokens.shape == (50, 128) and values.shape == places.shape == (50, 16)
    symbols = recall.SYMBOLS
    for sequence, answers, begins in zip(tokens, values, places, strict=True):
        context, questions = sequence[:-16], sequence[-16:]
        assert (context < symbols).sum() == (context // symbols == 1).sum() == recall.PAIRS
        assert len(context[context < symbols].unique()) == recall.PAIRS
        assert torch.equal(context[begins], questions)
        assert torch.equal(context[begins + 1], answers + symbols)
        assert len(questions[:8].unique()) == len(questions[8:].unique()) == recall.PAIRS


def test_stages_follow_each_other():
    settings = recall.RecallSettings(stages=((2, 64, 8), (1, 128, 4)))
    assert [settings.size_at(step) for step in range(3)] == [(64, 8), (64, 8), (128, 4)]
    assert settings.steps == 3 and settings.length == 128
    with pytest.raises(IndexError):
        settings.size_at(3)


def same_weights(kind, config):
    """A comparison model and a dynamic one with its weights; A is 0, as at the start."""
    torch.manual_seed(0)
    plain, dynamic = SmallModel(config, kind), SmallModel(config, "dynamic")
    missing = dynamic.load_state_dict(plain.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert {name.split(".")[-2] for name in missing.missing_keys} == {"attention", "dt_proj"}
    return plain, dynamic


@pytest.mark.parametrize("kind", ["full", "window"])
def test_only_the_visible_keys_differ_between_the_models(kind):
    config = replace(SIZES, window=64 if kind == "full" else 6)
    plain, dynamic = same_weights(kind, config)
    tokens = torch.randint(256, (2, 40))
    torch.testing.assert_close(plain(tokens), dynamic(tokens), rtol=1e-4, atol=1e-5)


def test_the_sliding_window_reads_its_newest_keys():
    torch.manual_seed(0)
    attention = PlainAttention(SIZES, window=6)
    hidden = torch.randn(1, 30, 32)
    changed = hidden.clone()
    changed[:, 10] += 1
    different = (attention(hidden) != attention(changed)).any(-1)[0].nonzero().flatten()
    assert different.tolist() == list(range(10, 16))


def test_recent_keys_are_part_of_the_window():
    layer = next(SmallModel(replace(SIZES, recent=2), "dynamic").dynamic_layers())
    assert isinstance(layer, DynamicMaskAttention)
    assert (layer.window_size, layer.attention["keep_recent"]) == (4, 2)


def test_only_dynamic_models_have_caches():
    with pytest.raises(TypeError, match="expected a 'dynamic' model, got 'full'"):
        SmallModel(SIZES, "full").make_caches(1)


@pytest.mark.parametrize("kind", model.KINDS)
def test_training_lowers_the_loss(kind):
    torch.manual_seed(0)
    tokens = torch.randint(256, (2, 24))
    net = SmallModel(SIZES, kind)

    def loss(_):
        return F.cross_entropy(net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    with Progress("train", 40) as bar:
        losses = training.train(net, loss, 40, 1e-2, bar)
    assert len(losses) == 40 and losses[-1] < 0.5 * losses[0]


def test_the_corpus_is_the_same_every_time_and_nothing_is_in_both_parts():
    corpus = text.read_corpus()
    again = text.read_corpus()
    assert corpus.digest == again.digest and len(corpus.digest) == 64
    assert len(corpus.train) > 5 * len(corpus.held_out) > 250_000
    piece = bytes(corpus.held_out[1000:1200].tolist())
    assert piece not in bytes(corpus.train.tolist())


def test_decoding_is_compared_with_one_pass_over_the_text():
    torch.manual_seed(0)
    net = SmallModel(replace(SIZES, recent=2), "dynamic")
    for layer in net.dynamic_layers():
        torch.nn.init.ones_(layer.A)  # scores that differ
    written = torch.randint(256, (300,), dtype=torch.uint8)
    found = decode.run(decode.QUICK, net, written, CPU)
    assert found["error"] <= 2 * found["plain_error"] + 1e-5
    assert found["same_choice"] == 1.0
    assert len(found["tokens"]) == decode.QUICK.prompt + decode.QUICK.generated
    expected = sum(cache.nbytes for cache in net.make_caches(1))
    assert set(found["sizes"]) == {step["cache_bytes"] for step in found["steps"]} == {expected}
    assert "exact up to rounding" in decode.describe(found)
    assert "NOT EXACT" in decode.describe({**found, "error": 1e-3})
    assert "CHANGES ITS SIZE" in decode.describe({**found, "sizes": [1, 2]})


def recall_results(window, dynamic):
    def result(accuracy):
        common = {"parameters": 1, "losses": [1.0], "far_share": 0.7}
        return {**common, "accuracy": accuracy, "far_accuracy": accuracy}

    kept = {"mask": torch.ones(4, 8).bool(), "is_pair": torch.zeros(8).bool(), "kv_heads": 2}
    models = {"full": result(1.0), "window": result(window), "dynamic": result(dynamic)}
    return {"settings": recall.QUICK, "models": models, "kept": kept}


def test_recall_concludes_from_its_accuracies():
    assert "Answer: yes" in recall.describe(recall_results(0.3, 0.8))
    assert "Answer: NOT SHOWN" in recall.describe(recall_results(0.3, 0.4))


def test_text_concludes_from_its_losses():
    def answer(full, dynamic):
        losses = {"full": full, "window": 2.0, "dynamic": dynamic}
        models = {
            kind: {"parameters": 1, "losses": [loss], "held_out": loss}
            for kind, loss in losses.items()
        }
        found = {"settings": text.QUICK, "corpus": text.read_corpus(), "models": models}
        return " ".join(text.describe(found).split())

    assert "Answer: yes." in answer(2.1, 2.05)
    assert "0.050 below that of full attention and 0.050 above" in answer(2.1, 2.05)
    assert "Answer: NOT SHOWN." in answer(1.8, 2.05)
    assert "Answer: NOT SHOWN." in answer(5.0, 5.0)


def cost_results(ours, dense, load=None):
    def result(seconds):
        return {"seconds": {"total": seconds}, "peak_bytes": None, "other_load": load}

    measured = {
        "ours": {1024: result(1.0), 2048: result(ours)},
        "sdpa-causal": {1024: result(0.5), 2048: result(dense)},
        "sdpa-masked": {1024: result(3.0)},
    }
    case = cost.make_case(cost.QUICK, 1024, CPU)
    return {"case": case, "measured": measured, "errors": {"ours": 1e-6}}


def test_cost_concludes_from_its_times():
    faster = " ".join(cost.describe(cost_results(2.0, 8.0)).split())
    assert "2048 the dynamic mask is 4.0 times faster than dense causal SDPA" in faster
    assert "faster from 2048 on" in faster
    slower = " ".join(cost.describe(cost_results(2.0, 1.0)).split())
    assert "2.0 times SLOWER" in slower
    assert "Busy machine" not in cost.describe(cost_results(2.0, 1.0, load=0.05))
    assert "used up to 40% of" in cost.describe(cost_results(2.0, 1.0, load=0.4))


def test_the_whole_demo_in_small(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    arguments = ["demo", "--quick", "--device", "cpu", "--out", str(tmp_path)]
    assert __main__.main(arguments) == 0
    printed = capsys.readouterr().out
    places = [printed.index(f"\n{letter}. ") for letter in "abcd"]
    assert places == sorted(places)
    assert printed.count("Answer:") == 4
    assert {path.name for path in tmp_path.iterdir()} == {"demo.json", "demo.png"}
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((tmp_path / "demo.json").read_text())
    assert numbers["versions"] == info.versions()
    assert set(numbers) >= {"a", "b", "c", "d", "hardware", "commit"}
    assert set(numbers["a"]["models"]) == set(model.KINDS)
    assert numbers["c"]["corpus"]["sha256"] in printed
