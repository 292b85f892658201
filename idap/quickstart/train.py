"""Train the embedded network and write its weights: ``python -m idap.quickstart.train``.

Reads the train part only; the validation part is looked at once at the end, as is the test part, for the
metadata. The result depends on seed, threads and torch version, as sums of floats do.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..training import EpochReport, finetune
from .data import Split, TrainingBatches, load_digits
from .network import WEIGHTS_FILE, DigitsResNet


def accuracy(model: torch.nn.Module, split: Split) -> float:
    """Share of the split that the model, run in eval mode, labels rightly; between 0 and 1."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            predicted = torch.cat([model(batch).argmax(dim=1) for batch in split.inputs(256)])
    finally:
        model.train(training)
    return (predicted == split.labels).double().mean().item()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=WEIGHTS_FILE)
    args = parser.parse_args(argv)

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    digits = load_digits()
    model = DigitsResNet()

    def show(report: EpochReport) -> None:
        print(f"epoch {report.epoch:3d}/{report.epochs}  loss {report.loss:.4f}", flush=True)

    finetune(
        model, TrainingBatches(digits["train"]), epochs=args.epochs, lr=args.lr, seed=args.seed, progress=show
    )
    model.eval()
    metadata = {f"{name}_accuracy": f"{accuracy(model, split):.4f}" for name, split in digits.items()}
    metadata |= {key: str(value) for key, value in vars(args).items() if key != "output"}
    metadata["torch"] = torch.__version__
    save_file(model.state_dict(), args.output, metadata=metadata)
    args.output.chmod(0o644)
    print(f"{args.output}: {metadata}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
