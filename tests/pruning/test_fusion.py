"""Profiles with convolution, batch norm and activation in one pass: the same network, the same statistics."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from pruning_networks import randomise
from torch import nn

import idap
from idap.errors import ForwardError, InvalidInputError, NonFiniteError
from idap_kernels import available_backends, bn_act_stats
from idap_kernels.bn_act_stats import fused_pass

# idap.profile, by attribute, is the function.
profile_module = sys.modules["idap.profile"]

needs_kernels = pytest.mark.skipif(
    available_backends()["cpu"] is not None, reason=f"CPU kernels: {available_backends()['cpu']}"
)
pytestmark = needs_kernels


@pytest.fixture
def fused(monkeypatch):
    """The activations of the fused passes, in the order of the calls."""
    acts = []

    def first(*args, **kwargs):
        acts.append(kwargs["act"])
        return bn_act_stats(*args, **kwargs)

    def further(x, norm, act, *args):
        acts.append(act)
        return fused_pass(x, norm, act, *args)

    monkeypatch.setattr(profile_module, "bn_act_stats", first)
    monkeypatch.setattr(profile_module, "fused_pass", further)
    return acts


def batches(count=3, shape=(2, 3, 9, 9)):
    return [torch.randn(shape, dtype=torch.float64) for _ in range(count)]


def check(model, data, **options):
    """The profile with and without fusion, and the outputs of the model on the way, are the same."""
    model = randomise(model.double().eval())
    outputs = {}
    profiles = {}
    for fuse in (False, True):
        made = outputs[fuse] = []

        def forward(m, batch, made=made):
            made.append(m(batch))

        if hasattr(model, "calls"):
            model.calls = 0
        profiles[fuse] = idap.profile(model, data, forward=forward, progress=False, fuse=fuse, **options)
    for plain, ours in zip(outputs[False], outputs[True]):
        for a, b in zip(
            plain if isinstance(plain, tuple) else (plain,), ours if isinstance(ours, tuple) else (ours,)
        ):
            torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)
    plain, ours = profiles[False], profiles[True]
    assert list(ours.layers) == list(plain.layers)
    for name, stats in plain.layers.items():
        torch.testing.assert_close(ours.layers[name].state, stats.state, rtol=1e-10, atol=1e-10)
    assert ours.blocks.keys() == plain.blocks.keys()
    for name, pair in plain.blocks.items():
        torch.testing.assert_close(ours.blocks[name].state, pair.state, rtol=1e-10, atol=1e-10)
    return ours


class Net(nn.Module):
    """conv → norm → ``use``, which a test gives, → conv."""

    def __init__(self, use, norm=None):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(5) if norm is None else norm
        self.last = nn.Conv2d(5, 4, 1)
        self.use = use
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.use(self, x)


def chain(act):
    return lambda net, x: net.last(act(net.norm(net.conv(x))))


KNOWN = {
    "nn.ReLU": (nn.ReLU(), "relu"),
    "nn.ReLU in place": (nn.ReLU(inplace=True), "relu"),
    "nn.ReLU6": (nn.ReLU6(), "relu6"),
    "nn.ReLU6 in place": (nn.ReLU6(inplace=True), "relu6"),
    "nn.SiLU": (nn.SiLU(), "silu"),
    "nn.GELU": (nn.GELU(), "gelu"),
    "nn.Hardswish": (nn.Hardswish(inplace=True), "hardswish"),
    "F.relu": (F.relu, "relu"),
    "F.relu_": (F.relu_, "relu"),
    "torch.relu": (torch.relu, "relu"),
    "Tensor.relu_": (lambda n: n.relu_(), "relu"),
    "positional": (lambda n: F.relu(n, True), "relu"),
}


@pytest.mark.parametrize("which", KNOWN)
def test_known_activations_join_the_pass_from_the_second_batch_on(which, fused):
    act, name = KNOWN[which]
    check(Net(chain(act)), batches())
    assert fused == ["identity", name, name]


OTHER = {
    "unknown": nn.Mish(),
    "leaky": nn.LeakyReLU(0.1),
    "tanh gelu": nn.GELU(approximate="tanh"),
    "hardtanh": nn.Hardtanh(),
    "clamp": lambda n: n.clamp(min=0),
    "scripted": None,
    "shifted": lambda n: F.relu(n + 1),
    "added to": lambda n: n.add_(1).relu_(),
    "script, then relu": None,
    "relu, then script": None,
}


@pytest.mark.filterwarnings("ignore:.*jit.script.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("which", OTHER)
def test_other_activations_stay_with_torch(which, fused):
    act = OTHER[which]
    if act is None:
        scripted = torch.jit.script(_swish)
        act = {
            "scripted": scripted,
            "script, then relu": lambda n: scripted(n) + F.relu(n),
            "relu, then script": lambda n: F.relu(n) + scripted(n),
        }[which]
    check(Net(chain(act)), batches())
    assert set(fused) == {"identity"}
    assert len(fused) == 3


def _swish(n):
    return n * n.sigmoid()


def kept(net, x):
    n = net.norm(net.conv(x))
    store = [n]
    r = F.relu(n)
    return net.last(r + 2 * store[0])


def kept_in_place(net, x):
    n = net.norm(net.conv(x))
    store = [n]
    r = F.relu(n, inplace=True)
    return net.last(r + 2 * store[0])


def returned(net, x):
    n = net.norm(net.conv(x))
    return net.last(F.relu(n)), n


def source_again(net, x):
    y = net.conv(x)
    return net.last(F.relu(net.norm(y)) + y)


def source_changed(net, x):
    y = net.conv(x)
    n = net.norm(y)
    r = F.relu(n)
    y.mul_(3)
    return net.last(r + y + n)


def source_used_first(net, x):
    y = net.conv(x)
    z = y * 2
    y.add_(1)
    return net.last(F.relu(net.norm(y)) + z)


def twice(net, x):
    y = net.conv(x)
    return net.last(F.relu(net.norm(y)) - F.silu(net.norm(y)))


def shared(net, x):
    a, b = net.conv(x), net.conv(x * 2)
    return net.last(F.relu(net.norm(a)) + F.silu(net.norm(b)))


def shared_alike(net, x):
    a, b = net.conv(x), net.conv(x * 2)
    return net.last(F.relu(net.norm(a)) + F.relu(net.norm(b)))


def interleaved(net, x):
    a, b = net.conv(x), net.conv(x * 2)
    n, m = net.norm(b), net.norm(a)
    return net.last(F.relu(n) + F.relu(m))


def result_changed(net, x):
    n = net.norm(net.conv(x))
    r = F.relu(n)
    r += 5
    return net.last(r * n)


def activated_again(net, x):
    n = net.norm(net.conv(x))
    r = F.relu(n)
    r += 5
    return net.last(r * F.relu(n))


def followed_by_gradients(net, x):
    x = x.clone().requires_grad_()
    with torch.enable_grad():
        energy = F.relu(net.norm(net.conv(x))).square().sum()
        (slope,) = torch.autograd.grad(energy, x)
    return net.last(net.conv(slope))


def given_a_place(net, x):
    n = net.norm(net.conv(x))
    place = torch.empty_like(n)
    F.gelu(n, out=place)
    return net.last(place)


def weights_exchanged(net, x):
    if net.calls == 3:
        net.norm.weight.data = net.norm.weight.data * 2
    net.norm.bias.add_(1)
    y = net.last(F.relu(net.norm(net.conv(x))))
    if net.calls == 3:
        net.norm.weight.data = net.norm.weight.data / 2
    net.norm.bias.sub_(1)
    return y


def hidden_from_functions(net, x):
    n = net.norm(net.conv(x))
    r = F.relu(n)
    with torch._C.DisableTorchFunction():
        r = r + n * 2
    return net.last(r)


def in_another_thread(net, x):
    from concurrent.futures import ThreadPoolExecutor

    def work():
        with torch.no_grad():
            return net.conv(x).relu_()

    with ThreadPoolExecutor(1) as pool:
        return net.last(F.relu(net.norm(pool.submit(work).result())))


def changes_its_mind(net, x):
    n = net.norm(net.conv(x))
    return net.last(F.silu(n) if net.calls == 2 else F.relu(n))


def adds_later(net, x):
    n = net.norm(net.conv(x))
    r = F.relu(n)
    return net.last(r if net.calls < 3 else r + n)


def in_place_later(net, x):
    n = net.norm(net.conv(x))
    return net.last(F.relu(n) if net.calls < 3 else n.mul_(2).relu())


def no_norm_later(net, x):
    y = net.conv(x)
    return net.last(F.relu(net.norm(y) if net.calls < 3 else y.mul_(0.5)))


def looked_at(net, x):
    y = net.conv(x)
    assert y.shape[1] == 5
    assert y.is_contiguous()
    n = net.norm(y)
    assert n.dim() == 4
    assert n.dtype == x.dtype
    return net.last(F.relu(n))


def as_keyword(net, x):
    return net.last(F.relu(input=net.norm(net.conv(x))))


def joined(net, x):
    n = net.norm(net.conv(x))
    return net.last(torch.cat([F.relu(n), n]).reshape(2, *n.shape).sum(0))


@pytest.mark.parametrize(
    ("use", "acts"),
    [
        (kept, ["identity", "relu", "identity"]),
        (kept_in_place, ["identity", "relu", "relu"]),
        (returned, None),
        (source_again, None),
        (source_changed, None),
        (source_used_first, []),
        (twice, None),
        (shared, ["identity"] * 6),
        (shared_alike, ["identity"] * 2 + ["relu"] * 4),
        (interleaved, ["identity"] * 2 + ["relu"] * 4),
        (result_changed, None),
        (activated_again, None),
        (followed_by_gradients, []),
        (given_a_place, ["identity"] * 3),
        (weights_exchanged, ["identity", "relu", "relu"]),
        (hidden_from_functions, ["identity"] * 3),
        (in_another_thread, []),
        (changes_its_mind, ["identity", "relu", "identity"]),
        (adds_later, ["identity", "relu", "relu"]),
        (in_place_later, ["identity", "relu", "relu"]),
        (no_norm_later, ["identity", "relu"]),
        (looked_at, ["identity", "relu", "relu"]),
        (as_keyword, None),
        (joined, None),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_whatever_is_done_with_the_maps_comes_out_the_same(use, acts, fused):
    check(Net(use), batches())
    if acts is not None:
        assert fused == acts


def test_hooks_of_others_see_the_values_that_they_would():
    seen = {}

    def spy(which):
        return lambda module, args, output: seen.setdefault(which, []).append(output.sum().item())

    net = Net(chain(nn.ReLU()))
    net.norm.register_forward_hook(spy("norm"))
    check(net, batches())
    plain, ours = seen["norm"][:3], seen["norm"][3:]
    assert ours == pytest.approx(plain, rel=1e-12)


def test_hooks_that_keep_a_map_find_its_values_later():
    found = []
    net = Net(chain(nn.ReLU()))
    net.norm.register_forward_hook(lambda module, args, output: found.append(output))
    check(net, batches())
    for plain, ours in zip(found[:3], found[3:]):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
        assert (ours < 0).any()


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(5, affine=False), nn.SyncBatchNorm(5), nn.BatchNorm2d(5, eps=0.1)], ids=str
)
def test_kinds_of_batch_norm(norm, fused):
    check(Net(chain(nn.ReLU()), norm), batches())
    assert fused == ["identity", "relu", "relu"]


def test_norms_that_are_not_fused(fused):
    for norm in (nn.BatchNorm2d(5, track_running_stats=False), nn.InstanceNorm2d(5), nn.GroupNorm(5, 5)):
        check(Net(chain(nn.ReLU()), norm), batches())
    assert fused == []


def test_other_layers_and_dimensions(fused):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose2d(3, 6, 2, stride=2)
            self.up_norm = nn.BatchNorm2d(6)
            self.wide = nn.Conv1d(6, 7, 3)
            self.wide_norm = nn.BatchNorm1d(7)
            self.fc = nn.Linear(7, 8)
            self.fc_norm = nn.BatchNorm1d(8)
            self.tokens = nn.Linear(7, 5)
            self.tokens_norm = nn.BatchNorm1d(5)

        def forward(self, x):
            x = F.relu(self.up_norm(self.up(x)))
            x = F.silu(self.wide_norm(self.wide(x.flatten(2))))
            t = F.relu(self.tokens_norm(self.tokens(x.transpose(1, 2)).transpose(1, 2)))
            return F.relu(self.fc_norm(self.fc(x.mean(2)))), t

    check(Mixed(), batches(2))
    assert fused == ["identity"] * 3 + ["relu", "silu", "relu"]


def test_blocks_are_measured_as_they_were():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.an = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
            self.b, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x):
            y = self.bn(self.b(self.relu(self.an(self.a(x)))))
            y += x
            return self.relu(y)

    model = nn.Sequential(Residual(), Residual())
    names = ["0", "1", "0.an", "0.relu", "1.bn"]
    ours = check(model, batches(), blocks=names)
    assert set(ours.blocks) == set(names)


@pytest.mark.parametrize("channels_last", [False, True])
def test_whole_networks(channels_last, fused):
    torchvision = pytest.importorskip("torchvision")
    for build in (torchvision.models.resnet18, torchvision.models.mobilenet_v3_small):
        fused.clear()
        model = build(weights=None)
        data = batches(2, (2, 3, 48, 48))
        if channels_last:
            model = model.to(memory_format=torch.channels_last)
            data = [x.to(memory_format=torch.channels_last) for x in data]
        check(model, data)
        norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        assert len(fused) == 2 * norms
        assert fused[:norms] == ["identity"] * norms
        blocks = [m for m in model.modules() if type(m).__name__ == "Conv2dNormActivation" and len(m) == 3]
        joined = [act for act in fused[norms:] if act != "identity"]
        assert len(joined) == (len(blocks) or 9)  # the stem of ResNet-18, and one of two in each block


def test_under_autocast(fused):
    net = randomise(Net(chain(nn.ReLU())).eval()).float()
    data = [x.float() for x in batches()]
    with torch.autocast("cpu", torch.bfloat16):
        plain = idap.profile(net, data, blocks=(), progress=False, fuse=False)
        ours = idap.profile(net, data, blocks=(), progress=False, fuse=True)
    for name, stats in plain.layers.items():
        torch.testing.assert_close(ours.layers[name].state, stats.state, rtol=0.05, atol=0.5)
    assert fused == ["identity", "relu", "relu"]


def test_a_norm_that_does_not_fit_is_an_error_of_torch():
    net = randomise(Net(chain(nn.ReLU())).double().eval())
    net.norm.running_mean = net.norm.running_mean[:4]
    with pytest.raises(ForwardError, match="running_mean should contain 5 elements"):
        idap.profile(net, batches(), blocks=(), heads=(), progress=False, fuse=True)


def test_not_finite_values_are_found_behind_a_fused_pass():
    net = randomise(Net(chain(nn.ReLU())).double().eval())
    data = batches()
    data[1][0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"'conv'.* batch 1"):
        idap.profile(net, data, blocks=(), heads=(), progress=False, fuse=True)


def test_the_layer_that_was_called_first_is_named():
    def use(net, x):
        y = net.conv(x)
        z = net.last(x.new_zeros(1, 5, 2, 2) / 0)  # measured before the other, whose norm comes late
        return F.relu(net.norm(y)).sum() + z.sum()

    net = randomise(Net(use).double().eval())
    data = batches(1)
    data[0][0, 0, 0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match="'conv'"):
        idap.profile(net, data, blocks=(), heads=(), progress=False, fuse=True)


def test_a_layer_that_hands_on_what_another_gave(fused):
    class Outer(nn.Conv2d):
        def __init__(self):
            super().__init__(3, 5, 1)
            self.inner = nn.Conv2d(3, 5, 1)

        def forward(self, x):
            return self.inner(x)

    net = Net(chain(nn.ReLU()))
    net.conv = Outer()
    ours = check(net, batches())
    assert ours.layers["conv.inner"].count == ours.layers["conv"].count == 3 * 2 * 81


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_parts_run_eagerly_meanwhile(fullgraph, fused):
    torch._dynamo.reset()
    tail = torch.compile(lambda n: F.relu(n) * 2, backend="eager", fullgraph=fullgraph)
    check(Net(chain(tail)), batches())
    assert fused == ["identity", "relu", "relu"]
    act = torch.compile(nn.ReLU(), backend="eager", fullgraph=fullgraph)
    check(Net(chain(act)), batches())
    assert len(fused) == 6


@pytest.mark.filterwarnings("ignore:.*jit.script.*:FutureWarning")
def test_changes_that_nobody_sees_are_refused():
    """TorchScript that writes into a layer's output, from the second batch on: no statistics rather than wrong ones."""
    scripted = torch.jit.script(_doubled)

    def use(net, x):
        y = net.conv(x)
        if net.calls > 1:
            scripted(y)
        return net.last(F.relu(net.norm(y)))

    net = randomise(Net(use).double().eval())
    with pytest.raises(InvalidInputError, match="'conv' was changed in place"):
        idap.profile(net, batches(), blocks=(), heads=(), progress=False, fuse=True)
    net.calls = 0
    idap.profile(net, batches(), blocks=(), heads=(), progress=False, fuse=False)


@pytest.mark.filterwarnings("ignore:.*jit.script.*:FutureWarning")
def test_changes_from_the_first_batch_on_are_known(fused):
    scripted = torch.jit.script(_doubled)

    def use(net, x):
        y = net.conv(x)
        scripted(y)
        return net.last(F.relu(net.norm(y)))

    check(Net(use), batches())
    assert fused == []


@pytest.mark.filterwarnings("ignore:.*jit.script.*:FutureWarning")
def test_sources_that_change_unseen_are_refused():
    scripted = torch.jit.script(_doubled)

    def use(net, x):
        y = net.conv(x)
        n = net.norm(y)
        r = F.relu(n)
        if net.calls > 1:
            scripted(y)
        return net.last(r + n)

    net = randomise(Net(use).double().eval())
    with pytest.raises(InvalidInputError, match="'conv' was changed in place"):
        idap.profile(net, batches(), blocks=(), heads=(), progress=False, fuse=True)


def test_errors_of_ours_that_the_model_raises_are_the_models():
    def use(net, x):
        raise InvalidInputError("the model's own")

    with pytest.raises(ForwardError, match="on batch 0: the model's own"):
        idap.profile(Net(use).double(), batches(), blocks=(), heads=(), progress=False, fuse=True)


def _doubled(y):
    return y.mul_(2)


def test_a_model_without_batch_norms_runs_without_the_mode(monkeypatch):
    def never(*args):
        raise AssertionError

    monkeypatch.setattr(profile_module, "NormFusion", never)
    model, data = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), [torch.randn(1, 3, 4, 4)]
    idap.profile(model, data, progress=False, fuse=True)
    idap.profile(Net(chain(nn.ReLU())), data, progress=False)  # nor does one on a CPU, unless asked to


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("channels_last", [False, True])
def test_on_the_gpu_nothing_waits_until_the_end(channels_last, fused):
    torchvision = pytest.importorskip("torchvision")
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = torchvision.models.resnet18(weights=None)
    model = randomise(model.double()).float().eval().cuda().to(memory_format=layout)
    data = [torch.randn(4, 3, 64, 64, device="cuda").to(memory_format=layout) for _ in range(3)]
    options = {"blocks": (), "heads": (), "progress": False}
    plain = idap.profile(model, data, fuse=False, **options)  # the kernels check themselves in here
    assert fused == []
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ours = idap.profile(model, data, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(fused) == 3 * 20
    waits = [w for w in caught if "synchronizing" in str(w.message)]
    assert len(waits) <= 1, "only the check that all is finite, at the end"
    for name, stats in plain.layers.items():
        scale = stats.state.abs().amax(1, keepdim=True)
        assert ((ours.layers[name].state - stats.state).abs() / scale).max() < 1e-3
