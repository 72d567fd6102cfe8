"""Handwritten digits for the examples: MNIST, or scikit-learn's bundled 8x8 digits."""

import gzip
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

MNIST_FILES = {
    "train_x": "train-images-idx3-ubyte",
    "train_y": "train-labels-idx1-ubyte",
    "test_x": "t10k-images-idx3-ubyte",
    "test_y": "t10k-labels-idx1-ubyte",
}


class DataError(Exception):
    """Data that are missing or malformed, in one line."""


@dataclass(frozen=True)
class Digits:
    """Images (count, pixels) in [0, 1], float32, and labels (count,), int64."""

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load(folder: str | Path | None) -> Digits:
    """MNIST from `folder` or its subfolder `mnist`, or without a folder the 8x8 digits.

    Raises:
        DataError: the folder lacks one of MNIST_FILES (plain or .gz), or one is malformed.
    """
    return _bundled() if folder is None else _mnist(Path(folder))


def _bundled() -> Digits:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    split = train_test_split(images, labels, test_size=360, stratify=labels, random_state=0)
    train_x, test_x, train_y, test_y = map(torch.from_numpy, split)
    return Digits("scikit-learn digits", train_x, train_y.long(), test_x, test_y.long())


def _mnist(folder: Path) -> Digits:
    arrays = {part: read_idx(_find(folder, name)) for part, name in MNIST_FILES.items()}
    for split in ("train", "test"):
        images, labels = arrays[f"{split}_x"], arrays[f"{split}_y"]
        if images.ndim != 3 or labels.ndim != 1 or not 0 < len(images) == len(labels):
            raise DataError(
                f"{MNIST_FILES[split + '_x']}: expected images (count, height, width) and as many "
                f"labels, got shapes {images.shape} and {labels.shape}"
            )
        if labels.max() > 9:
            raise DataError(f"{MNIST_FILES[split + '_y']}: labels must be 0 to 9")
    if arrays["train_x"].shape[1:] != arrays["test_x"].shape[1:]:
        raise DataError("training and test images differ in size")

    tensors = {part: torch.from_numpy(array.copy()) for part, array in arrays.items()}
    images = {p: t.flatten(1).float() / 255 for p, t in tensors.items() if p.endswith("_x")}
    labels = {p: t.long() for p, t in tensors.items() if p.endswith("_y")}
    return Digits("MNIST", **images, **labels)


def _find(folder: Path, name: str) -> Path:
    for path in (
        base / file for base in (folder, folder / "mnist") for file in (name, name + ".gz")
    ):
        if path.is_file():
            return path
    raise DataError(
        f"no {name}[.gz] in {folder} or {folder / 'mnist'}; "
        f"expected {', '.join(MNIST_FILES.values())}, plain or gzipped"
    )


def read_idx(path: Path) -> np.ndarray:
    """Reads an idx file of unsigned bytes, plain or gzipped.

    The header is two zero bytes, the type (8: unsigned byte), the number of dimensions and each
    of them as a big-endian 32-bit integer.

    Raises:
        DataError: the file is not such a file, or its length is not what the header says.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise DataError(f"{path}: not an idx file of unsigned bytes")
    dimensions, start = content[3], 4 + 4 * content[3]
    if len(content) < start:
        raise DataError(f"{path}: the idx header is cut short")
    shape = struct.unpack(f">{dimensions}I", content[4:start])
    found = len(content) - start
    if found != math.prod(shape):
        raise DataError(f"{path}: the header says {shape} bytes, but {found} follow it")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)
