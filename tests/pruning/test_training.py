"""Fine-tuning: it learns, follows its seed, distils, and leaves the model well when something is wrong."""

import copy
import itertools
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

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
        ({"gradient_accumulation": 0}, "gradient_accumulation"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"warmup": 1.5}, "warmup"),
        ({"label_smoothing": -0.1}, "label_smoothing"),
        ({"label_smoothing": 0.1, "loss": F.cross_entropy}, "label_smoothing"),
        ({"distillation_loss": F.mse_loss}, "teacher"),
        ({"mixed_precision": "fp8"}, "mixed_precision"),
        ({"mixed_precision": "fp16", "device": "cpu"}, "needs a GPU"),
        ({"optimizer": lambda parameters: None}, "returns NoneType"),
        ({"loss": lambda outputs, target: outputs}, "one number"),
        ({"teacher": nn.Linear(4, 5)}, "distillation_loss"),
        ({"accelerator": "auto"}, "accelerate.Accelerator"),
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


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[key], second[key]) for key in first)


def test_an_interrupt_puts_the_weights_back():
    model = make_model()
    before = copy.deepcopy(model.state_dict())

    def stop(report: EpochReport) -> None:
        assert not same(model.state_dict(), before)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(model, make_data(), epochs=2, lr=0.1, progress=stop)
    assert same(model.state_dict(), before)


def test_accumulated_batches_are_one_large_batch():
    x, y = make_data(80)
    first, second = (nn.Linear(4, 3) for _ in range(2))
    second.load_state_dict(first.state_dict())
    whole = finetune(first, (x, y), epochs=3, lr=0.1, batch_size=32)
    parts = finetune(second, (x, y), epochs=3, lr=0.1, batch_size=8, gradient_accumulation=4)
    assert whole.steps == parts.steps == 9  # the last step of an epoch takes the two batches left
    assert torch.allclose(first.weight, second.weight, atol=1e-6)


def test_own_optimizer_its_rate_warm_up_and_clipping():
    made: list[torch.optim.Optimizer] = []
    rates: list[float] = []
    norms: list[float] = []

    class Recording(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            parameters = self.param_groups[0]["params"]
            rates.append(self.param_groups[0]["lr"])
            norms.append(torch.cat([p.grad.flatten() for p in parameters]).norm().item())
            super().step(closure)

    def factory(parameters: Any) -> torch.optim.Optimizer:
        made.append(Recording(parameters, lr=0.3))
        return made[-1]

    finetune(
        make_model(),
        make_data(80),
        epochs=2,
        batch_size=16,
        optimizer=factory,
        warmup=0.3,
        max_grad_norm=1e-3,
    )
    assert len(made) == 1
    cosine = [0.15 * (1 + math.cos(math.pi * i / 7)) for i in range(7)]
    assert rates == pytest.approx([0.3 * i / 4 for i in (1, 2, 3)] + cosine)
    assert max(norms) <= 1.001e-3


def test_distillation_of_outputs_that_are_not_logits():
    class Boxes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            y = self.layer(x)
            return {"scores": y[:, 0], "boxes": y[:, 1:]}

    torch.manual_seed(0)
    student, teacher = Boxes(), Boxes()
    x, y = make_data()

    def zero(outputs: Any, target: Any) -> torch.Tensor:
        return 0.0 * outputs["boxes"].sum()

    def distance(ours: Any, theirs: Any) -> torch.Tensor:
        assert not theirs["boxes"].requires_grad
        return sum(F.mse_loss(ours[key], theirs[key]) for key in ours)

    settings: dict[str, Any] = {"epochs": 30, "loss": zero, "teacher": teacher, "distillation": 1.0}
    finetune(student, (x, y), lr=0.05, distillation_loss=distance, weight_decay=0.0, **settings)
    assert torch.allclose(student.layer.weight, teacher.layer.weight, atol=0.02)
    assert torch.allclose(student.layer.bias, teacher.layer.bias, atol=0.02)
    with pytest.raises(InvalidInputError, match="distillation_loss"):
        finetune(student, (x, y), **settings)


def test_bf16_runs_in_bf16_and_leaves_the_model_as_it_was():
    class Probe(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            seen.append(y.dtype)
            return y

    seen: list[torch.dtype] = []
    model, teacher = Probe(4, 3), Probe(4, 3)
    outputs: list[torch.dtype] = []

    def loss(y: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        outputs.append(y.dtype)
        return F.cross_entropy(y, target)

    attributes = set(vars(model))
    for precision, dtype in (("bf16", torch.bfloat16), ("no", torch.float32), ("bf16", torch.bfloat16)):
        seen.clear()
        result = finetune(
            model, make_data(), epochs=1, device="cpu", teacher=teacher, loss=loss, mixed_precision=precision
        )
        assert set(seen) == {dtype}
        assert all(math.isfinite(value) for value in result.losses)
    assert set(outputs) == {torch.float32}
    assert model.weight.dtype == torch.float32
    assert set(vars(model)) == attributes


def test_an_accelerator_that_is_alive_stays_as_it_is():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    states = (PartialState, AcceleratorState, GradientState)
    before = [dict(state._shared_state) for state in states]
    try:
        for state in states:
            state._shared_state.clear()
        own = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=4)
        finetune(make_model(), make_data(), epochs=1, mixed_precision="no", gradient_accumulation=2)
        assert (own.mixed_precision, own.gradient_accumulation_steps) == ("bf16", 4)
        model, loader = make_model(), DataLoader(TensorDataset(*make_data()), 30)
        with pytest.raises(InvalidInputError, match="settings of the accelerator"):
            finetune(model, loader, mixed_precision="no", accelerator=own)
        with pytest.raises(InvalidInputError, match="device"):
            finetune(model, loader, device="meta", accelerator=own)
        result = finetune(model, loader, epochs=2, accelerator=own)
        assert result.steps == 6
        assert (own.mixed_precision, own.gradient_accumulation_steps) == ("bf16", 4)
        assert own._models == own._optimizers == own._dataloaders == []
        assert own.device == torch.device("cpu")
    finally:
        for state, values in zip(states, before, strict=True):
            state._shared_state.clear()
            state._shared_state.update(values)


def test_a_loader_and_nothing_printed(capfd, recwarn):
    loader = DataLoader(TensorDataset(*make_data()), 16, shuffle=True)
    models = [make_model() for _ in range(2)]
    for model in models:
        finetune(model, loader, epochs=2, seed=5)
    assert same(models[0].state_dict(), models[1].state_dict())
    captured = capfd.readouterr()
    assert (captured.out, captured.err, list(recwarn)) == ("", "", [])


# Two processes over gloo: one launch runs every case, the tests read what the two have written.


class Unsized:
    """Enough for two batches in process 0 and three in process 1, without saying so beforehand."""

    def __init__(self, batches: list[Any], rank: int) -> None:
        self.batches, self.count = batches, 4 + 2 * rank

    def __iter__(self) -> Any:
        return itertools.islice(iter(self.batches), self.count)


class HalfUsed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def make_plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))


def cases(rank: int) -> dict[str, tuple[nn.Module, Any, dict[str, Any]]]:
    x, y = make_data(80)
    batches = [(x[i : i + 16], y[i : i + 16]) for i in range(0, 80, 16)]
    poisoned = [(x * float("nan") if rank and i == 3 else x, y) for i, (x, y) in enumerate(batches)]
    loader = DataLoader(TensorDataset(*make_data(77)), 8, shuffle=True)
    odd = make_data(71)
    return {
        "tensors": (make_plain(), (x, y), {"batch_size": 8}),
        "accumulated": (make_plain(), (x, y), {"batch_size": 4, "gradient_accumulation": 2}),
        "list": (make_plain(), batches, {}),
        "loader": (make_plain(), loader, {}),
        "norm": (make_model(), odd, {"batch_size": 8, "mixed_precision": "bf16", "teacher": make_model()}),
        "unsized": (make_plain(), Unsized(batches * 2, rank), {}),
        "dropout": (nn.Sequential(make_plain(), nn.Dropout()), (x, y), {"max_grad_norm": 1.0}),
        "allowed": (HalfUsed(), (x, y), {"batch_size": 8, "find_unused_parameters": True}),
        "poisoned": (make_model(), poisoned, {}),
        "lengths": (make_plain(), batches[: 2 + 2 * rank], {}),
        "synchronised": (make_model(), odd, {"sync_batchnorm": True}),
        "unused": (HalfUsed(), (x, y), {"batch_size": 8}),
    }


def work(directory: str) -> None:
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name, (model, data, settings) in cases(rank).items():
        before = copy.deepcopy(model.state_dict())
        reports: list[EpochReport] = []
        error, losses, steps = "", (), 0
        try:
            result = finetune(
                model,
                data,
                epochs=2,
                lr=0.05,
                device="cpu",
                progress=reports.append,
                **settings,
            )
            losses, steps = result.losses, result.steps
        except (InvalidInputError, TrainingError) as exception:
            error = f"{type(exception).__name__}: {exception}"
        found[name] = {
            "weights": model.state_dict(),
            "unchanged": same(before, model.state_dict()),
            "losses": losses,
            "steps": steps,
            "reports": len(reports),
            "error": error,
        }
        if name == "loader":
            found[name]["generator"] = data.sampler.generator is None
    torch.save(found, Path(directory) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    directory = tmp_path_factory.mktemp("processes")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    running = [
        subprocess.Popen(
            [sys.executable, __file__, str(directory)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        printed = [process.communicate(timeout=180)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], printed
    assert printed == ["", ""]
    return [torch.load(directory / f"{rank}.pt") for rank in range(2)]


TRAINED = ("tensors", "accumulated", "list", "loader", "norm", "unsized", "dropout", "allowed")


@pytest.mark.parametrize("case", TRAINED)
def test_two_processes_end_with_the_same_weights(both, case):
    first, second = (rank[case] for rank in both)
    assert first["error"] == second["error"] == ""
    assert not first["unchanged"]
    assert same(first["weights"], second["weights"])
    assert first["losses"] == second["losses"]
    assert [first["reports"], second["reports"]] == [2, 0]
    expected = {"list": 3, "unsized": 2, "dropout": 1}.get(case, 5)
    assert first["steps"] == second["steps"] == 2 * expected


@pytest.mark.parametrize("case", ["tensors", "accumulated"])
def test_two_processes_train_as_one_with_the_double_batch(both, case):
    model, data, _ = cases(0)["tensors"]
    result = finetune(model, data, epochs=2, lr=0.05, batch_size=16)
    assert both[0][case]["losses"] == pytest.approx(result.losses, rel=1e-5)
    for key, value in model.state_dict().items():
        assert torch.allclose(both[0][case]["weights"][key], value, atol=1e-6)


def test_a_list_is_shared_out_batch_by_batch_and_filled_up_from_the_front(both):
    model, batches, _ = cases(0)["list"]
    pairs = [(0, 1), (2, 3), (4, 0)]
    joined = [tuple(torch.cat([batches[i][k], batches[j][k]]) for k in (0, 1)) for i, j in pairs]
    result = finetune(model, joined, epochs=2, lr=0.05)
    assert both[0]["list"]["losses"] == pytest.approx(result.losses, rel=1e-5)


def test_the_users_loader_is_left_as_it_was(both):
    assert both[0]["loader"]["generator"]
    assert both[1]["loader"]["generator"]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("poisoned", "TrainingError: the loss is nan in epoch 1, batch 2"),
        ("lengths", "InvalidInputError: the processes have [1, 2] batches"),
        ("synchronised", "InvalidInputError: sync_batchnorm"),
        ("unused", "InvalidInputError: some parameters got no gradient"),
    ],
)
def test_both_processes_stop_with_the_same_error_and_their_old_weights(both, case, message):
    for rank in both:
        assert rank[case]["error"].startswith(message)
        assert rank[case]["unchanged"]


if __name__ == "__main__":
    work(sys.argv[1])
