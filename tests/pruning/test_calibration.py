"""Mean compensation against the definition, and batch-norm statistics against their own averages."""

import copy

import pytest
import torch
from torch import nn

from idap import profile
from idap.calibration import compensate, following_norms, recalibrate
from idap.errors import EmptyDataError, InvalidInputError, NonFiniteError
from idap.plan import ChannelRemoval, ChannelStep, PruningPlan


def chain(first, second, *, norm=None):
    layers = [first, nn.ReLU(), second]
    return nn.Sequential(*layers, *([norm] if norm is not None else [])).double().eval()


def plan_for(model, size, removed, kinds=("conv_out", "conv_in"), spread=1):
    columns = tuple(c * spread + i for c in removed for i in range(spread))
    return PruningPlan(
        type(model).__name__,
        (
            ChannelStep(
                (
                    ChannelRemoval("0", kinds[0], size, tuple(removed)),
                    ChannelRemoval("2", kinds[1], size * spread, columns),
                )
            ),
        ),
    )


def with_means_in_place(model, reader, removed, means):
    """The full-width model in which the removed channels always are their means."""
    fixed = copy.deepcopy(model)
    channel_dim = 1 if isinstance(model.get_submodule(reader), nn.Conv2d) else -1

    def replace(module, args):
        x = args[0].movedim(channel_dim, -1).clone()
        x[..., removed] = means[removed]
        return (x.movedim(-1, channel_dim),)

    fixed.get_submodule(reader).register_forward_pre_hook(replace)
    return fixed


CASES = {
    "convolution": (nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3), None, (4, 3, 9, 8), ("conv_out", "conv_in")),
    "grouped": (nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3, groups=2), None, (4, 3, 9, 8), None),
    "linear": (nn.Linear(3, 6), nn.Linear(6, 5), None, (7, 3), ("linear_out", "linear_in")),
    "tokens": (nn.Linear(3, 6), nn.Linear(6, 5), None, (4, 7, 3), ("linear_out", "linear_in")),
    "batch norm": (
        nn.Conv2d(3, 6, 3),
        nn.Conv2d(6, 5, 3, bias=False),
        nn.BatchNorm2d(5),
        (4, 3, 9, 8),
        ("conv_out", "conv_in"),
    ),
}


@pytest.mark.parametrize("name", [name for name in CASES if name != "grouped"])
def test_removed_channels_leave_their_mean(name):
    first, second, norm, shape, kinds = CASES[name]
    torch.manual_seed(0)
    model = chain(copy.deepcopy(first), copy.deepcopy(second), norm=copy.deepcopy(norm))
    if norm is not None:
        model[3].running_mean.normal_()
        model[3].running_var.uniform_(0.5, 2)
    data = [torch.randn(shape).double() for _ in range(3)]
    removed = [1, 4]
    plan = plan_for(model, 6, removed, kinds)
    stats = profile(model, data, blocks=(), inputs=["2"]).inputs
    before = copy.deepcopy(model.state_dict())
    pruned = plan.apply(compensate(model, plan, stats, data[0]))
    wanted = with_means_in_place(model, "2", removed, stats["2"].mean)(data[0])
    torch.testing.assert_close(pruned(data[0]), wanted, rtol=1e-10, atol=1e-12)
    assert (plan.apply(model)(data[0]) - wanted).abs().max() > 1e-3, "nothing was there to compensate"
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), "the model itself was changed"


def test_grouped_convolution_gets_what_its_own_part_reads():
    torch.manual_seed(0)
    first, second, *_ = CASES["grouped"]
    model = chain(copy.deepcopy(first), copy.deepcopy(second))
    data = [torch.randn(4, 3, 9, 8).double()]
    stats = profile(model, data, blocks=(), inputs=["2"]).inputs
    removed = [0, 1, 4]
    plan = plan_for(model, 6, removed)
    shifted = compensate(model, plan, stats, data[0])
    masked = copy.deepcopy(model)
    for channel in removed:
        part = channel // 3
        masked[2].weight.data[2 * part : 2 * part + 2, channel % 3] = 0
    wanted = with_means_in_place(model, "2", removed, stats["2"].mean)(data[0])
    masked[2].bias = shifted[2].bias
    torch.testing.assert_close(masked(data[0]), wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 5, 3, padding=1),
        nn.Conv2d(6, 5, (3, 5), padding=(2, 1), stride=(2, 1), dilation=(2, 1)),
        nn.Conv2d(6, 5, 4, padding="same"),
        nn.ConvTranspose2d(6, 5, 3, stride=2, padding=1, output_padding=1),
        nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2),
    ],
    ids=["padded", "strided and dilated", "same", "transposed", "transposed and grouped"],
)
def test_the_mean_over_all_positions_is_right_under_zero_padding(layer):
    """With constant maps the mean of every tap's input is exact, so the mean of the outputs has to be."""
    torch.manual_seed(0)

    class Maps(nn.Module):
        def __init__(self):
            super().__init__()
            self.reader = copy.deepcopy(layer)

        def forward(self, x):
            return self.reader(x)

    model = Maps().double().eval()
    data = torch.randn(1, 6, 1, 1).double().expand(2, 6, 7, 6).contiguous()
    stats = profile(model, [data], blocks=(), inputs=["reader"]).inputs
    removal = ChannelRemoval("reader", "conv_in", 6, (1, 2, 5))
    shifted = compensate(model, PruningPlan("Maps", (ChannelStep((removal,)),)), stats, data)
    held = data.clone()
    held[:, [1, 2, 5]] = 0
    torch.testing.assert_close(
        shifted(held).mean((0, 2, 3)), model(data).mean((0, 2, 3)), rtol=1e-10, atol=1e-12
    )


def test_compensation_refuses_what_does_not_fit():
    model = chain(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3))
    data = torch.randn(2, 3, 9, 9).double()
    plan = plan_for(model, 6, [1])
    stats = profile(model, [data], blocks=(), inputs=["2"]).inputs
    with pytest.raises(InvalidInputError, match="2 steps"):
        compensate(model, plan + plan, stats, data)
    with pytest.raises(InvalidInputError, match="profile the model"):
        compensate(model, plan, {"2": profile(model, [data], blocks=(), inputs=["0"]).inputs["0"]}, data)
    stats["2"].state[2, 1] = float("nan")
    with pytest.raises(NonFiniteError, match="2: the mean"):
        compensate(model, plan, stats, data)


def test_following_norms_are_found_by_the_tensor_they_take():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(4)
            self.late = nn.Conv2d(3, 4, 1)
            self.lonely = nn.Conv2d(4, 4, 1)
            self.shared = nn.BatchNorm2d(4)
            self.twice = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            x = self.lonely(self.norm(self.late(x)) * 1.0) * 1.0
            return self.shared(self.twice(self.shared(x)))

    model = Net()
    assert following_norms(model, torch.randn(2, 3, 4, 4)) == {"late": "norm"}
    assert model.training


def test_a_norm_behind_something_in_place_does_not_follow():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.BatchNorm2d(4))
    assert following_norms(model, torch.randn(2, 3, 4, 4)) == {}


def test_a_shared_bias_is_left_alone():
    torch.manual_seed(0)
    model = chain(nn.Linear(3, 6), nn.Linear(6, 5))
    model.append(nn.Linear(5, 5).double())
    model[3].bias = model[2].bias
    data = torch.randn(7, 3).double()
    stats = profile(model, [data], blocks=(), inputs=["2"]).inputs
    shifted = compensate(model, plan_for(model, 6, [1], ("linear_out", "linear_in")), stats, data)
    assert shifted[3].bias is shifted[2].bias
    assert torch.equal(shifted[2].bias, model[2].bias)


def test_recalibration_leaves_norms_alone_that_no_batch_reaches():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.aux = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x, aux=False):
            return self.aux(x) if aux else self.main(x)

    model = Net().eval()
    model.aux.running_mean.fill_(7)
    assert recalibrate(model, [torch.randn(4, 3)]) == 1
    assert bool((model.aux.running_mean == 7).all())


def test_recalibration_averages_batches_and_leaves_the_rest():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4, momentum=0.3), nn.Dropout(0.5)).train()
    batches = [torch.randn(5, 3, 6) + i for i in range(3)]
    assert recalibrate(model, batches) == 1
    inside = [model[0](batch) for batch in batches]
    torch.testing.assert_close(model[1].running_mean, torch.stack([y.mean((0, 2)) for y in inside]).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack([y.var((0, 2)) for y in inside]).mean(0))
    assert model[1].momentum == 0.3
    assert model.training
    assert model[2].training


def test_recalibration_with_nothing_to_do_and_with_bad_batches():
    assert recalibrate(nn.Linear(2, 2), []) == 0
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).eval()
    model[1].running_mean.fill_(7)
    with pytest.raises(EmptyDataError):
        recalibrate(model, [])
    with pytest.raises(InvalidInputError, match="recalibrate=False"):
        recalibrate(model, [torch.randn(1, 2)])
    assert bool((model[1].running_mean == 7).all()), "the statistics were not put back"
    assert not model[1].training
