"""The split of the digits: three parts that share nothing, and a property that the golden cases do not have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from modelkeep.demo import data

GOLDEN_LABELS = [9, 3, 6, 0, 2, 5, 2, 3, 5, 3, 6, 7]
TRAFFIC_LABELS = [8, 2, 0, 8, 1, 9, 0, 9, 9, 8, 7, 8]


def test_every_image_is_in_exactly_one_part() -> None:
    digits = data.load_digits()
    assert (len(digits.train), len(digits.golden), len(digits.traffic)) == (897, 300, 600)
    everything = np.concatenate([digits.train.images, digits.golden.images, digits.traffic.images])
    assert len(np.unique(everything.reshape(len(everything), -1), axis=0)) == 1797


def test_the_split_is_the_same_on_every_machine() -> None:
    digits = data.load_digits()
    assert digits.golden.labels[:12].tolist() == GOLDEN_LABELS
    assert digits.traffic.labels[:12].tolist() == TRAFFIC_LABELS


def test_no_golden_case_is_heavy_and_about_a_fifth_of_the_traffic_is() -> None:
    digits = data.load_digits()
    assert not digits.golden.heavy.any()
    assert digits.golden.images.reshape(300, -1).sum(axis=1).max() < data.HEAVY_INK
    assert digits.traffic.heavy.sum() == 121
    assert digits.train.heavy.sum() == 106


def test_every_digit_is_among_the_golden_cases_often_enough_to_count() -> None:
    assert np.bincount(data.load_digits().golden.labels, minlength=10).min() >= 15


def test_the_golden_file_is_what_the_validation_reads(tmp_path: Path) -> None:
    with np.load(data.write_golden(tmp_path / "deep" / "golden.npz"), allow_pickle=False) as arrays:
        assert set(arrays.files) == {"input.image", "label"}
        assert arrays["input.image"].shape == (300, 1, 8, 8)
        assert arrays["input.image"].dtype == np.float32
        assert arrays["label"].dtype == np.int64


def test_the_traffic_file_reads_back_as_it_was(tmp_path: Path) -> None:
    cases = data.read_traffic(data.write_traffic(tmp_path / "traffic.npz"))
    assert np.array_equal(cases.images, data.load_digits().traffic.images)
    assert np.array_equal(cases.labels, data.load_digits().traffic.labels)


def test_a_file_that_is_not_traffic_is_refused_by_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"input\.image, label; the client needs image and label"):
        data.read_traffic(data.write_golden(tmp_path / "golden.npz"))


def test_images_of_another_shape_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "flat.npz", image=np.zeros((3, 64), np.float32), label=np.zeros(3, np.int64))
    with pytest.raises(ValueError, match=r"\(3, 64\)"):
        data.read_traffic(tmp_path / "flat.npz")
