"""The benchmark frame: formulas, the gate on correctness, memory, rows, verdicts, whole files."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flash_sparse_attn import WindowCache, __main__, dispatch, info, select_keys
from flash_sparse_attn.bench import (
    cli,
    compiling,
    console,
    figures,
    machine,
    measure,
    providers,
    store,
    timing,
    yardsticks,
)
from flash_sparse_attn.bench.cases import (
    CASES,
    MASKS,
    PATTERNS,
    Case,
    make_inputs,
    make_scores,
    mask_elements,
)
from flash_sparse_attn.bench.providers import PROVIDERS, WrongResult, verify

SMOKE = CASES["cpu-smoke"]
TINY = Case("tiny", "attention", 1, 4, 2, 48, 8, 12)


def change(monkeypatch, name, **fields):
    monkeypatch.setitem(PROVIDERS, name, replace(PROVIDERS[name], **fields))


@pytest.mark.parametrize("window", [1, 12, 48, 100])
def test_pairs_are_the_visible_triples_of_the_mask(window):
    case = replace(TINY, window=window, batch=2)
    scores = make_scores(case, torch.Generator().manual_seed(0))
    group = case.heads // case.kv_heads
    assert case.pairs() == int(providers.window_mask(scores, window).sum()) * group
    dense = torch.ones(case.length, case.length).tril().sum()
    assert case.pairs(dense=True) == int(dense) * case.heads * case.batch


def test_flops_are_four_per_pair_and_channel_and_two_and_a_half_times_that_backward():
    assert TINY.flops() == 3.5 * 4 * TINY.head_dim * TINY.pairs()
    assert replace(TINY, what="selection").flops() == 0


def test_least_traffic_counts_every_tensor_of_every_pass():
    inputs = make_inputs(TINY)
    query, key, scores = inputs.query.nbytes, inputs.key.nbytes, inputs.scores.nbytes
    lse = 4 * TINY.heads * TINY.length
    selection = scores + 2 * scores  # scores in; start and expiry, int32, out
    forward = query + 2 * key + scores + query + lse
    backward = 3 * query + 2 * key + scores + lse + query + 2 * key + scores
    assert TINY.min_bytes() == selection + forward + backward


def test_patterns_are_what_their_names_say():
    found = {
        name: make_scores(
            replace(TINY, pattern=name, length=4096), torch.Generator().manual_seed(0)
        )
        for name in PATTERNS
    }
    assert len(found["random"].unique()) > 4000
    assert len(found["equal"].unique()) == 1
    assert (found["ascending"].diff() > 0).all()
    assert (found["descending"].diff() < 0).all()
    assert len(found["values95"].unique()) == 95


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_mask_of_the_definition_is_the_selection(pattern):
    scores = make_scores(replace(TINY, pattern=pattern), torch.Generator().manual_seed(0))
    assert torch.equal(select_keys(scores, 12).to_dense(), providers.window_mask(scores, 12))


def test_the_mask_of_topk_is_the_mask_of_the_definition_for_distinct_scores():
    scores = make_scores(TINY, torch.Generator().manual_seed(0))
    for window in (1, 12, 48):
        masks = (make(scores, window) for make in (providers.top_keys_mask, providers.window_mask))
        assert torch.equal(*masks)


@pytest.mark.parametrize("name", ["sdpa-additive", "sdpa-masked", "sdpa-causal"])
def test_the_fastest_kernels_of_pytorch_come_first(name, monkeypatch):
    """Whatever ran before: the usual order can be lost in a process, and the math comes early."""
    orders = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def noted(*args, **options):
        orders.append(torch._C._get_sdp_priority_order())
        return attention(*args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    usual = torch._C._get_sdp_priority_order()
    providers._verified.cache_clear()
    verify(TINY, name)
    backend = torch.nn.attention.SDPBackend
    first = (backend.CUDNN_ATTENTION, backend.FLASH_ATTENTION, backend.EFFICIENT_ATTENTION)
    assert orders and all(order[:3] == [int(one) for one in first] for order in orders)
    assert torch._C._get_sdp_priority_order() == usual


@pytest.mark.parametrize("name", ["ours", "ours-eager", "sdpa-masked", "sdpa-causal", "reference"])
def test_right_providers_pass_the_error_rule(name):
    errors = verify(TINY, name)
    assert set(errors) >= {"out", "query", "key", "value"}
    assert ("scores" in errors) is not PROVIDERS[name].dense
    assert max(errors.values()) < 1e-4


def test_a_wrong_output_is_refused(monkeypatch):
    right = PROVIDERS["ours"].attend
    change(monkeypatch, "ours", attend=lambda inputs, mask: right(inputs, mask) + 1e-3)
    with pytest.raises(WrongResult, match="out is off by"):
        verify(TINY, "ours")


def test_a_wrong_gradient_of_the_scores_is_refused(monkeypatch):
    right = PROVIDERS["ours"].attend

    def without_bias_gradient(inputs, mask):
        return right(replace(inputs, scores=inputs.scores.detach()), mask) + 0 * inputs.scores.sum()

    change(monkeypatch, "ours", attend=without_bias_gradient)
    with pytest.raises(WrongResult, match="scores is off by"):
        verify(TINY, "ours")


def test_nan_is_refused(monkeypatch):
    right = PROVIDERS["ours"].attend
    change(monkeypatch, "ours", attend=lambda inputs, mask: right(inputs, mask) * float("nan"))
    with pytest.raises(WrongResult, match="off by nan"):
        verify(TINY, "ours")


def test_a_wrong_selection_is_refused(monkeypatch):
    case = replace(TINY, what="selection")
    assert verify(case, "ours") == {"wrong_pairs": 0.0}
    change(
        monkeypatch, "ours", select=lambda inputs, window: select_keys(inputs.scores, window + 1)
    )
    with pytest.raises(WrongResult, match="visible pairs differ"):
        verify(case, "ours")


def test_cases_that_are_one_problem_when_reduced_are_verified_once(monkeypatch):
    """Under the name of each, a wrong result is refused all the same."""
    made = []
    monkeypatch.setattr(
        providers, "make_inputs", lambda case, seed: made.append(case) or make_inputs(case, seed)
    )
    long = replace(TINY, name="long", length=4096)
    longer = replace(TINY, name="longer", length=8192)
    change(monkeypatch, "ours", what="of this test")
    errors = verify(long, "ours")
    errors["out"] = 1.0
    assert verify(longer, "ours")["out"] < 1e-4 and len(made) == 1
    verify(replace(longer, head_dim=16), "ours")
    verify(longer, "reference")
    assert len(made) == 3
    right = PROVIDERS["ours"].attend
    change(monkeypatch, "ours", attend=lambda inputs, mask: 0 * right(inputs, mask))
    for case in (long, longer):
        with pytest.raises(WrongResult, match=f"^ours on {case.name}: out is off by"):
            verify(case, "ours")


MASKED = replace(TINY, mask="pairs", providers=("ours",))


@pytest.mark.parametrize("bias", ["keys", "pairs"])
@pytest.mark.parametrize("kind", MASKS)
def test_bool_masks_and_biases_pass_the_error_rule_on_every_side(kind, bias):
    case = replace(MASKED, mask=kind, bias=bias)
    inputs = make_inputs(case)
    assert inputs.mask.numel() == mask_elements(case)
    assert inputs.bias.shape == (1, 2, 1 if bias == "keys" else 48, 48)
    for name in ("ours", "sdpa-masked", "sdpa-additive", "reference"):
        errors = verify(case, name)
        assert ("scores" in errors) is PROVIDERS[name].trains_bias
        assert max(errors.values()) < 1e-4


def test_one_query_forward_only():
    case = replace(MASKED, what="forward", query_length=1)
    assert make_inputs(case).mask.shape == (1, 2, 1, 48)
    assert case.pairs() == 4 * 12 and case.pairs(dense=True) == 4 * 48
    assert case.flops() == 4 * case.head_dim * case.pairs()
    for name in ("ours", "ours-flex", "sdpa-masked", "sdpa-additive", "sdpa-causal"):
        if name != "ours-flex" or not dispatch.explain_backends()["flex"]:
            assert set(verify(case, name)) == {"out"}
    found = measure.measure(case, PROVIDERS["ours"], 2, warmup=2, seed=3)
    assert set(found["seconds"]) == {"selection", "forward", "total"}
    assert set(found["timing"].values()) == {"calls"}


def test_the_visible_pairs_of_a_mask_are_counted_with_causality():
    case = replace(MASKED, mask="keys")
    found = measure.measure(case, PROVIDERS["ours"], 1)
    inputs = make_inputs(case)
    causal = torch.ones(48, 48, dtype=torch.bool).tril()
    assert found["visible_pairs"] == 2 * int((inputs.mask & causal).sum())
    assert found["mask_seconds"] > 0
    full = measure.measure(MASKED, PROVIDERS["ours"], 1)
    assert full["visible_pairs"] == MASKED.pairs()


def test_the_mask_of_every_query_is_the_selection():
    case = replace(MASKED, query_length=17)
    inputs = make_inputs(case)
    scores = make_scores(case, torch.Generator().manual_seed(0))
    assert torch.equal(inputs.mask, providers.window_mask(scores, 12)[:, :, -17:])
    verify(case, "ours")


def test_a_selection_alone_has_no_other_part():
    found = measure.measure(replace(TINY, what="selection"), PROVIDERS["ours"], 2)
    assert set(found["seconds"]) == {"selection", "total"}


STEP = CASES["cpu-smoke-step"]


@pytest.mark.parametrize("name", ["ours", "ours-eager", "sdpa-causal", "sdpa-masked", "reference"])
def test_one_more_token_is_what_the_whole_text_gives(name):
    assert set(verify(STEP, name)) == {"out"}
    inputs = make_inputs(STEP)
    cache = PROVIDERS["ours"].select(inputs, STEP.window)
    assert isinstance(cache, WindowCache) and int(cache.seen_tokens) == STEP.length - 1
    for seen in (STEP.length, STEP.length + 1):  # the new token is stored, again and again
        PROVIDERS["ours"].attend(inputs, cache)
        assert int(cache.seen_tokens) == seen
        assert int(cache.position.max()) == seen - 1


def test_a_step_over_a_wrong_cache_is_refused(monkeypatch):
    right = PROVIDERS["ours"].select
    change(monkeypatch, "ours", select=lambda inputs, window: right(inputs, window - 1))
    with pytest.raises(WrongResult, match="out is off by"):
        verify(STEP, "ours")


def test_steps_are_timed_over_caches_of_their_size():
    assert STEP.flops() == 4 * STEP.head_dim * STEP.heads * STEP.window
    token = 2 * 4 * STEP.heads * STEP.head_dim + 4 * STEP.heads  # query, out, lse
    assert STEP.min_bytes() == token + STEP.window * (2 * 4 * STEP.head_dim + 4)
    longer = replace(STEP, length=1024)
    assert STEP.min_bytes() == longer.min_bytes() and STEP.flops() == longer.flops()
    sizes = {}
    for name in STEP.providers:
        for case in (STEP, longer):
            found = measure.measure(case, PROVIDERS[name], 2)
            assert set(found["seconds"]) == {"forward", "total"} == {*found["timing"], "total"}
            assert found["caches"] == 1 and found["repeats"] == 2 and "l2_cache" not in found
            sizes[name, case.length] = found["cache_bytes"]
    assert sizes["ours", 512] == sizes["ours", 1024] < 2**13
    assert [sizes["sdpa-causal", n] for n in (512, 1024)] == [2 * 4 * 16 * n for n in (512, 1024)]


def test_on_a_gpu_caches_take_turns(monkeypatch):
    """As many as the L2 cache cannot hold; one alone if it is to be warm."""
    seen = []

    def rotation(calls, device, repeats, warmup):
        seen.append((len({id(call.args[1]) for call in calls}), device, repeats, warmup))
        return [1.0] * repeats, timing.REPLAYS

    class Device:
        L2_cache_size = 4504  # that of the case's cache

    monkeypatch.setattr(measure, "rotation_seconds", rotation)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Device)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 7)
    inputs, on_gpu = make_inputs(STEP), replace(STEP, device="cuda")
    for cold in (True, False):
        found = measure._measure_steps(on_gpu, PROVIDERS["ours"], inputs, 3, 2, cold)
        assert found["cache_bytes"] == 4504 and set(found["host_seconds"]) == {"forward", "total"}
        assert found["seconds"]["total"] == 1.0 and found["peak_bytes"] == 0
    assert seen == [(4, "cuda", 3, 2), (1, "cuda", 3, 2)]


def test_calls_in_rotation_share_the_time():
    played = []
    calls = [lambda number=number: played.append(number) for number in range(5)]
    seconds, how = timing.rotation_seconds(calls, "cpu", repeats=3, warmup=1)
    assert len(seconds) == 3 and min(seconds) > 0 and how == "calls"
    # Each in turn, as often as makes a dozen of them; player calls once for the result.
    assert played == [0, 1, 2, 3, 4] * 3 * 5


def test_on_a_gpu_calls_in_rotation_are_one_graph(monkeypatch):
    """With stand-ins for streams, events and graphs: what is recorded, and how it is divided."""
    log = []

    class Stream:
        def wait_stream(self, other):
            pass

    class Event:
        def __init__(self, **_):
            pass

        def record(self):
            pass

        def elapsed_time(self, end):
            return 24.0  # milliseconds of a replay

    class Graph:
        def replay(self):
            log.append("replay")

    cuda = {"Stream": Stream, "current_stream": Stream, "Event": Event, "CUDAGraph": Graph}
    cuda |= {"stream": lambda _: contextlib.nullcontext(), "synchronize": lambda: None}
    cuda["graph"] = lambda graph: contextlib.nullcontext(log.append("recorded"))
    for name, stand_in in cuda.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    calls = [lambda name=name: log.append(name) for name in "abcd"]
    seconds, how = timing.rotation_seconds(calls, "cuda", repeats=2, warmup=1)
    assert log == [*"abcd", "recorded", *"abcd" * 3, *["replay"] * 3]
    assert seconds == [24e-3 / 12] * 2 and how == timing.REPLAYS


@pytest.mark.parametrize("cold", [True, False])
def test_starting_a_graph_is_no_part_of_a_call(cold, monkeypatch):
    """With stand-ins for events and graphs: what is recorded, and what is left of its time."""
    log, results = [], []

    class Event:
        now = 0.0  # milliseconds

        def __init__(self, **_):
            pass

        def record(self):
            self.time = Event.now

        def elapsed_time(self, end):
            return end.time - self.time

    class Graph:
        def replay(self):
            Event.now += 0.01 + sum(self.steps)  # what starting it takes

    @contextlib.contextmanager
    def record(graph):
        log.clear()
        yield
        graph.steps = list(log)

    def call():
        assert all(result() is None for result in results)  # its memory is free for this one
        log.append(0.07)
        result = torch.ones(3)
        results.append(weakref.ref(result))
        return result

    for name, stand_in in {"Event": Event, "CUDAGraph": Graph, "graph": record}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    clock = timing.Clock("cuda", cold=False)
    if cold:
        clock._cold = torch.ones(3)
        monkeypatch.setattr(timing.Clock, "empty_cache", lambda self: log.append(0.06))
    played = timing.player(call, clock, calls=5)
    assert played.timing == timing.REPLAYS and played.result is results[-1]() and len(results) == 5
    # Nothing can be taken from a graph without emptying, but it holds many calls.
    expected = 0.07 if cold else 0.07 + 0.01 / 5
    assert [played.seconds() for _ in range(2)] == pytest.approx([expected / 1e3] * 2)


def test_short_calls_share_a_graph():
    """Starting one takes some 4 µs: less than a hundredth of what a graph of calls takes."""
    for seconds in (1e-4, 1e-3, 1.9e-3, 2e-3, 1.0):
        assert seconds * timing.calls_in_a_graph(seconds) > 100 * 4e-6
    assert timing.calls_in_a_graph(1.0) == 1  # nor does one take much longer than a call


def test_what_no_graph_can_hold_is_timed_as_a_call(monkeypatch):
    def record(graph):
        raise RuntimeError("it copies to the host")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    played = timing.player(lambda: "result", timing.Clock("cpu"), calls=5)
    assert (played.result, played.timing) == ("result", "calls") and played.seconds() > 0


def test_only_gpus_are_measured_in_this_process(monkeypatch):
    monkeypatch.setattr(measure, "measure_isolated", lambda case, name, **_: "in another")
    monkeypatch.setattr(measure, "measure", lambda case, provider, **_: "in this")
    assert measure.take(SMOKE, "ours", repeats=1) == "in another"
    on_gpu = replace(SMOKE, device="cuda")
    assert measure.take(on_gpu, "ours", repeats=1) == "in this"
    assert measure.take(on_gpu, "flash-dmattn", repeats=1) == "in another"


def test_a_warm_cache_is_asked_for_and_told(capsys, tmp_path, monkeypatch):
    status, printed = run(capsys, "run", "--case", "cpu-smoke", "--warm-cache")
    assert status == 2 and "--warm-cache: expected cases of a GPU, got cpu-smoke" in printed.err
    asked = []

    def taken(case, name, **options):
        asked.append((case.name, options["cold"]))
        raise RuntimeError("not measured")

    monkeypatch.setattr(cli, "take", taken)
    monkeypatch.setattr(cli, "verify_isolated", lambda case, name: {"out": 0.0})
    monkeypatch.setattr(cli, "run_facts", lambda device: store.run_facts("cpu"))
    monkeypatch.setattr(cli, "ceilings", lambda device: {})
    for options in ([], ["--warm-cache"]):
        run(capsys, "run", "--case", "gpu-a", "--provider", "ours", *options)
    assert asked == [("gpu-a", True), ("gpu-a-warm", False)]


@pytest.mark.parametrize("cold", [True, False])
def test_a_clock_empties_the_cache_if_asked(cold, monkeypatch):
    class Event:
        def __init__(self, **_):
            pass

        def record(self):
            pass

    monkeypatch.setattr(torch.cuda, "Event", Event)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda size, device: empty(3).fill_(1.0))
    clock = timing.Clock("cuda", cold)
    monkeypatch.undo()
    assert (clock._cold is not None) is cold
    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock.start()
    assert not cold or clock._cold.eq(0).all()


def test_measurement_in_a_process_of_its_own():
    found = measure.measure_isolated(SMOKE, "ours", repeats=3)
    seconds = found["seconds"]
    assert set(seconds) == {"selection", "forward", "backward", "total"}
    assert all(value > 0 for value in seconds.values())
    assert found["spread"][0] <= seconds["total"] <= found["spread"][1]
    assert found["repeats"] == 3 and found["warm"]
    assert found["peak_bytes"] is None or 0 <= found["peak_bytes"] < 2**28


@pytest.mark.parametrize(
    ("changes", "provider", "parts"),
    [
        ({"what": "selection"}, "ours", ["selection"]),
        ({"what": "forward"}, "ours", ["selection", "forward"]),
        ({}, "ours", ["selection", "forward", "backward"]),
        ({"mask": "pairs"}, "ours", ["forward", "backward"]),  # it is given, nothing is built
        ({"mask": "pairs"}, "sdpa-additive", ["selection", "forward", "backward"]),
        ({}, "sdpa-causal", ["forward", "backward"]),
    ],
)
def test_the_parts_that_are_timed_on_a_gpu(changes, provider, parts, monkeypatch):
    """With a processor's clock in place of a device's events."""

    class Event:
        def __init__(self, **_):
            self.time = 0.0

        def record(self):
            self.time = time.perf_counter()

        def elapsed_time(self, end):
            return 1e3 * (end.time - self.time)

    asked = []

    def player(function, clock, calls, captures):
        asked.append((calls, captures))
        return timing.player(function, clock, captures=False)

    monkeypatch.setattr(measure, "player", player)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    case = replace(TINY, **changes)
    inputs = make_inputs(case)
    clock = timing.Clock("cuda", cold=False)
    found = measure._measure_graphs(case, PROVIDERS[provider], inputs, 3, 9.0, 2, clock)
    assert list(found["seconds"]) == [*parts, "total"]
    assert list(found["timing"]) == parts and found["repeats"] == 3
    # No graph of a backward pass without one of the forward pass.
    assert [captures for _, captures in asked] == [part != "backward" for part in parts]
    assert {calls for calls, _ in asked} <= {timing.calls_in_a_graph(0.0), 1}
    assert {*found["host_seconds"]} >= {*parts, "total"}
    assert all(seconds > 0 for seconds in found["host_seconds"].values())


def test_the_load_of_other_processes_is_seen():
    others = machine.OtherLoad()
    if others.share() is None:
        pytest.skip("this system does not tell how busy it is")
    alone = machine.OtherLoad()
    sum(range(5_000_000))
    assert alone.share() < 1.0
    # Half a second of work of another process: not this one's, so it counts.
    crowded = machine.OtherLoad()
    subprocess.run([sys.executable, "-c", "sum(range(20_000_000))"], check=True)
    assert crowded.share() > 0.2 / os.cpu_count()


def test_a_failing_process_is_reported_with_its_error():
    with pytest.raises(RuntimeError, match="ours-cuda on tiny ended with status 1"):
        measure.measure_isolated(TINY, "ours-cuda")


def test_peak_memory_sees_what_was_freed_again():
    if machine._peak_resident_bytes() is None:
        pytest.skip("this system does not tell peak memory")
    memory = machine.PeakMemory("cpu")
    torch.ones(64 << 20, dtype=torch.uint8)
    assert (60 << 20) < memory.peak() < (100 << 20)


def run(capsys, *arguments):
    status = __main__.main(["bench", *arguments])
    return status, capsys.readouterr()


def test_list_names_every_case_and_provider(capsys):
    status, printed = run(capsys, "list")
    assert status == 0
    for name in [*CASES, *PROVIDERS]:
        assert name in printed.out


def test_run_prints_and_appends_complete_rows(capsys, tmp_path):
    path = tmp_path / "rows.jsonl"
    arguments = ("run", "--case", "cpu-smok[e]", "--provider", "ours", "--repeats", "1")
    status, printed = run(capsys, *arguments, "--out", str(path))
    assert status == 0
    assert "cpu-smoke" in printed.out and "commit" in printed.out
    row = store.read_rows(path)[0]
    store.append_rows(path, [row, row])
    assert store.read_rows(path) == [row] * 3
    assert row["shape"]["length"] == SMOKE.length and row["baselines"] == [
        "sdpa-causal",
        "sdpa-masked",
    ]
    assert row["errors"]["scores"] < 1e-4
    assert min(row["ceilings"].values()) > 1e6
    assert row["hardware"]["device"] == "cpu" and row["versions"]["torch"] == torch.__version__
    for field in ("commit", "command", "time", "peak_bytes", "spread", "seconds", "errors_at"):
        assert row[field] is not None


def test_a_run_without_options_is_what_is_committed(capsys, monkeypatch):
    """On a GPU: the cases and providers of results/h200.jsonl, what compiles longest at the end."""
    path = Path(__file__).resolve().parent.parent / "results" / "h200.jsonl"
    committed = {(row["case"], row["provider"]) for row in store.read_rows(path)}
    asked, ahead = [], []

    def taken(case, name, **options):
        asked.append((case.name, name))
        raise RuntimeError("not measured")

    monkeypatch.setattr(cli, "take", taken)
    monkeypatch.setattr(cli, "verify_isolated", lambda case, name: {"out": 0.0})
    monkeypatch.setattr(cli, "run_facts", lambda device: store.run_facts("cpu"))
    monkeypatch.setattr(cli, "ceilings", lambda device: {})
    monkeypatch.setattr(cli, "compile_ahead", ahead.extend)
    monkeypatch.setattr(info, "default_device", lambda: torch.device("cuda"))
    status, printed = run(capsys, "run")
    assert status == 1 and len(asked) == len(set(asked)) and set(asked) == committed
    assert [(case.name, name) for case, name in ahead] == asked
    flex = [name == "flex" for _, name in asked]
    assert flex == sorted(flex) and any(flex)
    assert re.search(r"\n\d+ s\n$", printed.out)


def test_rows_say_when_they_were_done(monkeypatch):
    facts = store.run_facts("cpu")
    assert 0 <= store.elapsed(facts) < 5
    past = datetime.datetime.fromisoformat(facts["time"]) - datetime.timedelta(seconds=90)
    facts["time"] = past.isoformat(timespec="seconds")
    found = measure.measure(TINY, PROVIDERS["ours"], 1)
    row = store.make_row(TINY, "ours", found, {"out": 0.0}, facts)
    assert 90 <= row["elapsed_seconds"] < 95


def test_what_is_compiled_ahead():
    """Different problems that Triton compiles, one of every kind before the next of any."""
    gpu = replace(TINY, device="cuda")
    wide = replace(gpu, name="wide", head_dim=16)
    longer = replace(gpu, name="longer", length=64)
    jobs = [(gpu, "ours"), (longer, "ours"), (replace(gpu, name="again"), "ours"), (wide, "ours")]
    found = compiling.in_turn(jobs)
    assert [(case.head_dim, case.length) for case, _ in found] == [(8, 48), (16, 48), (8, 64)]
    mixed = compiling.in_turn([*jobs, (gpu, "flex"), (longer, "flex")])
    assert [name for _, name in mixed] == ["flex"] * 2 + ["ours"] * 3
    assert compiling._compiles(gpu, "ours-triton") and compiling._compiles(gpu, "flex")
    huge = replace(gpu, length=1 << 20)
    for case, name in ((gpu, "sdpa-causal"), (TINY, "ours"), (huge, "ours")):
        assert not compiling._compiles(case, name)


def test_compiling_ahead_calls_every_problem_in_other_processes(capsys, monkeypatch):
    jobs = [(TINY, "ours"), (TINY, "nothing"), (replace(STEP, length=64), "ours")]
    raised = compiling.call_all(compiling.call, jobs, 2)
    assert [repr(error) for error in raised] == ["KeyError('nothing')"]
    assert "3/3" in capsys.readouterr().err
    # Without a GPU, and for little, nothing is started.
    monkeypatch.setattr(compiling, "call_all", lambda *_: pytest.fail("it was called"))
    gpu = replace(TINY, device="cuda")
    compiling.compile_ahead([(replace(gpu, length=n), "ours") for n in range(48, 58)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    compiling.compile_ahead([(gpu, "ours")])
    # Otherwise what is verified as well as what is measured, each problem once.
    sent = []
    monkeypatch.setattr(compiling, "call_all", lambda function, jobs: sent.extend(jobs))
    cases = [replace(gpu, name=str(n), length=n) for n in (512, 1024, 2048, 4096, 8192, 16384)]
    compiling.compile_ahead([(case, "ours") for case in [*cases, replace(gpu, length=1 << 20)]])
    assert [case.length for case, _ in sent] == [256, 512, 1024, 2048, 4096, 8192, 16384]
    compiling.compile_ahead([(case, "flex") for case in cases] + [(TINY, "ours")])
    assert len(sent) == 7 + 7


def test_a_wrong_provider_is_not_timed(capsys, tmp_path, monkeypatch):
    right = PROVIDERS["ours"].attend
    change(monkeypatch, "ours", attend=lambda inputs, mask: 0 * right(inputs, mask))
    monkeypatch.setattr(cli, "take", lambda *_, **__: pytest.fail("it was timed"))
    path = tmp_path / "rows.jsonl"
    arguments = ("run", "--case", "cpu-smoke", "--provider", "ours", "--out", str(path))
    status, printed = run(capsys, *arguments)
    assert status == 1 and not path.exists()
    assert "not timed, wrong result" in printed.out


def test_what_does_not_fit_is_not_run(capsys, monkeypatch):
    monkeypatch.setattr(info, "available_bytes", lambda: 1 << 20)
    status, printed = run(capsys, "run", "--case", "cpu-smoke", "--provider", "sdpa-masked")
    assert status == 1
    assert "not run: sdpa-masked on cpu-smoke needs 8 MiB of memory, 1 MiB are" in printed.out


def test_an_unknown_case_is_named(capsys):
    status, printed = run(capsys, "run", "--case", "nothing")
    assert status == 2
    assert "no case is called nothing" in printed.err and "cpu-16k-random" in printed.err


def row(case, provider, seconds, peak=1 << 20):
    pattern = case.removeprefix("cpu-16k-")
    return {
        "case": case,
        "provider": provider,
        "pattern": pattern,
        "seconds": {"total": seconds},
        "peak_bytes": peak,
    }


def timed_row(case, seconds, length=512, commit="aaa111", provider="ours"):
    return {
        **row(case, provider, seconds),
        "seconds": {"forward": seconds / 2, "total": seconds},
        "shape": {
            "length": length,
            "window": 32,
            "batch": 1,
            "heads": 2,
            "kv_heads": 1,
            "head_dim": 16,
        },
        "dtype": "float32",
        "spread": [0.9 * seconds, 1.1 * seconds],
        "errors": {"out": 1e-6},
        "hardware": {"device": "cpu", "cpu": "some", "cpu_cores": 2},
        "versions": {"torch": "2.9"},
        "commit": commit,
    }


def test_compare_two_files_and_two_commits(capsys, tmp_path):
    before = [timed_row("a", 1.0), timed_row("b", 1.0), timed_row("c", 1.0), timed_row("old", 1.0)]
    after = [
        timed_row("a", 9.0, commit="bbb222"),
        timed_row("a", 0.5, commit="bbb222"),  # the latest counts
        timed_row("b", 1.05, commit="bbb222"),
        {**timed_row("c", 2.0, commit="bbb222"), "versions": {"torch": "2.11"}},
    ]
    paths = [tmp_path / name for name in ("before", "after", "both")]
    for path, rows in zip(paths, (before, after, before + after), strict=True):
        store.append_rows(path, rows)
    found = run(capsys, "compare", str(paths[0]), str(paths[1]))
    assert found == run(capsys, "compare", "aaa", "bbb", "--rows", str(paths[2]))
    status, printed = found
    lines = {line.split()[0]: line for line in printed.out.splitlines() if line}
    assert status == 1 and "commits aaa111 and bbb222" in printed.out
    assert "0.50" in lines["a"] and "faster" in lines["a"]
    assert "1.05" in lines["b"] and "within the spread" in lines["b"]
    assert "2.00" in lines["c"] and "REGRESSION" in lines["c"]
    assert "versions differ: torch 2.9 and 2.11" in printed.out
    assert "1 rows are in one of the two only" in printed.out


@pytest.mark.parametrize(
    ("ratio", "noise", "word"),
    [
        (1.06, 0.01, "REGRESSION"),
        (1.05, 0.001, "REGRESSION"),
        (1.04, 0.001, "slower"),
        (1.06, 0.04, "within the spread"),
        (0.9, 0.01, "faster"),
    ],
)
def test_a_regression_is_five_percent_beyond_the_spread(ratio, noise, word, capsys, tmp_path):
    paths = [tmp_path / name for name in ("before", "after")]
    for path, seconds in zip(paths, (1.0, ratio), strict=True):
        spread = [seconds * (1 - noise), seconds * (1 + noise)]
        store.append_rows(path, [{**timed_row("a", seconds), "spread": spread}])
    status, printed = run(capsys, "compare", *map(str, paths))
    assert word in printed.out and status == (word == "REGRESSION")


def test_compare_says_what_is_missing(capsys, tmp_path):
    path = tmp_path / "rows"
    store.append_rows(path, [timed_row("a", 1.0)])
    status, printed = run(capsys, "compare", "aaa", "ccc", "--rows", str(path))
    assert status == 2 and "no case and provider in common" in printed.err
    with pytest.raises(SystemExit):
        run(capsys, "compare", "aaa", "bbb")
    assert "no file aaa" in capsys.readouterr().err


def test_a_series_is_by_the_size_that_varies():
    rows = [timed_row("a", 4.0, 1024), timed_row("b", 1.0, 512), timed_row("b", 2.0, 512)]
    rows += [timed_row("a", 8.0, 1024, provider="sdpa-masked")]
    assert figures.series(rows, "forward") == (
        "length",
        {"ours": [(512, 1.0), (1024, 2.0)], "sdpa-masked": [(1024, 4.0)]},
    )


def test_plot_draws_rows(capsys, tmp_path):
    path, figure = tmp_path / "rows", tmp_path / "figure.svg"
    store.append_rows(path, [timed_row("a", 4.0, 1024), timed_row("b", 1.0, 512)])
    status, printed = run(capsys, "plot", str(path), "--out", str(figure))
    assert status == 0 and "Total against length, 1 lines" in printed.out
    assert figure.read_text().startswith("<svg")
    arguments = ("plot", str(path), "--out", str(figure), "--case", "nothing")
    status, printed = run(capsys, *arguments)
    assert status == 2 and "no rows of cases nothing for total" in printed.err
    with pytest.raises(SystemExit):
        run(capsys, "plot", str(path), "--out", str(tmp_path / "figure.png"))
    assert "expected a name that ends with .svg" in capsys.readouterr().err


@pytest.mark.parametrize("holds", [True, False])
def test_verdicts_are_computed_from_rows(holds):
    better = 1.01 if holds else 0.99
    rows = [
        row("cpu-16k-random", "ours", 1.0),
        row("cpu-16k-random", "sdpa-masked", 15 * better, int((10 << 20) * better)),
        row("cpu-16k-random", "sdpa-causal", 10 * better),
        *(row(f"cpu-16k-{pattern}", "ours", 1.25 / better) for pattern in PATTERNS[1:]),
        row("cpu-select-1m", "ours", 10 / better, int((1 << 30) / better)),
    ]
    found = yardsticks.verdicts(rows)
    assert len(found) == 9
    assert [verdict.holds for verdict in found] == [holds] * 9
    assert all(str(verdict).startswith("met" if holds else "MISSED") for verdict in found)


@pytest.mark.parametrize("out", [["--out", "/somewhere/rows"], ["--out=/somewhere/rows"], []])
def test_the_command_of_a_row_holds_no_path(out, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "bench", "run", *out, "--repeats", "3"])
    assert store.run_facts("cpu")["command"].endswith(" bench run --repeats 3")


@pytest.mark.parametrize("holds", [True, False])
def test_verdicts_of_gpus(holds):
    """Limits of parts, and ratios to dense attention, FlexAttention and random scores."""
    better = 1.01 if holds else 0.99

    def passes(case, provider, seconds, selection=0.0):
        total = row(case, provider, selection + 2 * seconds)
        total["seconds"] |= {"selection": selection, "forward": seconds, "backward": seconds}
        return total

    rows = []
    for case, limits in yardsticks._LIMITS.items():
        one = row(case, "ours", 1.0)
        one["seconds"] |= {part: limit / better for part, limit in limits.items()}
        rows.append(one)
    assert [one.holds for one in yardsticks.verdicts(rows)] == [holds] * 9

    rows = [passes("gpu-b", "ours", 1e-3, 1e-4), passes("gpu-8192", "ours", 1e-3, 1e-4)]
    rows += [passes("gpu-b", "flex", 1e-3 * better), row("gpu-8192", "sdpa-causal", 2.625e-3)]
    rows += [passes("gpu-b-ar1", "ours", 1.15e-3 / better), passes("gpu-b-equal", "ours", 0.0, 1.0)]
    rows[3]["seconds"]["total"] *= better
    compared = yardsticks.verdicts(rows)[3:]
    assert [one.holds for one in compared] == [holds, holds, False, holds]


def test_no_verdict_without_its_rows_and_the_latest_row_counts():
    assert yardsticks.verdicts([row("cpu-16k-random", "ours", 1.0)]) == []
    rows = [
        row("cpu-16k-random", "sdpa-causal", 20.0),
        row("cpu-16k-random", "ours", 9.0),
        row("cpu-16k-random", "ours", 1.0),
    ]
    assert [verdict.holds for verdict in yardsticks.verdicts(rows)] == [True]


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    console.write_whole(path, b"old")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        console.write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_command_ends_quietly(capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "verify_isolated", interrupt)
    status, printed = run(capsys, "run", "--case", "cpu-smoke")
    assert status == 130
    assert "interrupted" in printed.err


def test_progress_reports_quarters_where_there_is_no_terminal(capsys):
    with console.Progress("work", 8) as bar:
        for _ in range(8):
            bar.update("note")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("]")[1].split()[0] for line in lines] == ["2/8", "4/8", "6/8", "8/8"]


def test_units():
    assert console.format_seconds(1.5) == "1.5 s"
    assert console.format_seconds(0.0123) == "12.3 ms"
    assert console.format_seconds(4.2e-5) == "42 us"
    assert console.format_bytes(3 << 29) == "1.5 GiB"
    assert console.format_bytes(700) == "700 B"
    assert console.format_seconds(None) == console.format_bytes(None) == "-"


def test_info_names_versions_device_and_every_backend(capsys):
    assert __main__.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert f"torch              {torch.__version__}" in printed
    assert "eager    works" in printed
    for name in ("cuda", "triton", "flex"):
        assert f"\n  {name}" in printed
    assert json.dumps(info.hardware("cpu"))  # rows hold it
