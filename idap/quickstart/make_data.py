"""Make ``digits.safetensors`` from scikit-learn's copy of the UCI digits.

Run as ``python -m idap.quickstart.make_data``. Only this script needs scikit-learn.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

SEED = 20251120
FRACTIONS = (0.62, 0.16, 0.22)  # train, validation, test


def stratified_split(labels: np.ndarray, fractions: tuple[float, float, float], seed: int) -> np.ndarray:
    """Return 0 (train), 1 (validation) or 2 (test) per label, with the same shares in every class."""
    rng = np.random.default_rng(seed)
    split = np.zeros(len(labels), dtype=np.uint8)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        first = round(fractions[0] * len(members))
        second = first + round(fractions[1] * len(members))
        split[members[first:second]] = 1
        split[members[second:]] = 2
    return split


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Write the digits as safetensors, duplicates dropped, split once."
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("digits.safetensors"))
    args = parser.parse_args(argv)

    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    digits = load_digits()
    images = digits.images.astype(np.uint8)
    if not np.array_equal(images, digits.images):
        raise SystemExit("the images do not fit uint8")
    _, first = np.unique(images.reshape(len(images), -1), axis=0, return_index=True)
    keep = np.sort(first)
    images, labels = images[keep], digits.target[keep].astype(np.uint8)
    split = stratified_split(labels, FRACTIONS, SEED)
    metadata = {
        "source": "Optical Recognition of Handwritten Digits, Alpaydin and Kaynak, UCI, doi:10.24432/C50P49",
        "licence": "CC BY 4.0",
        "duplicates_dropped": str(len(digits.images) - len(images)),
        "split_seed": str(SEED),
    }
    save_file({"images": images, "labels": labels, "split": split}, args.output, metadata=metadata)
    print(f"{args.output}: {len(images)} images, split {np.bincount(split).tolist()}, {metadata}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
