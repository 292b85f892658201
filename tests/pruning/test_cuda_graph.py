"""Profiles whose step is captured and replayed. Without a GPU, a tape of torch's operators stands in for the graph."""

from __future__ import annotations

import pytest
import torch
from pruning_networks import randomise
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import idap
import idap.cuda_graph
from idap.errors import ForwardError, InvalidInputError, NonFiniteError

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class Tape(TorchDispatchMode):
    """Behaves as a CUDA graph does: what runs within is recorded and leaves nothing behind, and ``replay`` runs it on
    the same memory, without the Python code that launched it."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.before = {}  # what was there and was written to, by storage
        self.own = set()  # storages that were made within

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        there = {storage(t) for t in tensors((args, kwargs))} - self.own
        for argument, value in zip(func._schema.arguments, args):
            if argument.alias_info is not None and argument.alias_info.is_write and storage(value) in there:
                self.before.setdefault(storage(value), (value, value.clone()))
        result = func(*args, **kwargs)
        self.own |= {storage(t) for t in tensors(result)} - there
        self.calls.append((func, args, kwargs, result))
        return result

    def __exit__(self, *error):
        super().__exit__(*error)
        for value, before in self.before.values():
            value.copy_(before)
        for t in tensors([result for *_, result in self.calls]):
            if storage(t) in self.own and t.is_floating_point():
                t.fill_(float("nan"))  # a graph's memory holds nothing before the first replay

    def replay(self):
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tensors(result), tensors(again)):
                if storage(old) != storage(new):
                    old.copy_(new)


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def storage(t):
    return t.untyped_storage()._cdata


@pytest.fixture
def tape(monkeypatch):
    tapes = []

    def capture(step, device):
        tapes.append(Tape())
        with tapes[-1]:
            step()
        return tapes[-1].replay

    monkeypatch.setattr(idap.cuda_graph, "capture", capture)
    monkeypatch.setattr(idap.cuda_graph.GraphedSteps, "supports", staticmethod(lambda device: True))
    return tapes


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()

    def forward(self, x):
        return x + self.act(self.norm(self.conv(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(6, 4)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def sizes(*batch_sizes):
    return [torch.randn(n, 3, 8, 8, dtype=torch.float64) for n in batch_sizes]


def assert_equal(ours, plain, rtol=1e-10):
    assert (ours.samples, ours.batches) == (plain.samples, plain.batches)
    for part in ("layers", "inputs", "blocks"):
        a, b = getattr(ours, part), getattr(plain, part)
        assert list(a) == list(b)
        for name in b:
            torch.testing.assert_close(a[name].state.cpu(), b[name].state.cpu(), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("fuse", [False, True])
def test_replays_give_the_statistics_of_running_it(tape, fuse):
    model = randomise(Net().double().eval())
    data = sizes(4, 4, 4, 4, 3)
    options = {"blocks": ["blocks.0", "blocks.1"], "inputs": ["head"], "progress": False, "fuse": fuse}
    plain = idap.profile(model, data, **options)
    model.calls = 0
    ours = idap.profile(model, data, cuda_graph=True, **options)
    assert_equal(ours, plain)
    assert len(tape) == 1
    # The first batch (with fusion the second as well), the capture, the last and shorter batch.
    assert model.calls == 3 + fuse


def test_the_caller_may_reuse_the_memory_of_a_batch(tape):
    model = randomise(Net().double().eval())
    data = sizes(2, 2, 2, 2)

    def one_buffer():
        buffer = torch.empty_like(data[0])
        for batch in data:
            yield buffer.copy_(batch)

    ours = idap.profile(model, one_buffer(), blocks=["blocks.0"], progress=False, cuda_graph=True, fuse=True)
    assert_equal(ours, idap.profile(model, data, blocks=["blocks.0"], progress=False))


def test_batches_that_alternate_and_batches_with_names(tape):
    model = randomise(Net().double().eval())
    data = [{"x": x} for x in sizes(2, 3, 2, 3, 2, 3)]
    ours = idap.profile(model, data, blocks=(), heads=(), progress=False, cuda_graph=True, fuse=True)
    assert_equal(ours, idap.profile(model, data, blocks=(), heads=(), progress=False))
    assert len(tape) == 1


def test_what_is_no_tensor_has_to_be_the_same(tape):
    class Scaled(Net):
        def forward(self, x, by):
            return super().forward(x * by)

    model = randomise(Scaled().double().eval())
    data = [(x, by) for x, by in zip(sizes(2, 2, 2, 2, 2, 2), (1.0, 2.0, 2.0, 1.0, 2.0, 2.0))]
    ours = idap.profile(model, data, blocks=(), heads=(), progress=False, cuda_graph=True, fuse=True)
    assert_equal(ours, idap.profile(model, data, blocks=(), heads=(), progress=False))
    assert len(tape) == 1


def test_one_batch_needs_no_graph(tape):
    model = randomise(Net().double().eval())
    idap.profile(model, sizes(2), blocks=(), progress=False, cuda_graph=True, fuse=True)
    assert tape == []


def test_not_finite_values_in_a_replay_name_layer_and_batch(tape):
    model = randomise(Net().double().eval())
    data = sizes(2, 2, 2, 2)
    data[3][1, 0, 0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"'stem'.* batch 3"):
        idap.profile(model, data, blocks=(), progress=False, cuda_graph=True, fuse=True)


def test_models_that_cannot_be_captured(tape):
    class Reads(Net):
        def forward(self, x):
            return super().forward(x if x.sum().item() > -1e9 else -x)

    with pytest.raises(ForwardError, match="cannot be captured as a CUDA graph"):
        idap.profile(
            randomise(Reads().double().eval()),
            sizes(2, 2, 2),
            blocks=(),
            heads=(),
            progress=False,
            cuda_graph=True,
            fuse=True,
        )

    class Changes(Net):
        def forward(self, x):
            return super().forward(x) if self.calls > 1 else self.blocks[0](self.stem(self.count(x)))

        def count(self, x):
            self.calls += 1
            return x

    with pytest.raises(ForwardError, match=r"did not call 'blocks\.1\.conv' for an earlier batch"):
        idap.profile(
            randomise(Changes().double().eval()),
            sizes(2, 2, 2),
            blocks=(),
            heads=(),
            progress=False,
            cuda_graph=True,
            fuse=True,
        )


def test_a_model_on_the_cpu_has_no_graph():
    with pytest.raises(InvalidInputError, match="the model is on cpu; wanted a model on a CUDA GPU"):
        idap.profile(Net(), sizes(2), progress=False, cuda_graph=True, fuse=True)


@needs_gpu
@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("fuse", [False, True])
def test_a_graph_on_the_gpu(fuse, backend):
    model = randomise(Net().double().eval()).cuda()
    data = sizes(4, 4, 4, 4, 3)
    options = {
        "blocks": ["blocks.0", "blocks.1"],
        "inputs": ["head"],
        "progress": False,
        "fuse": fuse,
        "backend": backend,
    }
    plain = idap.profile(model, data, **options)
    assert_equal(idap.profile(model, data, cuda_graph=True, **options), plain)
    assert_equal(
        idap.profile(model.float(), [x.float() for x in data], cuda_graph=True, **options), plain, rtol=1e-3
    )


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")
def test_a_graph_on_each_of_two_gpus():
    model = randomise(Net().double().eval())
    data = sizes(4, 4, 4, 4)
    options = {"blocks": ["blocks.0"], "progress": False}
    plain = idap.profile(model, data, **options)
    for device in ("cuda:0", "cuda:1", "cuda:0"):
        assert_equal(idap.profile(model.to(device), data, cuda_graph=True, **options), plain)
