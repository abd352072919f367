"""Models of Transformers on a GPU: kernels behind Doge and conversion, caches, compiled steps."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracles import check_attention
from test_transformers_convert import converted
from test_transformers_doge import doge, fast
from test_transformers_training import ACCELERATED, run_two
from tiny_models import make, make_minimax, padding, tokens, transformers, with_attention

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]
DTYPES = [torch.bfloat16, torch.float16]
ROOT = Path(__file__).resolve().parents[2]


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


@pytest.mark.parametrize("kind", [None, "right"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sparse_layer_of_minimax(dtype, kind, monkeypatch):
    """What the model hands to the registered function, with its own lists: every element, and all
    gradients, against fp64."""
    functions = transformers.AttentionInterface._global_mapping
    function, calls = functions["fsa"], []

    def record(*args, **keywords):
        calls.append((args, keywords))
        return function(*args, **keywords)

    monkeypatch.setitem(functions, "fsa", record)
    model = with_attention(make_minimax(), "fsa").cuda().to(dtype)
    mask = padding(kind, 2, 140)
    mask = None if mask is None else mask.cuda()
    model(tokens(2, 140).cuda(), attention_mask=mask)
    ((args, keywords),) = [call for call in calls if call[1]["block_indices"] is not None]
    module, *rows, given = args
    lists, size = keywords["block_indices"], module.indexer.block_size
    assert lists.shape == (2, 2, 140, 3) and bool((lists == -1).any())
    blocks = torch.arange(140, device="cuda") // size
    visible = (lists[..., None] == blocks).any(3)
    if kind is not None:
        assert given.shape == (2, 140) and not bool(given.all())
        visible &= given[:, None, None]

    def attend(query, key, value):
        turned = (x.transpose(1, 2) for x in (query, key, value))
        return function(module, *turned, given, **keywords)[0]

    rows = [x.transpose(1, 2).to(dtype) for x in rows]
    check_attention(attend, *rows, visible, is_causal=True, softmax_scale=keywords["scaling"])


@pytest.mark.parametrize("dtype", DTYPES)
def test_minimax_against_eager(dtype):
    """Half-precision eager lists other blocks at near-ties: its error is the yardstick."""
    plain = make_minimax().cuda()
    fair, error = 0.0, 0.0
    for seed in range(4):
        text = tokens(2, 140, seed)
        truth = hidden(copy.deepcopy(plain).double(), text)
        for name in ("eager", "fsa"):
            found = hidden(with_attention(plain, name).to(dtype), text)
            distance = float((found - truth).norm() / truth.norm()) / 4
            fair, error = (fair + distance, error) if name == "eager" else (fair, error + distance)
    assert error <= 2 * fair + 1e-2


def test_training_sharded_by_accelerate_equals_plain():
    """FSDP2 over two GPUs, bf16."""
    pytest.importorskip("accelerate")
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    run_two(ACCELERATED, gpus=True)


def run_example(name, folder, *arguments):
    """Run an example with tiny sizes on the GPU, as its users do; its output and numbers."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("accelerate")
    command = [sys.executable, ROOT / "examples" / f"{name}.py", "--quick", "--out", folder]
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment["CUDA_VISIBLE_DEVICES"] = "0"  # the Trainer would take all
    done = subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # What runs in fp32 on a GPU warns of that.
    assert "eager backend" not in done.stderr
    numbers = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    assert numbers["dtype"] == "bf16" and "in bf16" in " ".join(done.stdout.split())
    assert (folder / f"{name}.png").stat().st_size > 10_000
    return done.stdout, numbers


def test_the_training_example_and_generating_with_its_model(tmp_path):
    said, numbers = run_example("train_doge", tmp_path)
    assert "keys that outlive a window" in said  # the table
    assert numbers["after"] < numbers["before"] - 0.1
    losses = [row["loss"] for row in numbers["log"]]
    assert losses[-1] < losses[0]
    assert numbers["peak_bytes"] > 0
    said, numbers = run_example("long_generation", tmp_path, "--model", str(tmp_path / "doge"))
    first, last = numbers["ours"][0], numbers["ours"][-1]
    assert last["context"] > first["context"] and last["cache_bytes"] == first["cache_bytes"]
    assert "plain: a token" in said


def test_the_generation_example(tmp_path):
    said, numbers = run_example("long_generation", tmp_path)
    assert "plain: a token" in said
    assert all(len(row["text"]) == 4 for row in (*numbers["ours"], *numbers["plain"]))


def test_the_continuation_example(tmp_path):
    said, numbers = run_example("continue_sparse", tmp_path)
    assert "right after" in said
    assert numbers["training"][-1]["loss"] < numbers["training"][0]["loss"]
    assert len(numbers["curves"]) == 1 + 2 * 2
    assert all(curve[-1]["loss"] < curve[0]["loss"] for curve in numbers["curves"].values())
