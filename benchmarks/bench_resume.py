"""Runs that are killed (-9) at random moments and resumed: do all end at the same model, bit for bit?

python benchmarks/bench_resume.py --runs 20 --json benchmarks/results/resume-cpu.json

Both stages with fine-tuning on the embedded digits. One run goes through; every other one is killed at moments
drawn from its length, resumed until it ends, and its weights and history are compared with the first's. A run that
ends before a moment of its own is started anew, with earlier moments.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from timing import environment, write_json

TRIES = 10  # starts of a run that ends before it can be killed


def work(directory: Path) -> None:
    """The run itself, in a process of its own."""
    import torch

    import idap
    from idap.quickstart import TrainingBatches, load_digits, load_network
    from idap.quickstart.train import accuracy

    torch.set_num_threads(1)
    digits = load_digits()
    original = load_network()

    def finetune(model: torch.nn.Module) -> None:
        idap.finetune(
            model,
            TrainingBatches(digits["train"]),
            epochs=1,
            lr=0.02,
            teacher=original,
            seed=int(torch.randint(2**31, ())),
        )

    idap.compress(
        original,
        digits["train"].inputs(128),
        evaluate=lambda model: accuracy(model, digits["validation"]),
        finetune=finetune,
        target={"macs": 0.4},
        budget=0.03,
        initial_ratio=0.15,
        directory=directory,
        resume=True,
        progress=False,
    )


def digest(directory: Path) -> str:
    """Of the weights and of every number of the history but times."""
    weights = hashlib.sha256((directory / "model" / "model.safetensors").read_bytes()).hexdigest()
    history = json.loads((directory / "result.json").read_text(encoding="utf-8"))["history"]
    numbers = [{key: value for key, value in step.items() if key != "seconds"} for step in history]
    return weights + hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()


def start(directory: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, __file__, "--work", str(directory)])


def killed_at(directory: Path, moments: list[float]) -> tuple[list[dict[str, Any]], float | None]:
    """Start a run, kill it and start it again at each moment; what was on disk, and the moment it ended before."""
    killed: list[dict[str, Any]] = []
    journal = directory / "journal.jsonl"
    for moment in moments:
        process = start(directory)
        try:
            if process.wait(moment):
                raise SystemExit(f"the run in {directory.name} failed by itself")
            return killed, moment
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        lines = journal.read_text().count("\n") if journal.exists() else 0
        killed.append({"after_s": round(moment, 2), "decisions_on_disk": lines})
    return killed, None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--kills", type=int, default=1, help="per run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="write the result to this file")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work is not None:
        work(args.work)
        return
    draw = random.Random(args.seed)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        if start(Path(folder) / "whole").wait():
            raise SystemExit("the run that nothing interrupts failed")
        seconds = time.perf_counter() - begin
        wanted = digest(Path(folder) / "whole")
        print(f"one run: {seconds:.1f} s")
        for number in range(args.runs):
            directory = Path(folder) / str(number)
            latest = seconds
            for _ in range(TRIES):
                shutil.rmtree(directory, ignore_errors=True)
                killed, late = killed_at(directory, [draw.uniform(0, latest) for _ in range(args.kills)])
                if late is None:
                    break
                latest = late
            else:
                raise SystemExit(f"run {number} ended before it could be killed, {TRIES} times")
            code = start(directory).wait()
            same = not code and digest(directory) == wanted
            rows.append({"killed": killed, "exit_code": code, "same": same})
            print(
                f"run {number}: killed {killed}, {'the same model' if same else 'ANOTHER MODEL'}", flush=True
            )
    same_runs = sum(row["same"] for row in rows)
    kills = sum(len(row["killed"]) for row in rows)
    print(f"{same_runs} of {len(rows)} runs ended at the same model, after {kills} kills")
    if args.json:
        write_json(
            args.json,
            {
                "environment": environment("cpu"),
                "seconds": seconds,
                "runs": len(rows),
                "kills": kills,
                "same": same_runs,
                "rows": rows,
            },
        )
    if same_runs != len(rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
