"""Measuring on a GPU: what is timed are graphs of calls, and they compute what a call does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flash_sparse_attn.bench.cases import CASES, GRADIENTS, make_inputs
from flash_sparse_attn.bench.measure import measure
from flash_sparse_attn.bench.providers import PROVIDERS, run
from flash_sparse_attn.bench.timing import REPLAYS, Clock, player

pytestmark = pytest.mark.gpu

SHORT = replace(CASES["gpu-a"], length=1024, window=128)


@pytest.mark.parametrize("provider", ["ours", "sdpa-causal"])
def test_every_part_is_a_graph(provider):
    found = measure(SHORT, PROVIDERS[provider], repeats=2)
    assert set(found["timing"].values()) == {REPLAYS}
    assert {"forward", "backward"} <= found["timing"].keys() < found["seconds"].keys()


@pytest.mark.parametrize("cold", [True, False])
def test_a_graph_of_calls_computes_what_a_call_does(cold):
    # Others for the call: those of a graph are bound to the stream on which it was recorded.
    (inputs, others), provider = (make_inputs(SHORT), make_inputs(SHORT)), PROVIDERS["ours"]
    run(others, provider, SHORT.window)
    clock = Clock("cuda", cold)

    def attend():
        return provider.attend(inputs, provider.select(inputs, SHORT.window))

    def differentiate():
        return torch.autograd.grad(
            out.result, provider.leaves(inputs), inputs.grad_out, retain_graph=True
        )

    out = player(attend, clock, calls=3)
    gradients = player(differentiate, clock, calls=3)
    assert out.timing == gradients.timing == REPLAYS
    with torch.no_grad():
        for name in ("query", "scores", "grad_out"):
            noise = torch.randn_like(getattr(inputs, name))
            getattr(inputs, name).copy_(noise)
            getattr(others, name).copy_(noise)
    out.seconds()
    gradients.seconds()
    found = dict(zip(GRADIENTS, gradients.result, strict=True))
    for name, expected in run(others, provider, SHORT.window).items():
        assert torch.equal({"out": out.result, **found}[name], expected), name
