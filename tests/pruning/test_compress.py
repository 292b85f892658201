"""Both stages under one budget: what is kept, what is undone, when it stops; the user's model is unharmed."""

import copy
import importlib
import json
import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

from idap.calibration import recalibrate
from idap.complexity import count_macs, count_params
from idap.compress import StepRecord, compress, drift
from idap.errors import EmptyDataError, InvalidInputError, TrainingError
from idap.latency import LatencyComparison, LatencyStats
from idap.plan import PruningPlan
from idap.report import layer_widths
from idap.training import finetune


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Net(nn.Module):
    def __init__(self, width: int = 16, blocks: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(*[Block(width) for _ in range(blocks)])
        self.head = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(torch.relu(self.stem(x))).mean((2, 3)))


BATCHES = [torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(i)) for i in range(2)]
ONE = BATCHES[0][:1]


def make_net(strengths: tuple[float, ...] = (1.0, 0.5, 0.25)) -> Net:
    """Strength of a block: the scale of its last batch norm, so that a weaker one changes less."""
    torch.manual_seed(0)
    net = Net(blocks=len(strengths))
    with torch.no_grad():
        for block, strength in zip(net.blocks, strengths, strict=True):
            block.bn2.weight.fill_(strength)
    return net


def run(net: nn.Module | None = None, **changes):
    settings = {"evaluate": lambda model: 0.9, "round_to": 2, "progress": False, "steps": 8} | changes
    return compress(net if net is not None else make_net(), settings.pop("batches", BATCHES), **settings)


def blocks_left(model: nn.Module) -> set[str]:
    return {name.rpartition(".")[0] for name, module in model.named_modules() if name.endswith("conv1")}


def without_time(history: tuple[StepRecord, ...]) -> list[tuple]:
    return [(s.stage, s.action, s.accepted, s.params, s.macs, s.metric, s.drift) for s in history]


def test_target_is_met_by_both_stages_and_the_plan_replays_on_a_fresh_original():
    net = make_net()
    result = run(net, target={"macs": 0.3}, compensate=False, recalibrate=False)
    full = count_macs(net, ONE)
    assert result.reached_target
    assert result.target == {"macs": int(0.3 * full)}
    assert result.macs == count_macs(result.model, ONE) <= 0.3 * full
    assert result.params == count_params(result.model)
    assert {s.stage for s in result.history if s.accepted} == {"base", "filters", "layers"}
    replayed = PruningPlan.from_json(result.plan.to_json()).apply(make_net(), ONE).eval()
    with torch.no_grad():
        # Nothing was trained, so that structure and weights are both the plan's.
        assert torch.equal(replayed(BATCHES[0]), result.model(BATCHES[0]))


def test_trained_weights_fit_the_replayed_structure():
    def train(model: nn.Module) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.99)

    result = run(target={"macs": 0.4}, finetune=train)
    replayed = result.plan.apply(make_net(), ONE)
    replayed.load_state_dict(result.model.state_dict())
    with torch.no_grad():
        assert torch.equal(replayed.eval()(BATCHES[0]), result.model(BATCHES[0]))


def test_the_model_of_the_user_and_its_random_state_are_left_alone():
    net = make_net()
    net.train()
    net.blocks[1].eval()
    net.stem.weight.requires_grad_(False)
    modes = [m.training for m in net.modules()]
    before = copy.deepcopy(net.state_dict())
    torch.manual_seed(5)
    state = torch.get_rng_state()
    result = run(net, target={"macs": 0.4}, finetune=lambda model: torch.rand(1) and None)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert not net.stem.weight.requires_grad
    own = {p.data_ptr() for p in net.parameters()}
    assert not own & {p.data_ptr() for p in result.model.parameters()}
    assert not result.model.training


def test_the_ratios_follow_the_schedule():
    result = run(stages=("filters",), steps=4, initial_ratio=0.1, alpha=1.5)
    ratios = [float(s.action.split()[1]) for s in result.history if s.stage == "filters"]
    assert ratios == pytest.approx([0.1 * (1 + t / 4) ** 1.5 for t in range(4)], abs=5e-4)
    sizes = [s.params for s in result.history]
    assert sizes == sorted(sizes, reverse=True)


def test_a_step_too_far_is_undone_and_halved_and_the_smallest_within_the_budget_is_returned():
    full = count_params(make_net())

    def evaluate(model: nn.Module) -> float:
        return 0.9 if count_params(model) >= 0.6 * full else 0.5

    result = run(evaluate=evaluate, budget=0.05, initial_ratio=0.3, stages=("filters",), halvings=3)
    undone = [i for i, s in enumerate(result.history) if not s.accepted]
    assert undone
    first = undone[0]
    ratios = [float(s.action.split()[1]) for s in result.history[1:]]
    assert ratios[first] == pytest.approx(ratios[first - 1] / 2, abs=1e-3)
    accepted = [s for s in result.history if s.accepted]
    assert result.params == min(s.params for s in accepted) == count_params(result.model) >= 0.6 * full
    assert result.params < full
    assert result.metric == 0.9
    assert not result.history[-1].accepted
    assert "budget" in result.stopped["filters"]


def test_the_filter_stage_ends_after_so_many_halvings():
    full = count_params(make_net())
    result = run(
        evaluate=lambda m: 0.9 if count_params(m) == full else 0.1,
        initial_ratio=0.4,
        halvings=2,
        stages=("filters",),
    )
    assert 1 <= sum(not s.accepted for s in result.history) <= 3
    assert result.params == full


def test_nothing_kept_returns_a_copy_of_the_original_and_an_empty_plan():
    net = make_net()
    full = count_params(net)
    called = []
    result = run(
        net, evaluate=lambda m: 0.9 if count_params(m) == full else 0.1, target={"macs": 0.5},
        final_finetune=called.append,
    )  # fmt: skip
    with torch.no_grad():
        assert torch.equal(result.model(BATCHES[0]), net.eval()(BATCHES[0]))
        assert torch.equal(result.plan.apply(make_net(), ONE).eval()(BATCHES[0]), net(BATCHES[0]))
    assert result.model is not net
    assert not result.reached_target
    assert result.drift == 0
    assert not called
    assert "essential" in result.stopped["layers"]


def test_blocks_go_by_divergence_lowest_first():
    result = run(make_net((1.0, 0.01, 0.3)), stages=("layers",), max_blocks=2)
    removed = [s.action.split()[1] for s in result.history if s.stage == "layers"]
    assert removed == ["blocks.1", "blocks.2"]
    assert blocks_left(result.model) == {"blocks.0"}
    assert "most allowed" in result.stopped["layers"]


def test_a_block_that_does_nothing_goes_without_any_change():
    net = make_net((1.0, 0.0, 0.5))
    result = run(net, stages=("layers",), max_blocks=1, recalibrate=False)
    with torch.no_grad():
        assert torch.equal(result.model(BATCHES[0]), net.eval()(BATCHES[0]))
    assert result.drift == 0
    assert result.params < count_params(net)


def test_an_essential_block_is_put_back_and_not_tried_again():
    def evaluate(model: nn.Module) -> float:
        return 0.9 if "blocks.2" in blocks_left(model) else 0.2

    result = run(evaluate=evaluate, stages=("layers",))
    tries = [(s.action.split()[1], s.accepted) for s in result.history if s.stage == "layers"]
    assert tries == [("blocks.2", False), ("blocks.1", True), ("blocks.0", True)]
    assert blocks_left(result.model) == {"blocks.2"}
    assert "essential" in result.stopped["layers"]


def test_max_blocks_counts_over_the_whole_run():
    net = make_net((1.0, 0.01, 0.3))
    result = run(net, stages=("layers", "filters"), max_blocks=1, target={"macs": 0.05}, steps=1)
    assert sum(s.accepted and s.stage == "layers" for s in result.history) == 1
    assert "1 block removed" in result.stopped["layers"]


def test_without_a_target_the_first_stage_uses_what_the_other_left_of_the_budget():
    def metric(model: nn.Module) -> float:
        whole = len(blocks_left(model)) == 3
        return (0.3 + 0.6 * count_params(model) / count_params(make_net())) if whole else 0.0

    both = run(evaluate=metric, budget=0.4)
    alone = run(evaluate=metric, budget=0.4, stages=("filters",))
    assert both.params <= alone.params


@pytest.mark.parametrize(
    ("validation", "message"),
    [
        ([], "validation holds no batch"),
        (iter(BATCHES), "read only once"),
        ([(ONE, ONE)], "validation: the model"),
    ],
)
def test_validation_data_is_looked_at_before_any_work(validation, message):
    with pytest.raises(InvalidInputError, match=message):
        run(validation=validation, evaluate=lambda model: pytest.fail("work was done"))


def test_numbers_of_numpy_will_do(tmp_path):
    budget, goal = np.float64(0.05), np.int64(10**5)
    assert run(target={"macs": goal}, budget=budget, directory=tmp_path, steps=1).target == {"macs": 10**5}


def test_ranked_by_latency_the_slow_layers_go_first(monkeypatch):
    module = importlib.import_module("idap.compress")
    for slow in ("blocks.0.", "blocks.2."):

        def times(model, example, slow=slow):
            return {name: 50.0 if name.startswith(slow) else 1.0 for name, _ in model.named_modules()}

        monkeypatch.setattr(module, "layer_times", times)
        net = run(stages=("filters",), steps=1, initial_ratio=0.15, by_latency=True).model
        left = [block.conv1.out_channels for block in net.blocks]
        assert left.index(min(left)) == int(slow[7]), left
        assert sorted(left)[1:] == [16, 16]


def test_max_blocks_zero_removes_none():
    result = run(stages=("layers",), max_blocks=0)
    assert [s.stage for s in result.history] == ["base"]


def test_the_first_stage_leaves_room_for_the_second():
    net = make_net()
    full = count_macs(net, ONE)
    result = run(net, target={"macs": 0.4}, first_share=0.5, initial_ratio=0.05)
    filters = [s.macs for s in result.history if s.stage == "filters" and s.accepted]
    layers = [s.macs for s in result.history if s.stage == "layers" and s.accepted]
    assert 0.4 * full < filters[-1] <= 0.7 * full
    assert layers
    alone = run(net, target={"macs": 0.4}, stages=("filters",), initial_ratio=0.05)
    assert alone.macs <= 0.4 * full
    assert alone.reached_target


def test_the_first_stage_may_use_only_its_share_of_the_budget():
    full = count_params(make_net())

    def evaluate(model: nn.Module) -> float:
        return 0.9 - 0.1 * (1 - count_params(model) / full)

    # A fall of 0.1 x the share removed, the budget 0.05: half may go, and 0.5 of that in the first stage.
    result = run(evaluate=evaluate, budget=0.05, first_share=0.5, initial_ratio=0.1)
    stages = [s.stage for s in result.history]
    turn = result.history[: stages.index("layers")]
    assert 0 < max(0.9 - s.metric for s in turn if s.accepted) <= 0.025 + 1e-9
    assert stages.index("layers") < len(stages) - 1 - stages[::-1].index("filters"), "no second turn"
    assert 0.9 - result.metric <= 0.05 + 1e-9


def test_filters_go_on_if_the_layers_cannot_reach_the_target():
    def evaluate(model: nn.Module) -> float:
        return 0.9 if len(blocks_left(model)) == 3 else 0.0

    seen: list[str] = []
    result = run(evaluate=evaluate, target={"macs": 0.4}, on_stage=lambda name, model: seen.append(name))
    order = [s.stage for s in result.history]
    assert order.index("layers") < len(order) - 1 - order[::-1].index("filters")
    assert result.reached_target
    assert seen == ["filters", "layers", "filters"]


def test_layers_first_if_asked():
    result = run(stages=("layers", "filters"), max_blocks=1, target={"macs": 0.4})
    assert [s.stage for s in result.history][:2] == ["base", "layers"]
    assert result.reached_target


def test_a_target_in_absolute_parameters():
    full = count_params(make_net())
    result = run(target={"params": full // 2})
    assert result.target == {"params": full // 2}
    assert result.params <= full // 2


def test_a_latency_target_is_measured_against_the_original_in_the_same_rounds(monkeypatch):
    """The stopwatch is replaced: a model takes a microsecond a parameter, and the machine slows down by 3."""
    module = sys.modules["idap.compress"]
    slow = iter([1.0, 3.0, 1.0, 3.0, 1.0] * 20)

    def stats(model, factor=1.0):
        ms = count_params(model) * 1e-3 * factor
        return LatencyStats(ms, ms, ms, 1, "cpu", "float32", 1, "x")

    def compare(models, inputs, **settings):
        factor = next(slow)
        found = {name: stats(model, factor) for name, model in models.items()}
        return LatencyComparison(found, {name: (s.median,) for name, s in found.items()})

    monkeypatch.setattr(module, "measure_latency", lambda model, inputs, **settings: stats(model))
    monkeypatch.setattr(module, "compare_latency", compare)
    result = run(target={"latency": 0.5})
    full = count_params(make_net()) * 1e-3
    assert result.reached_target
    assert result.target == {"latency": 0.5 * full}
    assert result.latency == pytest.approx(count_params(result.model) * 1e-3)
    assert result.latency <= 0.5 * full
    assert [s.latency for s in result.history] == pytest.approx([s.params * 1e-3 for s in result.history])
    assert run(target={"latency": 0.8 * full, "macs": 0.9}).reached_target


def test_without_a_latency_target_nothing_is_timed(monkeypatch):
    module = sys.modules["idap.compress"]

    monkeypatch.setattr(module, "measure_latency", lambda *a, **k: pytest.fail("timed"))
    monkeypatch.setattr(module, "compare_latency", lambda *a, **k: pytest.fail("timed"))
    assert {s.latency for s in run(target={"macs": 0.7}).history} == {None}


def test_drift_is_that_of_the_validation_data():
    data = [torch.randn(4, 3, 6, 6)]
    net = make_net()
    result = run(net, target={"macs": 0.5}, validation=data)
    assert result.drift == pytest.approx(drift(net, result.model, data))
    assert result.drift != pytest.approx(drift(net, result.model, BATCHES))


def test_batch_norms_are_estimated_anew_after_every_surgery():
    seen = []

    def look(model: nn.Module) -> None:
        fresh = copy.deepcopy(model)
        recalibrate(fresh, BATCHES)
        seen.append(all(torch.equal(a, b) for a, b in zip(model.buffers(), fresh.buffers(), strict=True)))

    run(target={"macs": 0.4}, finetune=look)
    assert len(seen) > 2
    assert all(seen)
    seen.clear()
    run(target={"macs": 0.4}, finetune=look, recalibrate=False)
    assert not any(seen)


def test_compensation_can_be_told_from_its_absence():
    """The last linear layer has a bias and no norm behind it, so that both models differ there."""
    on, off = (
        run(
            target={"macs": 0.6},
            stages=("filters",),
            steps=1,
            initial_ratio=0.4,
            compensate=c,
            recalibrate=False,
        )
        for c in (True, False)
    )
    assert on.plan.steps == off.plan.steps
    assert not torch.equal(on.model.head.bias, off.model.head.bias)
    assert torch.equal(off.model.head.bias, make_net().head.bias)
    assert on.drift < off.drift


def test_the_ranking_is_that_of_the_options():
    """Of a residual trunk with many members the sum is large: unscaled, the blocks' inner widths go first."""
    settings = {"stages": ("filters",), "steps": 1, "initial_ratio": 0.25, "finetune": None}
    widths = {}
    for name, options in {"mean": {}, "sum": {"normalize": None, "reduction": "sum"}}.items():
        widths[name] = layer_widths(run(**settings, **options).model)
    assert widths["sum"]["stem"] == 16 > widths["mean"]["stem"]


def test_a_model_without_anything_to_prune_says_why():
    class Alone(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 5)

        def forward(self, x):
            return self.fc(x.mean((1, 2)))

    result = run(Alone(), target={"params": 0.5})
    assert not result.reached_target
    assert "output of the model" in result.stopped["filters"]
    assert result.plan.steps == ()


def test_a_target_out_of_reach_says_how_far_it_got():
    result = run(target={"macs": 1e-6}, steps=2, max_blocks=1)
    assert not result.reached_target
    assert result.macs > result.target["macs"]
    assert set(result.stopped) == {"filters", "layers"}


def test_a_target_already_met_does_nothing():
    result = run(target={"macs": 1.0})
    assert [s.stage for s in result.history] == ["base"]
    assert result.reached_target


def test_finetune_runs_after_every_step_and_its_model_is_used():
    calls: list[str] = []

    def train(model: nn.Module) -> nn.Module:
        calls.append("step")
        copied = copy.deepcopy(model)
        with torch.no_grad():
            copied.head.bias.fill_(7.0)
        return copied

    result = run(target={"macs": 0.5}, finetune=train, final_finetune=lambda m: calls.append("final"))
    steps = [s for s in result.history if s.stage in ("filters", "layers")]
    assert calls == ["step"] * len(steps) + ["final"]
    assert torch.equal(result.model.head.bias, torch.full((5,), 7.0))


def test_a_final_training_need_not_beat_a_lucky_step_only_the_original():
    def evaluate(model: nn.Module) -> float:
        if model.head.bias[0] == 7:
            return 0.9
        return 0.9 if count_params(model) == count_params(make_net()) else 0.95

    def train(model: nn.Module) -> None:
        with torch.no_grad():
            model.head.bias.fill_(7.0)

    result = run(evaluate=evaluate, target={"macs": 0.5}, final_finetune=train)
    assert [s.metric for s in result.history[-2:]] == [0.95, 0.9]
    assert result.history[-1].accepted
    assert result.metric == 0.9


def test_no_final_training_if_it_is_turned_off():
    calls = []
    result = run(target={"macs": 0.6}, finetune=calls.append, final_finetune=False)
    assert len(calls) == len(result.history) - 1
    assert {s.stage for s in result.history} == {"base", "filters", "layers"}
    with pytest.raises(InvalidInputError, match="final_finetune"):
        run(final_finetune=True)


def test_what_the_built_in_training_returns_will_do():
    data = [(batch, torch.tensor([0, 1, 2, 3])) for batch in BATCHES]
    seen: list[str] = []
    result = run(
        target={"macs": 0.4},
        finetune=lambda model: finetune(model, data, lr=0.01),
        on_stage=lambda name, model: seen.append(name),
    )
    assert result.reached_target
    assert result.history[-1].stage == "final"
    assert seen == ["filters", "layers"] + ["final"] * result.history[-1].accepted


def test_a_training_that_changes_the_structure_is_refused():
    with pytest.raises(InvalidInputError, match="structure"):
        run(finetune=lambda model: nn.Sequential(model, nn.Identity()))


def test_a_final_training_that_harms_is_undone():
    def evaluate(model: nn.Module) -> float:
        return 0.5 if model.head.bias[0] == 7 else 0.9

    def harm(model: nn.Module) -> None:
        with torch.no_grad():
            model.head.bias.fill_(7.0)

    result = run(evaluate=evaluate, target={"macs": 0.5}, final_finetune=harm)
    assert result.history[-1].stage == "final"
    assert not result.history[-1].accepted
    assert result.metric == 0.9
    assert result.model.head.bias[0] != 7


def test_training_that_diverges_undoes_the_step():
    def diverge(model: nn.Module) -> None:
        raise TrainingError("the loss is nan")

    result = run(finetune=diverge, stages=("filters",), halvings=1)
    assert [s.accepted for s in result.history] == [True, False, False]
    assert result.history[1].note == "the loss is nan"
    assert math.isnan(result.history[1].metric)
    history = json.loads(json.dumps(result.to_dict(), allow_nan=False))["history"]
    assert history[1]["metric"] is None


def test_other_errors_of_the_user_pass_through():
    def broken(model: nn.Module) -> None:
        raise ZeroDivisionError

    net = make_net()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ZeroDivisionError):
        run(net, finetune=broken)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_evaluate_gets_a_model_in_eval_mode_also_after_training_left_it_in_train_mode():
    modes: list[bool] = []

    def evaluate(model: nn.Module) -> float:
        modes.append(any(m.training for m in model.modules()))
        return 0.9

    run(make_net().train(), evaluate=evaluate, finetune=lambda m: m.train() and None, target={"macs": 0.6})
    assert len(modes) > 2
    assert not any(modes)


def test_same_seed_same_run():
    def train(model: nn.Module) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))

    def evaluate(model: nn.Module) -> float:
        return 1.0 - drift(make_net(), model, BATCHES)

    runs = [
        run(finetune=train, evaluate=evaluate, budget=0.5, target={"macs": 0.5}, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert without_time(runs[0].history) == without_time(runs[1].history)
    first, second = (r.model.state_dict() for r in runs[:2])
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert without_time(runs[0].history) != without_time(runs[2].history)


def test_records_add_up_and_the_result_is_json():
    records: list[StepRecord] = []
    result = run(target={"macs": 0.5}, progress=records.append)
    assert tuple(records) == result.history
    assert result.baseline.macs == count_macs(make_net(), ONE)
    content = json.loads(json.dumps(result.to_dict()))
    assert content["macs"] == result.macs
    assert len(content["history"]) == len(records)
    assert PruningPlan.from_json(json.dumps(content["plan"])).to_json() == result.plan.to_json()
    assert result.drift == pytest.approx(drift(make_net(), result.model, BATCHES), rel=1e-9)


def test_progress_true_prints_a_line_a_step(capsys):
    result = run(target={"macs": 0.8}, progress=True)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert sum("kept" in line for line in lines) == sum(s.accepted for s in result.history)


def test_round_to_and_ignore():
    result = run(target={"macs": 0.5}, stages=("filters",), round_to=4, ignore=("blocks.1.conv1",))
    widths = {n: m.out_channels for n, m in result.model.named_modules() if isinstance(m, nn.Conv2d)}
    assert widths["blocks.1.conv1"] == 16
    assert all(width % 4 == 0 for width in widths.values())
    assert min(widths.values()) < 16


def test_dict_batches():
    net = make_net()
    result = run(net, batches=[{"x": batch} for batch in BATCHES], target={"macs": 0.6})
    same = run(net, target={"macs": 0.6})
    assert without_time(result.history) == without_time(same.history)


def test_a_network_without_blocks_uses_the_first_stage_to_the_full():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24 * 4, 5)
    )  # fmt: skip
    result = run(net, target={"macs": 0.5}, first_share=0.3)
    assert result.reached_target
    assert "filters" in result.stopped


class TestDrift:
    def test_is_the_stated_formula(self):
        a, b = make_net().eval(), make_net((0.9, 0.5, 0.2)).eval()
        with torch.no_grad():
            wanted = torch.cat([a(x) for x in BATCHES]).double()
            got = torch.cat([b(x) for x in BATCHES]).double()
        expected = (wanted - got).square().sum() / wanted.square().sum()
        assert drift(a, b, BATCHES) == pytest.approx(expected.item(), rel=1e-6)

    def test_of_a_model_to_itself_is_zero_and_modes_stay(self):
        net = make_net().train()
        assert drift(net, copy.deepcopy(net), BATCHES) == 0
        assert net.training

    def test_against_zero_output(self):
        class Zero(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return torch.zeros(len(x), 5)

        assert drift(Zero(), Zero(), BATCHES) == 0
        assert drift(Zero(), make_net(), BATCHES) == math.inf
        assert drift(make_net(), Zero(), BATCHES) == pytest.approx(1.0)

    def test_wrong_arguments(self):
        with pytest.raises(EmptyDataError, match="no batch"):
            drift(make_net(), make_net(), [])
        with pytest.raises(InvalidInputError, match="differ in shape"):
            drift(make_net(), nn.Flatten(), BATCHES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": -0.1}, "budget"),
        ({"budget": float("nan")}, "budget"),
        ({"budget": 0.95}, "own units"),
        ({"steps": 0}, "steps"),
        ({"initial_ratio": 0.0}, "initial_ratio"),
        ({"initial_ratio": 1.0}, "initial_ratio"),
        ({"alpha": -1.0}, "alpha"),
        ({"halvings": -1}, "halvings"),
        ({"first_share": 0.0}, "first_share"),
        ({"max_blocks": -1}, "max_blocks"),
        ({"stages": ()}, "stages"),
        ({"stages": ("heads",)}, "stages"),
        ({"stages": "filters"}, "stages"),
        ({"stages": ("filters", "filters")}, "stages"),
        ({"target": {}}, "target"),
        ({"target": {"flops": 0.5}}, "target"),
        ({"target": {"macs": 0}}, "target for macs"),
        ({"target": {"macs": float("inf")}}, "target for macs"),
        ({"target": 0.5}, "target"),
        ({"evaluate": lambda m: float("nan")}, "finite number"),
        ({"evaluate": lambda m: None}, "finite number"),
        ({"evaluate": lambda m: "good"}, "finite number"),
        ({"evaluate": lambda m: True}, "finite number"),
        ({"evaluate": lambda m: torch.zeros(2)}, "finite number"),
        ({"batches": (x for x in BATCHES)}, "only once"),
        ({"batches": iter(BATCHES)}, "only once"),
        ({"batches": BATCHES[0]}, "put one batch in a list"),
        ({"batches": {"x": BATCHES[0]}}, "put one batch in a list"),
        ({"batches": 3}, "iterable"),
        ({"batches": [(BATCHES[0], torch.zeros(4))]}, "for x, _ in loader"),
        ({"ignore": ("nonsense",)}, "nonsense"),
        ({"evaluate": 0.9}, "evaluate of type float"),
    ],
)
def test_wrong_arguments_raise_before_anything_is_trained(change, message):
    net = make_net()
    before = copy.deepcopy(net.state_dict())
    trained: list[nn.Module] = []
    with pytest.raises(InvalidInputError, match=message):
        run(net, **({"finetune": trained.append} | change))
    assert not trained
    assert net.training
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_no_batch():
    with pytest.raises(EmptyDataError, match="no batch"):
        run(batches=[])


def test_a_metric_that_is_a_tensor_of_one_number_will_do():
    assert run(evaluate=lambda m: torch.tensor([0.5]), target={"macs": 0.9}).metric == 0.5


def test_a_metric_below_zero_such_as_minus_the_loss_will_do():
    result = run(evaluate=lambda m: -2.0, budget=0.5, target={"macs": 0.8})
    assert result.reached_target


def test_a_metric_that_breaks_later_raises():
    values = iter([0.9, 0.9, float("inf")])
    with pytest.raises(InvalidInputError, match="inf"):
        run(evaluate=lambda m: next(values), target={"macs": 0.2})


@pytest.mark.parametrize("name", ["finetune", "final_finetune", "criterion", "on_stage", "progress"])
def test_what_is_no_function_is_refused_before_anything_runs(name):
    calls = []
    with pytest.raises(InvalidInputError, match=f"{name}: got 5, wanted a function"):
        run(evaluate=lambda model: calls.append(model) or 1.0, **{name: 5})
    assert calls == []
