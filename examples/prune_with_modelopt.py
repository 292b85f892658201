"""FastNAS of NVIDIA ModelOpt, channels ranked by ModelOpt and by flow divergence. A trained network, real data."""

from __future__ import annotations

import contextlib
import io
import warnings

import modelopt.torch.prune as mtp

import idap
from idap.integrations.modelopt import prune
from idap.quickstart import load_digits, load_network
from idap.quickstart.train import accuracy

CHANNELS = {"*": {"channels_ratio": [0.5, 0.75, 1.0], "channel_divisor": 4, "kernel_size": []}}
FEATURES = {"*": {"features_ratio": [0.5, 0.75, 1.0], "feature_divisor": 4}}
MODE = [("fastnas", {"nn.Conv2d": CHANNELS, "nn.BatchNorm2d": FEATURES, "nn.Linear": FEATURES})]


def main() -> None:
    digits = load_digits()
    batches = list(digits["train"].inputs(128))
    dummy = batches[0][:1]
    score = lambda model: accuracy(model, digits["validation"])  # how many channels each layer keeps
    arguments = (MODE, {"flops": "60%"}, dummy, {"score_func": score, "verbose": False})

    network = load_network()
    print(f"as it is: {idap.count_macs(network, dummy):,} MACs, {accuracy(network, digits['test']):.2%}")
    for ranked_by in ("ModelOpt", "flow divergence"):
        network = load_network()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            if ranked_by == "ModelOpt":
                mtp.prune(network, *arguments)
            else:
                prune(network, *arguments, batches=batches)
        idap.recalibrate(network, batches)  # the batch norms, for the widths that were chosen
        macs, correct = idap.count_macs(network, dummy), accuracy(network, digits["test"])
        print(f"channels ranked by {ranked_by}: {macs:,} MACs, {correct:.2%} without training")


if __name__ == "__main__":
    main()
