"""The demo's data: scikit-learn's handwritten digits, split once into train, golden and traffic. Nothing is downloaded."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

INPUT_NAME = "image"
"""Name of the one input tensor of every version: float32 [n, 1, 8, 8], grey levels from 0 (paper) to 1 (ink)."""

OUTPUT_NAME = "scores"
"""Name of the one output tensor of every version: float32 [n, 10], one score (logit) a digit."""

SPLIT_SEED = "modelkeep digits 1"
"""Orders the images (see `load_digits`); another seed is another split, and every figure of the demo moves a little."""

HEAVY_INK = 22.0
"""Images with at least this much ink (see `ink`) are heavy: 227 of 1,797, 12.6 %. No golden case is heavy, as if the
golden cases had been collected with thin pens; in training and in traffic they come as often as they come."""

GOLDEN_CASES = 300
TRAFFIC_IMAGES = 600


@dataclass(frozen=True, slots=True)
class Cases:
    """Labelled images: `images` float32 [n, 1, 8, 8] in 0 … 1, `labels` int64 [n]."""

    images: NDArray[np.float32]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def heavy(self) -> NDArray[np.bool_]:
        """Which of the images the golden cases have nothing like of."""
        return ink(self.images) >= HEAVY_INK

    def where(self, mask: NDArray[np.bool_]) -> Cases:
        return Cases(self.images[mask], self.labels[mask])


@dataclass(frozen=True, slots=True)
class Digits:
    """The one split: `train` to fit, `golden` to validate, `traffic` to send. No image is in two of them."""

    train: Cases
    golden: Cases
    traffic: Cases


def ink(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sum of the grey levels of each image, 0 … 64. Levels are sixteenths, so the sum is exact in float32, in any order."""
    return images.reshape(len(images), -1).sum(axis=1)


@cache
def load_digits() -> Digits:
    """The 1,797 images, ordered by a hash of seed and index (no library's random stream, so the split never moves):
    the first 300 that are not heavy are golden, the next 600 of the others are traffic, the rest is train."""
    from sklearn.datasets import load_digits as sklearn_digits

    bunch = sklearn_digits()
    images = np.ascontiguousarray(bunch.images[:, None, :, :] / 16.0, dtype=np.float32)
    everything = Cases(images, np.asarray(bunch.target, dtype=np.int64))
    order = sorted(range(len(everything)), key=lambda i: hashlib.sha256(f"{SPLIT_SEED}:{i}".encode()).digest())
    heavy = everything.heavy
    golden = [i for i in order if not heavy[i]][:GOLDEN_CASES]
    taken = set(golden)
    others = [i for i in order if i not in taken]

    def part(indices: list[int]) -> Cases:
        return Cases(everything.images[indices], everything.labels[indices])

    return Digits(train=part(others[TRAFFIC_IMAGES:]), golden=part(golden), traffic=part(others[:TRAFFIC_IMAGES]))


def write_golden(path: Path) -> Path:
    """Writes the golden cases as the validation reads them: arrays `input.image` and `label`."""
    golden = load_digits().golden
    _write(path, {f"input.{INPUT_NAME}": golden.images, "label": golden.labels})
    return path


def write_traffic(path: Path) -> Path:
    """Writes the traffic images for the client, which then needs no scikit-learn: arrays `image` and `label`."""
    traffic = load_digits().traffic
    _write(path, {"image": traffic.images, "label": traffic.labels})
    return path


def read_traffic(path: Path) -> Cases:
    """What `write_traffic` wrote. Raises ValueError where the arrays are not those."""
    with np.load(path, allow_pickle=False) as arrays:
        if not {"image", "label"} <= set(arrays.files):
            raise ValueError(f"{path} holds {', '.join(arrays.files) or 'no array'}; the client needs image and label")
        cases = Cases(arrays["image"].astype(np.float32), arrays["label"].astype(np.int64))
    if cases.images.shape[1:] != (1, 8, 8) or cases.labels.shape != (len(cases.images),) or not len(cases):
        raise ValueError(
            f"{path}: images {cases.images.shape}, labels {cases.labels.shape}; expected [n,1,8,8] and [n]"
        )
    return cases


def _write(path: Path, arrays: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:  # by handle: given a name, numpy would add .npz to it
        np.savez(file, **arrays)
