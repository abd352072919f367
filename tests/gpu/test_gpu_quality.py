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
