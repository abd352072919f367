"""Texts cut along ranks: the results, gradients and errors of one process."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import distributed_jobs as jobs
import pytest
import torch
from compare import assert_fair, largest_error
from oracles import outputs_and_gradients, scores_of_kind, visible_keys
from processes import Processes
from test_nn import make_hidden, make_layer
from torch import Tensor

from flash_sparse_attn.reference import attention_reference

SIZES = (2, 3, 4)
HEADS, KV_HEADS, DIM = 4, 2, 8


@pytest.fixture(scope="module")
def processes(tmp_path_factory: Any) -> Iterator[Processes]:
    processes = Processes(max(SIZES), tmp_path_factory.mktemp("processes"))
    yield processes
    processes.stop()


@pytest.fixture(params=SIZES, ids="{} ranks".format)
def size(request: pytest.FixtureRequest) -> int:
    return request.param


def make(total: int, kind: str = "random", dtype: torch.dtype = torch.float64) -> jobs.Inputs:
    """Inputs and upstream gradient of a text of `total` tokens for all ranks together."""
    generator = torch.Generator().manual_seed(total)

    def randn(heads: int) -> Tensor:
        return torch.randn(2, total, heads, DIM, generator=generator).to(dtype)

    score_dtype = torch.promote_types(dtype, torch.float32)
    return {
        "query": randn(HEADS),
        "key": randn(KV_HEADS),
        "value": randn(KV_HEADS),
        "scores": scores_of_kind(kind, (2, KV_HEADS, total), generator).to(score_dtype),
        "grad": 0.25 * randn(HEADS),
    }


def shares(size: int, total: int, uneven: bool) -> list[int]:
    """Tokens of every rank: about as many for each, or a few, none, and most."""
    if uneven:
        few = [3, 0, 5][: size - 1]
        return [*few, total - sum(few)]
    return [total // size + (rank < total % size) for rank in range(size)]


def joined(shards: list[jobs.Inputs], packed: bool = False) -> jobs.Inputs:
    """What all ranks hold together."""
    where = {"out": 1, "lse": 2, "dquery": 1, "dkey": 1, "dvalue": 1, "dscores": 2}
    return {
        name: torch.cat([shard[name] for shard in shards], dim=where[name] - packed)
        for name in where
    }


def check(results: jobs.Inputs, inputs: jobs.Inputs, mask: Tensor) -> None:
    """Compare with the fp64 reference of the whole text under the mask of the definition."""

    def reference(query: Tensor, key: Tensor, value: Tensor, scores: Tensor) -> Tensor:
        return attention_reference(query, key, value, mask, scores[:, :, None])[0]

    leaves = {name: inputs[name] for name in ("query", "key", "value", "scores")}
    exact = {name: tensor.double() for name, tensor in leaves.items()}
    truth = outputs_and_gradients(reference, exact, inputs["grad"])
    plain = outputs_and_gradients(reference, leaves, inputs["grad"])
    lse = attention_reference(*exact_qkv(exact), mask, exact["scores"][:, :, None])[1]
    assert largest_error(results["lse"], lse, "lse") <= 1e-5
    for name, expected in truth.items():
        if results[name].dtype == torch.float64:
            assert largest_error(results[name], expected, name) <= 1e-11
        else:
            assert_fair(results[name], expected, plain[name], name)


def exact_qkv(inputs: jobs.Inputs) -> list[Tensor]:
    return [inputs[name] for name in ("query", "key", "value")]


def mask_of(inputs: jobs.Inputs, window: int, **keep: Any) -> Tensor:
    return visible_keys(inputs["scores"], window, "causal", **keep)


@pytest.mark.parametrize("uneven", [False, True], ids=["even", "uneven"])
@pytest.mark.parametrize("kind", ["random", "equal", "rising", "falling", "few values"])
def test_one_text_on_many_ranks(processes, size, kind, uneven):
    inputs = make(40, kind)
    shards = processes.run(size, jobs.attend, inputs, shares(size, 40, uneven), 6, {})
    check(joined([shard[0] for shard in shards]), inputs, mask_of(inputs, 6))


@pytest.mark.parametrize("window", [1, 11, 25, 10**9])
def test_windows_of_any_size(processes, size, window):
    """Also those that hold more than the first ranks, or everything."""
    inputs = make(40)
    shards = processes.run(size, jobs.attend, inputs, shares(size, 40, False), window, {})
    check(joined([shard[0] for shard in shards]), inputs, mask_of(inputs, window))


def test_kept_keys_and_padding(processes, size):
    """First and recent keys are those of the whole text, and padding does not count."""
    inputs = make(40, "few values")
    mask = torch.rand(2, 40, generator=torch.Generator().manual_seed(1)) < 0.7
    mask[0, :12] = False  # more than a shard of padding
    inputs["key_mask"] = mask
    keep = {"keep_first": 3, "keep_recent": 4}
    for uneven in (False, True):
        lengths = shares(size, 40, uneven)
        shards = processes.run(size, jobs.attend, inputs, lengths, 5, keep)
        check(joined([s[0] for s in shards]), inputs, mask_of(inputs, 5, key_mask=mask, **keep))


@pytest.mark.parametrize("kind", ["random", "equal"])
def test_several_rounds(processes, size, kind):
    """As between more than eight ranks, where sets travel on with those they were merged into."""
    inputs, keep = make(40, kind), {"keep_first": 2, "keep_recent": 3}
    for window, options in ((6, {}), (4, keep), (100, {})):
        lengths = shares(size, 40, kind == "equal")
        shards = processes.run(size, jobs.attend, inputs, lengths, window, options, fan=2)
        check(joined([s[0] for s in shards]), inputs, mask_of(inputs, window, **options))


def test_in_single_precision_and_again(processes, size):
    """Within the error rule, and bit for bit the same each time."""
    inputs = make(64, dtype=torch.float32)
    lengths = shares(size, 64, False)
    for fan in (8, 2):
        shards = processes.run(
            size, jobs.attend, inputs, lengths, 9, {"deterministic": True}, fan, repeats=3
        )
        check(joined([shard[0] for shard in shards]), inputs, mask_of(inputs, 9))
        for first, *others in shards:
            for again in others:
                assert all(torch.equal(first[name], again[name]) for name in first)


def pack(inputs: jobs.Inputs, borders: list[int]) -> jobs.Inputs:
    """The first batch entry as packed sequences."""
    packed = {name: tensor[0] for name, tensor in inputs.items()}
    return packed | {"cu_seqlens": torch.tensor(borders, dtype=torch.int32)}


# One text over all ranks; texts that end where a rank ends; short, empty and long ones.
BORDERS = (
    [0, 48],
    [0, 12, 16, 24, 36, 48],
    [0, 0, 5, 6, 6, 31, 33, 48, 48],
    [0, 3, 18, 47, 48],
)


@pytest.mark.parametrize("borders", BORDERS, ids=str)
def test_packed_sequences(processes, size, borders):
    """Each sees itself only, wherever the ranks cut it."""
    kind = "few values" if len(borders) == 9 else "random"
    inputs = make(48, kind)
    real = torch.ones(48, dtype=torch.bool)
    if len(borders) == 9:
        real[[7, 8, 20, 32]] = False
    for keep, fan, uneven in (
        ({}, 8, False),
        ({"keep_first": 2, "keep_recent": 2}, 8, True),
        ({}, 2, False),
    ):
        mask = torch.zeros(1, KV_HEADS, 48, 48, dtype=torch.bool)
        for begin, end in pairwise(borders):
            part = {"scores": inputs["scores"][:1, :, begin:end]}
            only = {"key_mask": real[None, begin:end]}
            mask[..., begin:end, begin:end] = mask_of(part, 4, **only, **keep)
        packed = pack(inputs, borders) | {"key_mask": real}
        lengths = shares(size, 48, uneven)
        shards = processes.run(size, jobs.attend, packed, lengths, 4, keep, fan)
        results = joined([shard[0] for shard in shards], packed=True)
        whole = {name: tensor[:1] for name, tensor in inputs.items()}
        check({name: tensor[None] for name, tensor in results.items()}, whole, mask)


@pytest.mark.parametrize("packed", [False, True], ids=["one text", "packed"])
def test_no_row_depends_on_what_comes_later(processes, size, packed):
    """Changing a token leaves all earlier rows as they are, bit for bit, also on other ranks."""
    inputs = make(48, dtype=torch.float32)
    changed = {name: tensor.clone() for name, tensor in inputs.items()}
    at = 29
    for name in ("query", "key", "value"):
        changed[name][:, at] += 3
    changed["scores"][..., at] = 100.0
    lengths = shares(size, 48, False)
    rows = []
    for version in (inputs, changed):
        version = pack(version, [0, 5, 40, 48]) if packed else version
        shards = processes.run(size, jobs.attend, version, lengths, 6, {"keep_recent": 1})
        rows.append(joined([shard[0] for shard in shards], packed)["out"])
    before, after = rows if packed else [out.transpose(0, 1) for out in rows]
    assert torch.equal(before[:at], after[:at])
    assert not torch.equal(before[at + 7], after[at + 7])  # which may be on another rank


def test_bytes_that_travel(processes, size):
    """W rows come from each earlier rank, and W rows of gradients from each later one."""
    window = 16
    inputs = make(16 * 4 * size, dtype=torch.bfloat16)
    received = processes.run(size, jobs.count_traffic, inputs, window)
    rows = 2 * KV_HEADS * window  # for both batch entries
    for rank, (forward, both) in enumerate(received):
        # Keys and values, and a word each for the score and whether the key is real.
        assert forward == rank * rows * (2 * DIM * 2 + 8)
        assert both - forward == (size - 1 - rank) * rows * (2 * DIM + 1) * 4


def test_arguments_that_do_not_fit(processes, size):

    def message(**arguments: Any) -> str:
        outcomes = processes.outcomes(size, jobs.call, [arguments] * size)
        assert not any(ok for ok, _ in outcomes)
        return outcomes[0][1]

    assert "mesh: expected a DeviceMesh or a ProcessGroup, got str" in message(mesh="context")
    assert "query: expected as many tokens as key, 4, got 5" in message(
        query=torch.zeros(1, 5, 2, 4)
    )
    assert "shard_lengths: expected the tokens of each of" in message(shard_lengths=[4])
    for name, value in (("window_size", 3), ("key_mask", torch.ones(1, 4, dtype=torch.bool))):
        outcomes = processes.outcomes(size, jobs.call, [{}] * (size - 1) + [{name: value}])
        for ok, text in outcomes:
            assert not ok and f"{name}: expected the same on every rank of the mesh" in text
    short = {"query": torch.zeros(1, 3, 2, 4), "scores": torch.zeros(1, 1, 3)}
    short |= {name: torch.zeros(1, 3, 1, 4) for name in ("key", "value")}
    outcomes = processes.outcomes(size, jobs.call, [{}] * (size - 1) + [short])
    assert all(not ok and "shard_lengths[" in text for ok, text in outcomes)


LAYER_INPUTS = {
    "rows": {},
    "padding": {"key_mask": torch.arange(40) >= torch.tensor([[15], [0]])},
    "packed": {"cu_seqlens": torch.tensor([0, 7, 33, 40], dtype=torch.int32)},
}


@pytest.mark.parametrize("kind", LAYER_INPUTS)
def test_layer(processes, size, kind):
    """The layer with a mesh, its rotary embedding included: outputs and gradients of one process.

    Scores have the same bits, so that the choice is the same.
    """
    layer, options = (
        make_layer(dtype=torch.float64, keep_first=1, keep_recent=2),
        LAYER_INPUTS[kind],
    )
    hidden = make_hidden(dtype=torch.float64)
    hidden = hidden[0] if kind == "packed" else hidden
    generator = torch.Generator().manual_seed(2)
    grad = torch.randn(hidden.shape, generator=generator, dtype=torch.float64)
    if "key_mask" in options:  # rows of padding mean nothing
        grad *= options["key_mask"][..., None]
    copy_of_layer = copy.deepcopy(layer)
    leaf = hidden.clone().requires_grad_()
    expected = copy_of_layer(leaf, **options)
    expected.backward(grad)
    for uneven in (False, True):
        lengths = shares(size, 40, uneven)
        results = processes.run(size, jobs.run_layer, layer, hidden, grad, lengths, options)
        dim = 0 if kind == "packed" else 1
        for name, whole in (("out", expected), ("dhidden", leaf.grad)):
            found = torch.cat([result[name] for result in results], dim)
            torch.testing.assert_close(found, whole, rtol=1e-6, atol=1e-6)
        for name, parameter in copy_of_layer.named_parameters():
            found = sum(result[name] for result in results)
            torch.testing.assert_close(found, parameter.grad, rtol=1e-5, atol=1e-5)


def test_layer_with_sharded_parameters(processes):
    """FSDP2 averages gradients over the ranks, which hold parts of the same texts."""
    layer, hidden = make_layer(dtype=torch.float64), make_hidden(dtype=torch.float64)
    grad = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2)).double()
    results = processes.run(4, jobs.run_sharded_layer, layer, hidden, grad)
    expected = layer(hidden)
    expected.backward(grad)
    found = torch.cat([result["out"] for result in results], dim=1)
    torch.testing.assert_close(found, expected)
    for name, parameter in layer.named_parameters():
        for result in results:
            found = 4 * result[name]
            torch.testing.assert_close(found, parameter.grad, rtol=1e-5, atol=1e-5)


def test_layer_refuses_what_a_mesh_cannot_do():
    with pytest.raises(ValueError, match="mode: expected 'causal' with a mesh, got 'relu'"):
        make_layer(mode="relu", is_causal=True, mesh="mesh")
    layer = make_layer(mesh="mesh")
    with pytest.raises(ValueError, match="cache: expected None with a mesh"):
        layer(make_hidden(), cache=layer.make_cache(2))
    with pytest.raises(ValueError, match="shard_lengths: expected None without a mesh"):
        make_layer()(make_hidden(), shard_lengths=[40])


# The shape of a mesh of four ranks, and what each of its dimensions shards: the batch, the tokens,
# the heads ("n"), or nothing.
SHARDINGS = (
    ((2, 2), "bn"),
    ((2, 2), "bt"),
    ((2, 2), "tn"),
    ((2, 2), " n"),
    ((1, 2, 2), "bnt"),
    ((4,), "t"),
)


@pytest.mark.parametrize(("shape", "letters"), SHARDINGS, ids=str)
def test_distributed_tensors(processes, shape, letters):
    inputs = make(21)  # tokens that do not divide
    mask = torch.rand(2, 21, generator=torch.Generator().manual_seed(1)) < 0.8
    for options in ({}, {"key_mask": mask}):
        given = inputs | options
        keep = {"keep_first": 1, "keep_recent": 2}
        shards = processes.run(4, jobs.attend_sharded, shape, list(letters), given, 5, keep)
        names = ("out", "lse", "dquery", "dkey", "dvalue", "dscores")
        for shard in shards:
            whole = dict(zip(names, shard, strict=True))
            check(whole, inputs, mask_of(inputs, 5, **options, **keep))


def test_distributed_tensors_that_do_not_fit(processes):
    inputs = make(8)
    inputs = {
        name: tensor[:, :, :1] if name in ("key", "value") else tensor
        for name, tensor in inputs.items()
    }
    inputs["scores"] = inputs["scores"][:, :1]
    for letters, text in (
        ("tt", "query: expected tokens sharded on one dimension of the mesh, got 0 and 1"),
        ("bn", "key: expected KV heads that divide among 2 ranks, got 1"),
    ):
        outcomes = processes.outcomes(4, jobs.attend_sharded, (2, 2), list(letters), inputs, 5, {})
        assert all(not ok and text in message for ok, message in outcomes)


def test_meshes(processes):
    """A mesh, and one of its dimensions."""
    inputs, size = make(24), max(SIZES)
    for kind in ("mesh", "named"):
        results = processes.run(size, jobs.attend_on, kind, inputs, 5)
        check(joined(results), inputs, mask_of(inputs, 5))
    outcomes = processes.outcomes(size, jobs.attend_on, "2-D", inputs, 5)
    assert all("mesh: expected one dimension, got 2" in text for _, text in outcomes)


def test_one_rank(processes):
    inputs = make(24)
    ((result,),) = processes.run(1, jobs.attend, inputs, [24], 5, {})
    check(result, inputs, mask_of(inputs, 5))
    received = processes.run(1, jobs.count_traffic, inputs, 5)
    assert received == [[0, 0]]


def test_a_rank_that_does_not_come_is_an_error_in_time(processes):
    seconds = processes.run(max(SIZES), jobs.miss_a_call)
    assert all(2 <= spent < 20 for spent in seconds[:-1])


def test_a_rank_that_dies_is_an_error(tmp_path):
    processes = Processes(2, tmp_path)
    try:
        outcomes = processes.outcomes(2, jobs.die)
        assert [ok for ok, _ in outcomes] == [False, False]
        assert "RuntimeError" in outcomes[0][1] and "is gone" in outcomes[1][1]
    finally:
        processes.stop()
