"""Adapters, the Trainer, and sharded training of models with this attention."""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_transformers_convert import converted
from test_transformers_doge import doge, fast
from tiny_models import make, tokens, transformers, with_attention
from torch import nn

from flash_sparse_attn.integrations import transformers as integration

pytestmark = pytest.mark.filterwarnings("ignore")
integration.register()
MODELS = {
    "Llama": lambda: with_attention(make("Llama"), "fsa"),
    "Doge": lambda: fast(doge()),
    "converted": lambda: converted("Qwen3"),
}


def losses(model: nn.Module, steps: int = 4) -> list[float]:
    """Of plain training on one batch."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=1e-2)
    found = []
    for _ in range(steps):
        loss = model(input_ids=tokens(2, 40), labels=tokens(2, 40)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("name", MODELS)
def test_lora(name):
    peft = pytest.importorskip("peft")
    base = MODELS[name]()
    expected = base(tokens(2, 40)).logits
    targets = ["q_proj", "v_proj", "o_proj"]
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=targets))
    # Scores now come from the adapted values, which are the same as yet.
    torch.testing.assert_close(model(tokens(2, 40)).logits, expected, rtol=1e-4, atol=1e-5)
    found = losses(model)
    assert found[-1] < found[0]
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained and all("lora_" in n for n in trained)
    after = model(tokens(2, 40)).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(tokens(2, 40)).logits, after, rtol=1e-3, atol=1e-4)


def test_lora_with_trained_scores():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["dt_proj"])
    model = peft.get_peft_model(converted(), config)
    found = losses(model)
    assert found[-1] < found[0]
    trained = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("dt_proj" in n for n in trained)


@pytest.mark.parametrize("name", MODELS)
def test_trainer(tmp_path, name):
    pytest.importorskip("accelerate")
    model = MODELS[name]()
    rows = [{"input_ids": row, "labels": row} for row in tokens(8, 30)]
    monitor = integration.SelectionMonitor(every=1)
    arguments = transformers.TrainingArguments(
        tmp_path,
        max_steps=4,
        per_device_train_batch_size=4,
        gradient_checkpointing=True,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[monitor])
    trainer.train()
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert logged[-1] < logged[0]
    assert bool(monitor.history) == (name != "Llama")


SHARDED = """
import copy, sys
sys.path[:0] = {paths!r}
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from test_transformers_training import MODELS, losses
dist.init_process_group("gloo")
mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
for name in MODELS:
    torch.manual_seed(0)
    model = MODELS[name]()
    expected = losses(copy.deepcopy(model))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    found = losses(model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
dist.destroy_process_group()
print("done", flush=True)
"""


ACCELERATED = """
import copy, sys
sys.path[:0] = {paths!r}
import torch, torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from test_transformers_training import MODELS
from tiny_models import tokens
plugin = None  # on CPUs accelerate copies the model to all processes; it shards on GPUs alone
if {gpus}:
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap")
accelerator = Accelerator(
    cpu=not {gpus}, fsdp_plugin=plugin, mixed_precision="bf16" if {gpus} else "no"
)
assert accelerator.num_processes == 2
for name in MODELS:
    torch.manual_seed(0)
    plain = MODELS[name]().to(accelerator.device)
    text = tokens(2, 40).to(accelerator.device)
    found = []
    for model in (copy.deepcopy(plain), plain):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        backward = torch.Tensor.backward
        if found:
            model, optimizer = accelerator.prepare(model, optimizer)
            kind = "DTensor" if {gpus} else "Parameter"
            assert all(type(parameter).__name__ == kind for parameter in model.parameters())
            backward = accelerator.backward
        losses = []
        for _ in range(4):
            with accelerator.autocast():
                loss = model(input_ids=text, labels=text).loss
            optimizer.zero_grad()
            backward(loss)
            optimizer.step()
            losses.append(loss.item())
        found.append(losses)
    error = 0.1 if {gpus} else 1e-4
    torch.testing.assert_close(found[1], found[0], rtol=error, atol=error)
dist.destroy_process_group()
print("done", flush=True)
"""


def run_two(code: str, gpus: bool = False) -> None:
    """Run a program in two processes that find each other, and see that both come to its end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    here = Path(__file__).resolve().parent
    code = code.format(paths=[str(here.parent / "src"), str(here)], gpus=gpus)
    processes = []
    for rank in range(2):
        environment = os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        environment |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "-W", "ignore", "-c", code]
        processes.append(
            subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    for process in processes:
        out, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
        assert "done" in out


def test_fully_sharded_training_equals_plain():
    """Two processes: the parameters are split, the batches are the same."""
    run_two(SHARDED)


def test_training_with_accelerate_equals_plain():
    pytest.importorskip("accelerate")
    run_two(ACCELERATED)


def test_copies_are_independent():
    model = converted()
    other = copy.deepcopy(model)
    other.model.layers[0].self_attn.A.data += 1
    assert not torch.equal(other(tokens(1, 40)).logits, model(tokens(1, 40)).logits)
    assert type(other.model.layers[0].self_attn) is type(model.model.layers[0].self_attn)
