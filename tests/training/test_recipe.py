"""The learning rate by step, the loss, the average of the weights."""

import math

import pytest
import torch
from torch import nn

from idm_fast.training.recipe import ReconstructionLoss, averaged, learning_rate


def test_the_published_rate_is_halved_at_20_40_60_and_80_percent(settings):
    config = settings(max_train_steps=50_000, learning_rate=1e-4)
    for halvings in range(5):
        for step in (10_000 * halvings, 10_000 * halvings + 9_999):
            assert learning_rate(config, step) == 1e-4 * 0.5**halvings


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_the_rate_of_a_very_short_run_stays_within_the_recipe(settings, steps):
    config = settings(max_train_steps=steps, learning_rate=1.0)
    rates = [learning_rate(config, step) for step in range(steps)]
    assert rates[0] == 1.0 and rates[-1] >= 1 / 16 and sorted(rates, reverse=True) == rates


def test_the_cosine_falls_from_the_rate_to_zero(settings):
    config = settings(max_train_steps=100, learning_rate=1.0, lr_scheduler="cosine")
    rates = [learning_rate(config, step) for step in (0, 25, 50, 75, 100)]
    assert rates == pytest.approx([math.cos(math.pi * quarter / 8) ** 2 for quarter in range(5)], abs=1e-15)


def test_warm_up_rises_to_the_rate(settings):
    config = settings(max_train_steps=100, learning_rate=1.0, lr_warmup_steps=4)
    assert [learning_rate(config, step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_the_loss_is_the_mean_absolute_error():
    class Half(nn.Module):
        def forward(self, y, physics):
            return y * physics

    x, y = torch.tensor([[1.0, -2.0]]), torch.tensor([[4.0, 4.0]])
    assert ReconstructionLoss(Half())(x, y, 0.5).item() == (1 + 4) / 2


def test_the_average_follows_its_definition():
    model, expected = nn.Linear(2, 1, bias=False), None
    average = averaged(model, decay=0.3)
    for n, value in enumerate([1.0, 5.0, -2.0, 7.0, 0.0]):
        nn.init.constant_(model.weight, value)
        average.update_parameters(model)
        decay = min(0.3, (1 + n) / (10 + n))
        expected = value if n == 0 else decay * expected + (1 - decay) * value
    assert average.module.weight.tolist() == [pytest.approx([expected, expected])]
