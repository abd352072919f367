"""The comparison of attentions in quality: its data, its fairness, its time, rows and figure."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pickle
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from flash_sparse_attn.bench.console import Progress
from flash_sparse_attn.bench.store import read_rows, run_facts
from flash_sparse_attn.demo.model import ModelConfig, SmallModel
from flash_sparse_attn.demo.text import next_byte_losses, read_corpus
from flash_sparse_attn.demo.training import Training
from flash_sparse_attn.quality import cli, figure
from flash_sparse_attn.quality import run as quality_run
from flash_sparse_attn.quality.language import CONFIG, language_task
from flash_sparse_attn.quality.recall import make_sequences, recall_task
from flash_sparse_attn.quality.run import compare, compile_kernels, curve, planned_steps, shortened
from flash_sparse_attn.quality.tasks import ATTENTIONS

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
FACTS = run_facts("cpu")
TINY = ModelConfig(
    tokens=256, classes=256, width=16, layers=1, heads=2, kv_heads=1, head_dim=8, window=6, recent=2
)


def tiny_recall(**changes):
    return replace(
        recall_task(32, 16, pairs=4, window=8, train_samples=96, test_samples=8),
        batch=8,
        **changes,
    )


def never():
    return time.perf_counter() + 1e9


# Data


@pytest.mark.parametrize("noise", ["values", "any"])
def test_every_question_has_exactly_one_answer(noise):
    torch.manual_seed(0)
    length, pairs = 64, 9
    tokens, values = make_sequences(20, length, pairs, noise, CPU, length + 1)
    assert tokens.shape == (20, length + pairs) and values.shape == (20, pairs)
    assert tokens.min() >= 0 and tokens.max() <= length
    for sequence, answers in zip(tokens.tolist(), values.tolist(), strict=True):
        text, questions = sequence[:length], sequence[length:]
        assert len(set(questions)) == pairs and max(questions) < length // 2
        for question, answer in zip(questions, answers, strict=True):
            assert text.count(question) == 1
            assert text[text.index(question) + 1] == answer >= length // 2
        others = sum(token < length // 2 for token in text) - pairs
        assert others == 0 if noise == "values" else others > 5


def test_pairs_can_fill_the_text():
    torch.manual_seed(0)
    tokens, _ = make_sequences(3, 16, 8, "any", CPU, 17)
    assert (tokens[:, :16:2] < 8).all() and (tokens[:, 1:16:2] >= 8).all()


def test_the_sizes_asked_for():
    tasks = {
        (n, d): recall_task(n, d) for n in (1024, 2048, 4096, 8192) for d in (32, 64, 128, 256)
    }
    for (length, width), task in tasks.items():
        config = task.config
        assert (config.tokens, config.heads, config.head_dim) == (length + 1, 1, width)
        assert (task.pairs, config.window, task.batch * length) == (512, 512, 65536)
        assert (task.train_samples, task.test_samples) == (250_000, 1_000)
    rates = [tasks[1024, width].learning_rate for width in (32, 64, 128, 256)]
    assert rates == [4e-4, 3e-4, 2e-4, 1e-4]


def test_a_step_reads_nothing_back():
    """Fake tensors have no values: what looks at one raises."""
    recall = tiny_recall()
    text = torch.zeros(500, dtype=torch.uint8)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = SmallModel(recall.config, "full")
        recall.loss(model).backward()
        places = torch.randint(400, (3,))
        next_byte_losses(SmallModel(TINY, "full"), text, places, 20).mean().backward()
        with pytest.raises(Exception, match="local_scalar_dense"):
            float(recall.loss(model).detach())


def test_lessons_use_the_tokens_of_the_whole_task():
    task = recall_task(
        64, 16, pairs=16, window=16, curriculum=(4, 8), lesson_steps=(3,), lesson_answers=512
    )
    assert task.name == "recall-values-64-d16-curriculum"
    assert [(n, one.length, one.pairs, one.lessons()) for n, one in task.lessons()] == [
        (3, 8, 4, []),
        (3, 16, 8, []),
    ]
    torch.manual_seed(0)
    for _, lesson in task.lessons():
        tokens, values = lesson._draw(CPU)
        assert tokens.shape == (512 // lesson.pairs, lesson.length + lesson.pairs)
        text = tokens[:, : lesson.length]
        # Pairs fill the text: keys at even places, from the whole task's 32, and its values.
        assert (text[:, ::2] < 32).all() and text[:, ::2].max() > 24
        assert (text[:, 1::2] >= 32).all() and 60 < values.max() <= 64
        answered = (tokens[:, lesson.length :, None] == text[:, None, ::2]).int().argmax(-1)
        assert torch.equal(text[:, 1::2].gather(1, answered), values)
    assert task.facts["curriculum"] == [
        {"steps": 3, "batch": 128, "length": 8, "pairs": 4},
        {"steps": 3, "batch": 64, "length": 16, "pairs": 8},
    ]
    assert "curriculum" not in tiny_recall().facts
    changed = replace(task, curriculum=(2, 4, 8), lesson_steps=(7, 5), lesson_answers=9)
    assert [(n, one.pairs, one.batch) for n, one in changed.lessons()] == [
        (7, 2, 4),
        (5, 4, 2),
        (5, 8, 1),
    ]


# Models and training


def test_the_sliding_window_is_that_of_plain_attention():
    torch.manual_seed(0)
    layer = SmallModel(TINY, "window").blocks[0].attention
    hidden = torch.randn(2, 30, 16)
    seen = []

    def attend(query, key, value, **_):
        age = torch.arange(30)[:, None] - torch.arange(30)
        seen.append((age >= 0) & (age < TINY.window))
        return original(query, key, value, attn_mask=seen[-1], enable_gqa=True)

    out = layer(hidden)
    original, layer.window = F.scaled_dot_product_attention, None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", attend)
        expected = layer(hidden)
    assert seen
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_a_shared_mask_is_causal_in_all_but_its_choice():
    torch.manual_seed(0)
    model = SmallModel(TINY, "shared")
    layer = next(model.dynamic_layers())
    assert (layer.attention["mode"], layer.attention["is_causal"]) == ("shared", True)
    assert (layer.window_size, layer.attention["keep_recent"]) == (4, 2)
    tokens = torch.randint(256, (1, 20))
    changed = tokens.clone()
    changed[:, 15] += 1
    same = (model(tokens) == model(changed)).all(-1)[0]  # scores are equal: no choice yet
    assert same[:15].all() and not same[15]


def test_measuring_a_step_changes_nothing():
    def losses(measured):
        torch.manual_seed(0)
        task = tiny_recall()
        model = SmallModel(task.config, "dynamic")
        training = Training(model, lambda _: task.loss(model))
        if measured:
            assert training.seconds_per_step(2) > 0
        torch.manual_seed(1)
        with Progress("train", 5) as bar:
            return training.run(5, 1e-2, bar)

    assert losses(True) == losses(False)


@pytest.fixture(scope="module")
def rows():
    return list(compare(tiny_recall(), ATTENTIONS, 3, CPU, never(), None, FACTS))


def test_all_attentions_have_the_same_steps_and_first_weights(rows):
    assert [row["provider"] for row in rows] == list(ATTENTIONS)
    assert {row["steps"] for row in rows} == {12} == {96 // 8}
    assert rows[0]["parameters"] == rows[1]["parameters"] == rows[2]["parameters"] - 2 * 17
    assert rows[2]["parameters"] == rows[3]["parameters"]
    # Equal scores make a window of a causal mask, so that the first loss is the window's.
    first = {row["provider"]: row["curve"][0][1] for row in rows}
    assert first["window"] == pytest.approx(first["dynamic"], abs=1e-5)
    assert first["full"] != pytest.approx(first["window"], abs=1e-5)
    assert all(0 <= row["results"]["accuracy"] <= 1 for row in rows)


def test_a_row_can_be_repeated(rows):
    compile_kernels([tiny_recall()], ["dynamic"], CPU)  # leaves no trace
    (again,) = compare(tiny_recall(), ["dynamic"], 3, CPU, never(), rows[2]["steps"], FACTS)
    assert (again["curve"], again["results"]) == (rows[2]["curve"], rows[2]["results"])


def test_every_attention_has_the_same_lessons(rows):
    task = tiny_recall(curriculum=(2, 3), lesson_steps=(4,), lesson_answers=64)
    taught = list(compare(task, ATTENTIONS, 3, CPU, never(), None, FACTS))
    assert [row["provider"] for row in taught] == list(ATTENTIONS)
    for row in taught:
        # Lessons are extra: as many steps of the whole task as without.
        assert (row["steps"], row["train_samples"]) == (12, 96)
        assert row["curriculum"] == [
            {"steps": 4, "batch": 32, "length": 4, "pairs": 2},
            {"steps": 4, "batch": 21, "length": 6, "pairs": 3},
        ]
        assert row["curve"][-1][0] == 4 + 4 + 12
    # What the models see first is a lesson, with the same data for all of them.
    first = {row["provider"]: row["curve"][0][1] for row in taught}
    assert first["window"] == pytest.approx(first["dynamic"], abs=1e-5)
    assert first["full"] != pytest.approx(rows[0]["curve"][0][1], abs=1e-3)
    (again,) = compare(task, ["full"], 3, CPU, never(), 12, FACTS)
    assert again["curve"] == taught[0]["curve"] and again["results"] == taught[0]["results"]


def test_many_lengths_are_compiled_by_other_processes(monkeypatch):
    """Every length with every attention, and what it calls can be sent there."""
    sent = []
    monkeypatch.setattr(quality_run, "call_all", lambda function, jobs: sent.extend(jobs))
    task = tiny_recall(curriculum=(2, 3))
    compile_kernels([tiny_recall()], ["full"], CPU)
    assert not sent
    compile_kernels([task], ["full", "shared"], CPU)
    assert [(part.sequence, kind) for part, kind, _ in sent] == [
        (sequence, kind) for sequence in (36, 6, 9) for kind in ("full", "shared")
    ]
    part, kind, device = pickle.loads(pickle.dumps(sent[-1]))
    pickle.loads(pickle.dumps(quality_run.compile_one))(part, kind, device)


def test_time_for_lessons_is_taken_off(monkeypatch):
    seen = []
    monkeypatch.setattr(Training, "seconds_per_step", lambda *_, loss_of_step=None: 2.0)
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)

    def plan(wanted, seconds, step_seconds, test_batches):
        seen.append(seconds)
        return 1

    monkeypatch.setattr("flash_sparse_attn.quality.run.planned_steps", plan)
    for task in (tiny_recall(), tiny_recall(curriculum=(2,), lesson_steps=(5,))):
        list(compare(task, ["full", "window"], 0, CPU, 100.0, None, FACTS))
    assert seen == [100.0, 100.0 - 2 * 5 * 2.0]


def test_lessons_come_first_at_the_highest_rate():
    model = torch.nn.Linear(1, 1)
    order, rates = [], []

    def loss(name):
        def of_step(step):
            order.append((name, step))
            rates.append(training.optimizer.param_groups[0]["lr"])
            return model(torch.ones(1)).sum()

        return of_step

    training = Training(model, loss("whole"))
    with Progress("train", 20) as bar:
        losses = training.run(10, 1.0, bar, [(20, loss("a")), (4, loss("b"))])
    assert len(losses) == 34
    assert [name for name, _ in order] == ["a"] * 20 + ["b"] * 4 + ["whole"] * 10
    assert [step for _, step in order] == list(range(34))
    assert rates[:25] == [0.5, *[1.0] * 24]  # warm-up: a tenth of the first lesson; no decay
    assert rates[24:] == sorted(rates[24:], reverse=True) and len(set(rates[24:])) == 10
    order.clear(), rates.clear()
    with Progress("train", 20) as bar:
        training.run(20, 1.0, bar)
    assert rates[1] == max(rates) < 1 and rates[-1] == rates[19] == min(rates[1:]) < 0.06


def test_a_step_that_is_recorded_is_replayed(monkeypatch):
    """With stand-ins for streams and graphs: the whole task and the lessons each have their own."""
    log = []

    class Stream:
        def wait_stream(self, other):
            pass

    class Graph:
        def replay(self):
            log.append(f"replay {self.name}")

    def recording(graph):
        graph.name = len([entry for entry in log if entry == "recorded"])
        log.append("recorded")
        return contextlib.nullcontext()

    for name, stand_in in {
        "Stream": Stream,
        "current_stream": Stream,
        "CUDAGraph": Graph,
        "stream": lambda _: contextlib.nullcontext(),
        "graph": recording,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    model = torch.nn.Linear(1, 1)

    def loss(name):
        return lambda _: log.append(name) or model(torch.ones(1)).sum()

    lesson, broken = loss("lesson"), lambda _: (_ for _ in ()).throw(RuntimeError("no\nway"))
    training = Training(model, loss("whole"))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    assert quality_run._record(training, [lesson, broken]) == "no: no"
    assert all(map(torch.equal, before, model.parameters()))
    assert log == [*["whole"] * 3, "recorded", "whole", *["lesson"] * 3, "recorded", "lesson"]
    log.clear()
    with Progress("train", 3) as bar:
        training.run(2, 1.0, bar, [(1, lesson)])
    assert log == ["replay 1", "replay 0", "replay 0"]


def test_the_plan_keeps_to_its_time():
    assert planned_steps(1000, 1e9, [1.0, 3.0], 10) == 1000
    steps = planned_steps(1000, 100.0, [1.0, 3.0], 6)
    assert 1 < steps < 1000 and 4 * (steps + 6 / 3) <= 100.0 < 4 * (steps + 4 + 6 / 3)
    assert planned_steps(1000, -5.0, [1.0], 0) == 1


def test_what_was_shortened_is_said():
    late = time.perf_counter() - 1
    (row,) = compare(tiny_recall(), ["full"], 0, CPU, late, None, FACTS)
    assert (row["steps"], row["train_samples"], row["wanted_train_samples"]) == (1, 8, 96)
    (line,) = shortened([row])
    assert "recall-values-32-d16, seed 0: shortened to 8 of 96 training samples" in line
    assert shortened([{**row, "steps": 12, "train_samples": 96}]) == []


def test_curves_are_means():
    assert curve([4.0, 2.0]) == [(1, 4.0), (2, 2.0)]
    points = curve([float(step) for step in range(250)])
    assert len(points) <= 100 and points[0] == (3, 1.0) and points[-1] == (250, 249.0)


def test_text_is_measured_in_bits():
    task = language_task(read_corpus(), CPU, length=32, batch=2, config=TINY, test_samples=4)
    uniform = SmallModel(TINY, "full")
    torch.nn.init.zeros_(uniform.read_out.weight)
    results = task.test(uniform)
    assert results == pytest.approx({"bits_per_byte": 8.0, "late_bits_per_byte": 8.0}, abs=1e-4)
    assert task.facts["corpus"]["sha256"] == read_corpus().digest
    assert CONFIG.window < 4096 // 2  # so that the window misses something


def test_more_text_begins_with_the_same_files():
    small, large = read_corpus(), read_corpus(8.0)
    assert large.files > small.files and len(large.train) + len(large.held_out) >= 8e6
    count = 100_000
    assert torch.equal(large.train[:count], small.train[:count])


# The program


def test_lengths_that_cannot_hold_the_pairs_are_refused(capsys):
    assert cli.main(["recall", "--length", "1000", "--device", "cpu"]) == 2
    assert "at least 1024, which 512 pairs take, got 1000" in capsys.readouterr().err


def test_recent_keys_are_part_of_the_window(capsys):
    task = recall_task(64, 16, pairs=8, window=16, recent=4)
    assert task.name == "recall-values-64-d16-recent4"
    (attention, *_) = SmallModel(task.config, "dynamic").dynamic_layers()
    assert "window_size=12" in repr(attention) and "keep_recent=4" in repr(attention)
    assert cli.main(["recall", "--window", "16", "--recent", "16", "--device", "cpu"]) == 2
    assert (
        "--recent: expected fewer than the 16 keys of --window, got 16" in capsys.readouterr().err
    )


def test_lessons_that_do_not_fit_are_refused(capsys):
    common = ["recall", "--length", "1024", "--device", "cpu", "--curriculum", "16", "513"]
    assert cli.main(common) == 2
    assert (
        "--curriculum: expected numbers of pairs from 1 to 512, got 513" in capsys.readouterr().err
    )
    assert cli.main([*common[:-1], "--lesson-steps", "0"]) == 2
    expected = "--lesson-steps: expected numbers from 1, no more than the 1 lessons"
    assert f"{expected} of --curriculum, got [0]" in capsys.readouterr().err
    assert cli.main([*common[:-1], "--lesson-steps", "3", "2"]) == 2
    assert f"{expected} of --curriculum, got [3, 2]" in capsys.readouterr().err
    assert cli.main([*common[:-1], "--lesson-answers", "0"]) == 2
    assert "--lesson-answers: expected at least 1, got 0" in capsys.readouterr().err


def test_lessons_are_told(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    common = ["--quick", "--device", "cpu", "--steps", "1", "--kind", "full", "--out", str(out)]
    assert cli.main(["recall", "--curriculum", "16", "32", *common]) == 0
    told = "lessons before: 2 steps of 2 pairs in 4 tokens, 2 steps of 4 pairs in 8 tokens."
    assert told in capsys.readouterr().out
    (row,) = read_rows(out)
    assert row["case"] == "recall-values-64-d16-curriculum"
    assert list(figure._columns([row])) == [
        "8 pairs in 64 tokens, noise: values, after 2 + 2 steps of lessons"
    ]


def test_the_script_writes_rows_and_figures(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    common = ["--quick", "--device", "cpu", "--out", str(out)]
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, str(ROOT / "benchmarks" / "quality.py"), "recall", *common]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Guessing a value is right in 3.03%" in done.stdout
    found = read_rows(out)
    assert found[0]["command"].startswith("python benchmarks/quality.py recall --quick")

    assert cli.main(["text", "--steps", "2", "--seed", "0", "1", *common]) == 0
    printed = capsys.readouterr().out
    assert "Means over 2 seeds" in printed and "shortened to 4 of 8" in printed
    found = read_rows(out)
    assert [row["provider"] for row in found] == 3 * list(ATTENTIONS)
    for row in found:
        assert row["hardware"]["device"] == "cpu" and row["versions"] and row["commit"]
    if importlib.util.find_spec("matplotlib"):
        drawn = tmp_path / "figure.png"
        assert cli.main(["plot", str(out), "--out", str(drawn)]) == 0
        assert "12 trainings" in capsys.readouterr().out
        assert drawn.read_bytes() == figure.draw(found, "png")
