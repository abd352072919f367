"""Training for the comparison of attentions: a step is one CUDA graph that trains as it should."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from flash_sparse_attn.bench.console import Progress
from flash_sparse_attn.demo.model import SmallModel, precision
from flash_sparse_attn.demo.training import Training
from flash_sparse_attn.quality.recall import recall_task
from flash_sparse_attn.quality.tasks import ATTENTIONS

pytestmark = pytest.mark.gpu

TASK = recall_task(1024, 64, pairs=64, window=128)


def losses(kind, recorded, loss_of, rate):
    torch.manual_seed(0)
    model = SmallModel(TASK.config, kind).cuda()
    training = Training(model, lambda _: loss_of(model))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    if recorded:
        training.record()
        assert training.seconds_per_step() > 0
        assert all(map(torch.equal, before, model.parameters()))
    with Progress(kind, 8) as bar:
        return training.run(8, rate, bar)


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_a_recorded_step_trains_like_a_launched_one(kind):
    torch.manual_seed(1)
    tokens = torch.randint(TASK.config.tokens, (4, 1025), device="cuda")

    def loss(model):
        with precision(model.device):
            logits = model(tokens[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    launched, recorded = (losses(kind, way, loss, 3e-3) for way in (False, True))
    assert recorded == pytest.approx(launched, rel=2e-2)
    assert recorded[-1] < recorded[0]


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_every_replay_draws_new_data(kind):
    found = losses(kind, True, TASK.loss, 0.0)
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_lessons_and_the_whole_task_are_recorded_beside_each_other(kind):
    """A graph for each, on one set of weights and one optimizer, in the order of the plan."""
    task = recall_task(256, 64, pairs=64, window=32, curriculum=(16, 32), lesson_steps=(4,))
    torch.manual_seed(0)
    model = SmallModel(task.config, kind).cuda()
    training = Training(model, lambda _: task.loss(model))
    lessons = [(n, lambda _, lesson=lesson: lesson.loss(model)) for n, lesson in task.lessons()]
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for loss in (None, *(loss for _, loss in lessons)):
        training.record(loss)
    assert all(map(torch.equal, before, model.parameters()))
    with Progress(kind, 16) as bar:
        losses = training.run(8, 3e-3, bar, lessons)
    assert len(set(losses)) == 16 and max(losses) < 20
    # They train the same weights: the first loss is above that of guessing, the last is not.
    assert losses[-1] < losses[0]
    assert not all(map(torch.equal, before, model.parameters()))
