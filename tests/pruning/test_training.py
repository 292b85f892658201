"""Fine-tuning: it learns, follows its seed, distils, and leaves the model well when something is wrong."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from idap.errors import InvalidInputError, TrainingError
from idap.training import EpochReport, finetune


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def make_data(n: int = 90) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    centres = 4 * torch.eye(3, 4)
    labels = torch.arange(n) % 3
    return centres[labels] + torch.randn(n, 4, generator=generator), labels


def accuracy(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor]) -> float:
    with torch.no_grad():
        return (copy.deepcopy(model).eval()(data[0]).argmax(1) == data[1]).double().mean().item()


def test_learns_and_reports_every_epoch():
    model, data = make_model(), make_data()
    reports: list[EpochReport] = []
    result = finetune(model, data, epochs=8, lr=0.05, batch_size=16, progress=reports.append)
    assert accuracy(model, data) > 0.9
    assert result.losses[-1] < 0.5 * result.losses[0]
    assert [r.epoch for r in reports] == list(range(1, 9))
    assert [r.loss for r in reports] == list(result.losses)
    assert result.steps == 8 * math.ceil(90 / 16)


def test_cosine_schedule_falls_from_lr_towards_zero():
    rates: list[float] = []
    finetune(
        make_model(), make_data(), epochs=6, lr=0.1, batch_size=30, progress=lambda r: rates.append(r.lr)
    )
    steps = 6 * 3
    expected = [0.05 * (1 + math.cos(math.pi * (3 * epoch - 1) / steps)) for epoch in range(1, 7)]
    assert rates == pytest.approx(expected)


def test_same_seed_same_weights_and_the_callers_random_state_is_untouched():
    models = [make_model() for _ in range(3)]
    torch.manual_seed(7)
    state = torch.get_rng_state()
    for model, seed in zip(models, (3, 3, 4), strict=True):
        finetune(model, make_data(), epochs=2, lr=0.05, batch_size=16, seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    first, second, third = (model.state_dict() for model in models)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["0.weight"], third["0.weight"])


def test_modes_and_gradients_are_left_as_they_were():
    model = make_model()
    model.train()
    model[1].eval()
    finetune(model, make_data(), epochs=1)
    assert [m.training for m in model] == [True, False, True, True]
    assert all(p.grad is None for p in model.parameters())


def test_frozen_parameters_stay():
    model = make_model()
    model[0].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    finetune(model, make_data(), epochs=1)
    assert torch.equal(model[0].weight, before["0.weight"])
    assert not torch.equal(model[3].weight, before["3.weight"])


def test_distillation_alone_copies_the_teacher_whatever_the_labels():
    data = make_data()
    teacher = make_model()
    finetune(teacher, data, epochs=8, lr=0.05, batch_size=16)
    teacher_before = copy.deepcopy(teacher.state_dict())
    student = make_model()
    wrong = (data[0], (data[1] + 1) % 3)
    finetune(student, wrong, epochs=12, lr=0.02, batch_size=16, teacher=teacher, distillation=1.0)
    assert accuracy(student, data) > 0.9
    assert all(torch.equal(value, teacher_before[key]) for key, value in teacher.state_dict().items())


def test_distillation_loss_is_the_stated_formula():
    model = nn.Linear(4, 3)
    teacher = nn.Linear(4, 3)
    x, y = make_data(12)
    losses: list[float] = []
    start = copy.deepcopy(model)
    finetune(
        model, (x, y), epochs=1, lr=1e-6, batch_size=12, teacher=teacher, temperature=3.0, distillation=0.25,
        progress=lambda r: losses.append(r.loss),
    )  # fmt: skip
    p = torch.softmax(teacher(x) / 3, 1)
    kl = (p * (p.log() - torch.log_softmax(start(x) / 3, 1))).sum(1).mean()
    expected = 0.75 * F.cross_entropy(start(x), y) + 0.25 * 9 * kl
    assert losses[0] == pytest.approx(expected.item(), rel=1e-5)


def test_dict_and_tuple_inputs_and_own_loss():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return self.layer(a - b)

    x, _ = make_data(32)
    wanted = x.sum(1, keepdim=True)
    for inputs in ({"a": x, "b": torch.zeros_like(x)}, (x, torch.zeros_like(x))):
        result = finetune(Two(), [(inputs, wanted)] * 20, epochs=5, lr=0.01, loss=F.mse_loss)
        assert result.losses[-1] < 0.1 * result.losses[0]


def test_a_loss_that_is_not_finite_raises_and_puts_the_weights_back():
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    x, y = make_data()
    bad = [(x[:30], y[:30]), (x[30:60] * float("nan"), y[30:60])]
    with pytest.raises(TrainingError, match=r"loss is nan in epoch 1, batch 2.*smaller lr"):
        finetune(model, bad, epochs=2)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs"),
        ({"epochs": 1.5}, "epochs"),
        ({"lr": 0.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"temperature": 0.0}, "temperature"),
        ({"distillation": 1.5}, "distillation"),
        ({"batch_size": 0}, "batch_size"),
        ({"data": []}, "no batch"),
        ({"data": iter([])}, "only once"),
        ({"data": torch.zeros(3, 4)}, "pair"),
        ({"data": 3}, "pair"),
        ({"data": [torch.zeros(3, 4)]}, "pair"),
        ({"data": (torch.zeros(3, 4), torch.zeros(2).long())}, "3 inputs but 2 targets"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = {"data": make_data(), "epochs": 1} | change
    data = arguments.pop("data")
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InvalidInputError, match=message):
        finetune(model, data, **arguments)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_nothing_to_train():
    with pytest.raises(InvalidInputError, match="no parameter"):
        finetune(nn.Linear(4, 3).requires_grad_(False), make_data(), epochs=1)


def test_a_lone_last_sample_does_not_break_batch_norm():
    x, y = make_data(33)
    assert finetune(make_model(), (x, y), epochs=1, batch_size=16).steps == 2
