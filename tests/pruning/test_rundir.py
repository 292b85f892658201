"""A run on disk: what is kept, how it goes on after an interruption, and what is refused."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_compress import BATCHES, Net, make_net
from torch import nn

import idap
from idap.compress import StepRecord, compress
from idap.errors import ArtifactError, InvalidInputError, TrainingError
from idap.rundir import JOURNAL, MODEL, RESULT, RUN, RunDirectory

SETTINGS = {"round_to": 2, "progress": False, "steps": 6, "target": {"macs": 0.35}, "budget": 0.2}


class Interrupt(Exception):
    pass


def metric(model: nn.Module) -> float:
    """A number that falls as the model loses weights, and depends on their values."""
    with torch.no_grad():
        return 0.9 + 1e-3 * float(model(BATCHES[0]).mean()) - 30 / sum(p.numel() for p in model.parameters())


def train(model: nn.Module) -> None:
    """Random: whoever resumes with another seed, or one step too early, ends elsewhere."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=1e-3)


def run(directory=None, *, net=None, resume=False, evaluate=metric, finetune=train, **changes):
    settings = SETTINGS | changes
    return compress(
        net or make_net(),
        BATCHES,
        evaluate=evaluate,
        finetune=finetune,
        directory=directory,
        resume=resume,
        **settings,
    )


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


def same(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = bits(a), bits(b)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def outcome(result) -> list:
    return [(r.stage, r.action, r.accepted, r.macs, r.metric, r.drift) for r in result.history]


@pytest.fixture(scope="module")
def whole():
    """The run that nothing interrupts."""
    return run()


def test_a_directory_changes_nothing_and_holds_everything(tmp_path, whole):
    result = run(tmp_path / "run")
    assert outcome(result) == outcome(whole)
    assert same(result.model, whole.model)
    names = {p.name for p in (tmp_path / "run").iterdir() if not p.name.startswith("checkpoint")}
    assert names - {"tensorboard"} == {JOURNAL, MODEL, RESULT, RUN}
    loaded = idap.load(tmp_path / "run" / MODEL, Net)
    assert same(loaded, result.model)
    report = json.loads((tmp_path / "run" / RESULT).read_text())
    assert report["macs"] == result.macs
    assert [StepRecord.from_dict(r) for r in report["history"]] == list(result.history)
    assert report["widths"]["before"]["stem"] == 16
    assert report["widths"]["after"]["stem"] == result.model.stem.out_channels
    assert report["divergence"]["filters"]["before"].keys() == {
        name for name, m in make_net().named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))
    }
    assert set(report["divergence"]["blocks"]["before"]) == {"blocks.0", "blocks.1", "blocks.2"}
    assert report["latency"]["speedup"] > 0
    steps = [json.loads(line) for line in (tmp_path / "run" / JOURNAL).read_text().splitlines()]
    assert [e["record"]["metric"] for e in steps if e["event"] == "step"] == [
        r.metric for r in result.history
    ]


def test_an_interruption_in_any_step_costs_that_step_alone(tmp_path, whole):
    """Broken off in the n-th training or evaluation, then resumed, for every n until none is left."""
    for n in range(100):
        directory = tmp_path / str(n)
        calls = {"evaluate": 0, "finetune": 0}

        def counted(name, function, limit, calls=calls):
            def call(model):
                if sum(calls.values()) >= limit:
                    raise Interrupt
                calls[name] += 1
                return function(model)

            return call

        def attempt(limit, resume, directory=directory, counted=counted):
            return run(
                directory,
                resume=resume,
                evaluate=counted("evaluate", metric, limit),
                finetune=counted("finetune", train, limit),
            )

        try:
            attempt(n, False)
        except Interrupt:
            pass
        else:
            assert n == 2 * len(whole.history) - 1  # the original is evaluated, not trained
            return
        done = dict(calls)
        result = attempt(10**6, (directory / RUN).exists())
        assert outcome(result) == outcome(whole)
        assert same(result.model, whole.model)
        # A step is made of a training and an evaluation; at most one training was lost.
        assert calls["evaluate"] - len(whole.history) in (0, 1)  # that of the original may be made again
        assert calls["finetune"] - (len(whole.history) - 1) in (0, 1)
        assert done["finetune"] >= 0
    pytest.fail("the run never came to its end")


def test_a_finished_run_is_read_and_nothing_computed(tmp_path, whole):
    run(tmp_path)

    def never(model):
        raise AssertionError("nothing is left to do")

    again = run(tmp_path, resume=True, evaluate=never, finetune=never)
    assert outcome(again) == outcome(whole)
    assert same(again.model, whole.model)
    assert again.reached_target == whole.reached_target
    assert again.stopped == whole.stopped
    assert again.plan.steps == whole.plan.steps


SCRIPT = """
import sys, time, torch
import test_rundir as t
def slow(model):
    time.sleep(0.02)
    t.train(model)
torch.set_num_threads(1)
t.run(sys.argv[1], resume=True, finetune=slow)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="the system has no kill -9")
def test_killed_and_resumed_the_model_is_the_same_bit_for_bit(tmp_path):
    here = Path(__file__).parent
    paths = [str(here), str(here.parents[1]), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}

    def start(directory):
        return subprocess.Popen([sys.executable, "-c", textwrap.dedent(SCRIPT), str(directory)], env=env)

    assert start(tmp_path / "whole").wait(120) == 0
    lines = (tmp_path / "whole" / JOURNAL).read_text().count("\n")
    kills = 0
    for goal in (1, lines // 2, lines - 2):
        process = start(tmp_path / "killed")
        journal = tmp_path / "killed" / JOURNAL
        while process.poll() is None and (not journal.exists() or journal.read_text().count("\n") < goal):
            time.sleep(0.005)
        kills += process.poll() is None
        process.kill()
        process.wait()
    assert kills >= 2
    assert start(tmp_path / "killed").wait(120) == 0
    first, second = (idap.load(tmp_path / name / MODEL, Net) for name in ("whole", "killed"))
    assert same(first, second)


def test_a_half_written_line_is_dropped(tmp_path, whole):
    with pytest.raises(Interrupt):
        run(tmp_path, finetune=stop_at(3))
    with (tmp_path / JOURNAL).open("a") as file:
        file.write('{"event": "step", "rec')
    result = run(tmp_path, resume=True)
    assert same(result.model, whole.model)


def stop_at(n):
    left = [n]

    def finetune(model):
        left[0] -= 1
        if not left[0]:
            raise Interrupt
        train(model)

    return finetune


@pytest.fixture
def interrupted(tmp_path):
    with pytest.raises(Interrupt):
        run(tmp_path / "run", finetune=stop_at(3))
    return tmp_path / "run"


def test_other_settings_or_another_model_are_refused(interrupted):
    with pytest.raises(ArtifactError, match=r"round_to=2, now it is 4"):
        run(interrupted, resume=True, round_to=4)
    with pytest.raises(ArtifactError, match="another model"):
        run(interrupted, resume=True, net=make_net((1.0, 0.5, 0.3)))
    with pytest.raises(ArtifactError, match="resume=True"):
        run(interrupted)


def test_damage_is_refused_with_the_reason(interrupted):
    journal = interrupted / JOURNAL
    good = journal.read_text()
    lines = good.splitlines()
    journal.write_text("\n".join(["{broken", *lines[1:]]) + "\n")
    with pytest.raises(ArtifactError, match="line 1 is damaged"):
        run(interrupted, resume=True)
    journal.write_text("\n".join(lines[1:]) + "\n")
    with pytest.raises(ArtifactError, match="line 1 of the journal is a"):
        run(interrupted, resume=True)
    for bad in ('{"event": "step"}', '{"event": "step", "record": 5}', '{"event": "plan", "value": 7}'):
        journal.write_text("\n".join([*lines[:-1], bad]) + "\n")
        with pytest.raises(ArtifactError, match=f"line {len(lines)} is damaged"):
            run(interrupted, resume=True)
    journal.write_text(good)
    weights = next(interrupted.glob("checkpoint-*/model.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ArtifactError, match="damaged"):
        run(interrupted, resume=True)
    (interrupted / RUN).write_text("{}")
    with pytest.raises(ArtifactError, match="not the description of a run"):
        run(interrupted, resume=True)


def test_a_foreign_directory_or_file_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for resume in (False, True):
        with pytest.raises(ArtifactError, match=r"holds no run of idap \(thesis"):
            run(tmp_path, resume=resume)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    with pytest.raises(ArtifactError, match="is a file"):
        run(tmp_path / "thesis.tex")
    with pytest.raises(InvalidInputError, match="needs the directory"):
        run(None, resume=True)


def test_a_read_only_place_is_refused_before_any_work(tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ArtifactError, match="cannot be written"):
        run(tmp_path / "run", evaluate=lambda model: pytest.fail("work was done"))


def test_a_disk_that_is_full_says_so(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    directory = RunDirectory(tmp_path / "run", {}, resume=False)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ArtifactError, match="No space left"):
        directory.write({"event": "x", "value": 1})
    directory.close()


def test_a_run_that_has_done_nothing_makes_room(tmp_path, whole):
    with pytest.raises(InvalidInputError, match="budget 5"):
        run(tmp_path, budget=5)
    assert same(run(tmp_path).model, whole.model)


def test_data_in_a_new_order_every_time_can_be_resumed(tmp_path):
    def shuffled(directory, resume=False, finetune=train):
        torch.manual_seed(len(list(directory.parent.iterdir())))  # the caller's own state must not matter
        loader = torch.utils.data.DataLoader(torch.cat(BATCHES), 4, shuffle=True, drop_last=True)
        return compress(
            make_net(),
            loader,
            evaluate=metric,
            finetune=finetune,
            directory=directory,
            resume=resume,
            example_inputs=BATCHES[0][:1],
            **SETTINGS,
        )

    first = shuffled(tmp_path / "a")
    with pytest.raises(Interrupt):
        shuffled(tmp_path / "b", finetune=stop_at(3))
    second = shuffled(tmp_path / "b", resume=True)
    assert outcome(first) == outcome(second)
    assert same(first.model, second.model)


def test_every_stage_is_told_of_once(tmp_path):
    told = []
    tell = lambda name, model: told.append(name)
    with pytest.raises(Interrupt):
        run(tmp_path, finetune=stop_at(4), on_stage=tell)
    run(tmp_path, resume=True, on_stage=tell)
    wanted = []
    run(on_stage=lambda name, model: wanted.append(name))
    assert told == wanted
    run(tmp_path, resume=True, on_stage=tell)
    assert told == wanted


def test_one_process_at_a_time(tmp_path):
    pytest.importorskip("fcntl")
    first = RunDirectory(tmp_path, {"a": 1}, resume=False)
    with pytest.raises(ArtifactError, match="in use"):
        RunDirectory(tmp_path, {"a": 1}, resume=True)
    first.close()
    RunDirectory(tmp_path, {"a": 1}, resume=True).close()


# ------------------------------------------------------------------------------------- many processes


def _process(rank: int, folder: str, world: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    result = run(f"{folder}/run", finetune=None, recalibrate=False)
    result.plan.save(f"{folder}/plan{rank}.json")
    torch.save(bits(result.model), f"{folder}/weights{rank}.pt")
    failing = run(None, finetune=lambda model: _fail(rank), steps=2, halvings=0)
    assert {r.accepted for r in failing.history[1:]} == {False}
    torch.manual_seed(rank)  # the training of every process draws otherwise; all must end alike
    drawn = run(None, finetune=lambda model: _perturb(model, rank), steps=2)
    torch.save(bits(drawn.model), f"{folder}/drawn{rank}.pt")
    dist.destroy_process_group()


def _fail(rank: int) -> None:
    if rank:
        raise TrainingError("on one process alone")


def _perturb(model: nn.Module, rank: int) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (rank + 1), alpha=1e-3)


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
def test_two_processes_take_the_decisions_of_one(tmp_path):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(_process, args=(str(tmp_path), 2), nprocs=2)
    alone = run(None, finetune=None, recalibrate=False)
    for rank in (0, 1):
        assert idap.PruningPlan.load(tmp_path / f"plan{rank}.json").steps == alone.plan.steps
        weights = torch.load(tmp_path / f"weights{rank}.pt")
        for name, tensor in bits(alone.model).items():
            torch.testing.assert_close(weights[name], tensor)
    first, second = (torch.load(tmp_path / f"drawn{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert same(idap.load(tmp_path / "run" / MODEL, Net), idap.load(tmp_path / "run" / MODEL, Net))
