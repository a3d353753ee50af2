"""Image classification: data, models, and the attention figure."""

import dataclasses

import numpy as np
import pytest
from flax import nnx

from experiments.models.inference import record_weights
from experiments.tasks import (
    digits,
    fashion,
    images,
)


@pytest.fixture(scope="module")
def digit_data():
    return digits.read()


def test_splits_are_disjoint_stratified_and_fixed(digit_data):
    assert {name: len(split.labels) for name, split in digit_data.items()} == {
        "train": 1257,
        "validation": 180,
        "test": 360,
    }
    for split in digit_data.values():
        assert split.images.dtype == np.float32
        assert split.images.min() == 0
        assert split.images.max() == 1
        share = np.bincount(split.labels, minlength=10) / len(split.labels)
        np.testing.assert_allclose(share, 0.1, atol=0.01)
    union = np.concatenate([split.images for split in digit_data.values()])
    assert len(np.unique(union, axis=0)) == 1797  # no image twice
    np.testing.assert_array_equal(digits.read()["test"].images, digit_data["test"].images)


def test_shifted_moves_images_by_whole_pixels():
    rng = np.random.default_rng(0)
    before = rng.uniform(size=(50, 8, 8)).astype(np.float32)
    np.testing.assert_array_equal(images.shifted(before, np.zeros((50, 2), int)), before)
    shifts, random = set(), rng.integers(-1, 2, (50, 2))
    for image, after in zip(before, images.shifted(before, random), strict=True):
        padded = np.pad(image, 1)
        windows = {(i, j): padded[i : i + 8, j : j + 8] for i in range(3) for j in range(3)}
        matches = [shift for shift, w in windows.items() if np.array_equal(w, after)]
        assert len(matches) == 1
        shifts.update(matches)
    assert len(shifts) == 9


def test_image_batches_are_resumable_from_any_step(digit_data):
    config = digits.PRESETS["cpu"]
    whole, part = images.batches(config, digit_data, 0), images.batches(config, digit_data, 2)
    first, _, third = next(whole), next(whole), next(whole)
    np.testing.assert_array_equal(third.images, next(part).images)
    assert first.images.shape == (64, 8, 8)


@pytest.mark.slow
def test_class_token_attention_is_that_of_the_last_layer(digit_data):
    config = dataclasses.replace(digits.PRESETS["smoke"], width=16, heads=2, depth=2)
    model = images.init(config, digit_data, nnx.Rngs(0))
    model.eval()
    batch = digit_data["test"].images[:5]
    weights = images.class_token_attention(model, batch)
    assert weights.shape == (5, 2, 17)
    np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-6)
    _, recorded = record_weights(model, batch)
    np.testing.assert_array_equal(
        weights, recorded["transformer.stack.blocks.1.attention.sublayer"][:, :, 0]
    )


@pytest.mark.slow
def test_the_attention_figure_is_not_blank(digit_data, tmp_path):
    from matplotlib.image import imread

    config = digits.PRESETS["smoke"]
    model = images.init(config, digit_data, nnx.Rngs(0))
    (file,) = images.pictures(tuple("0123456789"), config, model, digit_data, tmp_path)
    pixels = imread(file)
    assert min(pixels.shape[:2]) > 300
    assert len(np.unique(pixels[..., :3].reshape(-1, 3), axis=0)) > 50


@pytest.mark.slow
def test_look_shows_any_test_image(digit_data):
    config = digits.PRESETS["smoke"]
    model = images.init(config, digit_data, nnx.Rngs(0))
    model.eval()
    (view,) = digits.TASK.look(config, model, digit_data, "7")
    patches = (8 // config.patch) ** 2
    assert list(view.queries[:3]) == ["class", "0,0", "0,1"]
    assert view.weights.shape == (config.depth, config.heads, 1 + patches, 1 + patches)
    assert view.note.startswith(f"Test image 7: {digit_data['test'].labels[7]}, predicted ")
    for wrong in ("360", "-1", "a cat"):
        with pytest.raises(ValueError, match="must be the index of a test image, 0 to 359"):
            digits.TASK.look(config, model, digit_data, wrong)
    with pytest.raises(ValueError, match="model cnn has no attention"):
        digits.TASK.look(dataclasses.replace(config, model="cnn"), None, digit_data, None)


def test_reads_idx_files(tmp_path, monkeypatch):
    import gzip

    raw = bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3]) + bytes(range(6))
    (tmp_path / "x.gz").write_bytes(gzip.compress(raw))
    monkeypatch.setattr(fashion, "path", lambda name: tmp_path / name)
    assert fashion.idx("x.gz").tolist() == [[0, 1, 2], [3, 4, 5]]
    (tmp_path / "y.gz").write_bytes(gzip.compress(b"text"))
    with pytest.raises(ValueError, match=r"y\.gz must be an IDX file"):
        fashion.idx("y.gz")
