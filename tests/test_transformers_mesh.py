"""Models of Transformers over texts cut along ranks: what one process gives for the whole texts."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import Processes
from test_transformers_convert import FIRST, RECENT, WINDOW, converted
from test_transformers_doge import doge
from tiny_models import make, padding, tokens
from torch import Tensor, nn

from flash_sparse_attn.integrations.transformers import (
    SelectionMonitor,
    apply_to_doge,
    convert,
    load_converted,
)

pytestmark = pytest.mark.filterwarnings("ignore")
LENGTH = 48
BORDERS = torch.tensor([0, 7, 30, 31, LENGTH], dtype=torch.int32)


@pytest.fixture(scope="module")
def processes(tmp_path_factory: Any) -> Iterator[Processes]:
    processes = Processes(2, tmp_path_factory.mktemp("processes"))
    yield processes
    processes.stop()


def run(model: nn.Module, grad: Tensor, **inputs: Any) -> dict[str, Tensor]:
    """Logits, and the gradient of every parameter."""
    logits = model(**inputs).logits
    logits.backward(grad)
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"logits": logits.detach(), **grads}


def prepared(name: str, **options: Any) -> nn.Module:
    """A dense Llama or Qwen with dynamic masks, or Doge."""
    if name == "Doge":
        return apply_to_doge(doge(), **options)
    return convert(make(name), WINDOW, keep_recent=RECENT, keep_first=FIRST, **options)


def run_rank(
    group: dist.ProcessGroup, name: str, state: dict[str, Tensor], checkpoints: bool, **inputs: Any
) -> dict[str, Tensor]:
    """`run` of the rank's part of the tokens."""
    model = prepared(name, mesh=group)
    model.load_state_dict(state)
    if checkpoints:
        model.gradient_checkpointing_enable()
        model.train()
    size, rank = group.size(), group.rank()
    for key in ("grad", "input_ids", "attention_mask"):
        if key in inputs:
            inputs[key] = inputs[key].chunk(size, dim=1)[rank]
    return run(model, **inputs)


def compare(processes: Processes, name: str, checkpoints: bool = False, **inputs: Any) -> None:
    model = doge() if name == "Doge" else converted(name)
    model = apply_to_doge(model) if name == "Doge" else model
    state = copy.deepcopy(model.state_dict())
    alone = dict(inputs)
    if "cu_seq_lens_q" in inputs:
        positions = [torch.arange(n) for n in BORDERS.diff().tolist()]
        alone["position_ids"] = torch.cat(positions)[None]
    expected = run(model, **alone, use_cache=False)
    ranks = processes.run(2, run_rank, name, state, checkpoints, **inputs)
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    logits = torch.cat([rank["logits"] for rank in ranks], dim=1)
    torch.testing.assert_close(logits[real], expected["logits"][real], rtol=1e-4, atol=2e-5)
    for parameter in expected:
        if parameter != "logits":
            total = sum(rank[parameter] for rank in ranks)
            text = f"{parameter}: " + "{}"
            torch.testing.assert_close(
                total, expected[parameter], rtol=1e-3, atol=2e-4, msg=text.format
            )


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Doge"])
@pytest.mark.parametrize("kind", [None, "left"])
def test_logits_and_gradients(processes, name, kind):
    """With padding on the left the second rank has none, and takes part all the same."""
    inputs: dict[str, Any] = {"input_ids": tokens(2, LENGTH)}
    grad = torch.randn(2, LENGTH, 300) / 10
    if kind is not None:
        inputs["attention_mask"] = padding(kind, 2, LENGTH)
        grad *= inputs["attention_mask"][..., None]
    compare(processes, name, grad=grad, **inputs)


@pytest.mark.parametrize("name", ["Llama", "Doge"])
def test_packed_texts(processes, name):
    borders = {"cu_seq_lens_q": BORDERS, "cu_seq_lens_k": BORDERS}
    grad = torch.randn(1, LENGTH, 300) / 10
    compare(processes, name, grad=grad, input_ids=tokens(1, LENGTH), **borders)


def test_activation_checkpoints(processes):
    grad = torch.randn(2, LENGTH, 300) / 10
    compare(processes, "Llama", True, grad=grad, input_ids=tokens(2, LENGTH))


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["Llama", "Doge"])
def test_what_a_mesh_cannot_do(group, name):
    model = prepared(name, mesh=group)
    ids = tokens(1, 20)
    with pytest.raises(ValueError, match=r"past_key_values: expected None with a mesh.*use_cache"):
        model(ids, use_cache=True)
    with pytest.raises(ValueError, match="past_key_values: expected None with a mesh"):
        model.generate(ids, max_new_tokens=2)
    anew = torch.arange(10).repeat(2)[None]
    with pytest.raises(ValueError, match="position_ids: packed texts with a mesh need cu_seq_lens"):
        model(ids, position_ids=anew)
    borders = torch.tensor([0, 20, 40], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seq_lens_q: expected one row of tokens"):
        model(tokens(2, 20), position_ids=anew, cu_seq_lens_q=borders, cu_seq_lens_k=borders)
    with pytest.raises(ValueError, match="SelectionMonitor: expected layers without mesh"):
        step = type("State", (), {"global_step": 0})
        SelectionMonitor(every=1).on_step_begin(None, step, None, model=model)


def test_models_that_do_not_fit_a_mesh_stay_as_they_are(group):
    model = make("Llama")
    with pytest.raises(
        ValueError, match="window_size: expected a size for every layer with a mesh"
    ):
        convert(model, [WINDOW, None], mesh=group)
    with pytest.raises(TypeError, match="mesh"):
        convert(model, WINDOW, mesh="cpu")
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(ValueError, match="mesh: expected rotary embeddings of fixed frequencies"):
        convert(model, WINDOW, mesh=group)
    assert type(model.model.layers[0].self_attn).__name__ == "LlamaAttention"


def test_saved_and_loaded_along_a_mesh_and_without(group, tmp_path):
    """One rank is one process; the mesh is no part of what is saved."""
    model = converted("Llama")
    expected = model(tokens(1, 40)).logits
    model.save_pretrained(tmp_path)
    along = load_converted(tmp_path, mesh=group)
    torch.testing.assert_close(along(tokens(1, 40)).logits, expected, rtol=1e-4, atol=1e-5)
    assert "mesh" not in along.config.dynamic_mask
    along.save_pretrained(tmp_path / "again")
    alone = load_converted(tmp_path / "again")
    torch.testing.assert_close(alone(tokens(1, 40)).logits, expected, rtol=1e-4, atol=1e-5)
    assert alone(tokens(1, 40)).past_key_values is not None


def test_doge_leaves_a_mesh(group):
    model = apply_to_doge(doge(), mesh=group)
    assert model(tokens(1, 20)).past_key_values is None
    apply_to_doge(model)
    assert model(tokens(1, 20)).past_key_values is not None
