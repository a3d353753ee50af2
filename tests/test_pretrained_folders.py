"""A save replaces a checkpoint in one step, wherever it is interrupted."""

import itertools
import json
import os

import numpy as np
import pytest
from flax import nnx

from attention_jax import models, nn
from attention_jax.models import pretrained
from attention_jax.models.pretrained import folders, tensor_files

STEPS = "replace", "link", "remove", "fsync", "open"


class KilledError(BaseException):
    """Stands for the end of the process."""


def killed(*_):
    raise KilledError


def killed_at(patch, k, after):
    """Makes the k-th file operation fail, before it is done or right after."""
    count = itertools.count()

    def dying(step):
        def call(*args, **options):
            here = next(count) == k
            if here and not after:
                raise KilledError
            result = step(*args, **options)
            if here:
                raise KilledError
            return result

        return call

    for name in STEPS:
        patch.setattr(os, name, dying(getattr(os, name)))


def write(path, value):
    arrays = {"x": np.full(3, value, np.float32)}
    tensor_files.write(path, arrays, arrays.values())


def save(folder, version):
    folders.replace(folder, {"version": version}, lambda path: write(path, version))


def versions(folder):
    """Of the configuration, and of the weights that are read with it."""
    described = folders.read_config(folder)
    (file,) = folders.weights(folder, described)
    return described["version"], int(file["x"][0])


def nothing(folder):
    folder.mkdir()


def one_file(folder):
    save(folder, 1)


def shards(folder):
    nothing(folder)
    write(folder / "model-00001-of-00001.safetensors", 1)
    index = {"weight_map": {"x": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"version": 1}')


def killed_before(folder):
    """The weights do not have their usual name yet: those of an older save do."""
    save(folder, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "link", killed)
        with pytest.raises(KilledError):
            save(folder, 1)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("before", [nothing, one_file, shards, killed_before])
def test_a_killed_save_leaves_the_old_or_the_new_model(before, after, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # which takes most of the time
    outcomes = set()
    for k in itertools.count():
        folder = tmp_path / str(k)
        before(folder)
        (folder / "tokenizer.json").write_text("{}")
        with pytest.MonkeyPatch.context() as patch:
            killed_at(patch, k, after)
            try:
                save(folder, 2)
                done = True
            except KilledError:
                done = False
        try:
            found = versions(folder)
        except FileNotFoundError:
            assert before is nothing
            found = "nothing"
        assert found in ("nothing", (1, 1), (2, 2))
        outcomes.add(found)
        save(folder, 3)  # removes what was left
        assert versions(folder) == (3, 3)
        names = {"config.json", "model.safetensors", "tokenizer.json"}
        assert {path.name for path in folder.iterdir()} == names
        if done:
            break
    assert k > 10
    assert outcomes == {"nothing" if before is nothing else (1, 1), (2, 2)}


def test_a_save_that_fails_before_the_switch_leaves_nothing_behind(tmp_path):
    save(tmp_path, 1)

    def full(path):
        path.write_bytes(b"some")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="disk is full"):
        folders.replace(tmp_path, {"version": 2}, full)
    assert versions(tmp_path) == (1, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_a_file_system_without_links(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refused)
    save(tmp_path, 1)
    save(tmp_path, 2)
    assert versions(tmp_path) == (2, 2)
    assert len(list(tmp_path.iterdir())) == 2


def test_other_files_are_not_removed(tmp_path):
    """An index can name anything."""
    folder = tmp_path / "folder"
    nothing(folder)
    write(tmp_path / "x.safetensors", 1)
    (folder / "notes.txt").write_text("mine")
    index = {"weight_map": {"a": "../x.safetensors", "b": "notes.txt", "c": "gone.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save(folder, 2)
    assert (tmp_path / "x.safetensors").exists()
    names = {"config.json", "model.safetensors", "notes.txt"}
    assert {path.name for path in folder.iterdir()} == names


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "", 3])
def test_named_weights_must_be_in_the_folder(name, tmp_path):
    with pytest.raises(ValueError, match="files of its own folder"):
        folders.weights(tmp_path, {"transformers_weights": name})


def test_missing_shards_are_named(tmp_path):
    index = {"weight_map": {"a": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match="must have model-00002-of-00002"):
        folders.weights(tmp_path, {})


# --- Models.

LAYERS = models.Layers(
    features=8, num_layers=1, num_heads=2, hidden=12, fused=True, activation="gelu_tanh"
)
CONFIG = models.DecoderConfig(11, LAYERS, positions="learned", max_length=6)


def decoder(seed=0):
    return models.Decoder(CONFIG, rngs=nnx.Rngs(seed))


def table(model):
    return np.asarray(model.embed.tokens[...])


def test_a_save_replaces_shards(tmp_path):
    pretrained.save(decoder(0), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    names = tensor_files.File(tmp_path / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    np.testing.assert_array_equal(table(pretrained.load(tmp_path)), table(decoder(0)))
    pretrained.save(decoder(1), tmp_path)
    np.testing.assert_array_equal(table(pretrained.load(tmp_path)), table(decoder(1)))
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_a_save_killed_after_the_switch_leaves_the_new_model(tmp_path, monkeypatch):
    pretrained.save(decoder(0), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", killed)
        with pytest.raises(KilledError):
            pretrained.save(decoder(1), tmp_path)
    np.testing.assert_array_equal(table(pretrained.load(tmp_path)), table(decoder(1)))


def extended(model):
    model.extra = nnx.Param(np.ones(3, np.float32))
    return model


def enlarged(model):
    model.embed.tokens = nnx.Param(np.ones((12, 8), np.float32))
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: nn.low_rank(model, rank=1, rngs=nnx.Rngs(0)), r"save nn\.merged"),
        (lambda model: nn.embeddings.moved_embeddings(model, lambda x: x + 1), "moved embeddings"),
        (extended, r"extra: \(3,\), expected none"),
        (enlarged, r"embed\.tokens: \(12, 8\), expected \(11, 8\)"),
    ],
)
def test_a_model_that_does_not_match_its_config_is_not_saved(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        pretrained.save(change(decoder()), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_merged_model_is_saved(tmp_path):
    adapted = nn.low_rank(decoder(), rank=1, rngs=nnx.Rngs(0))
    pretrained.save(nn.merged(adapted), tmp_path)
    np.testing.assert_array_equal(table(pretrained.load(tmp_path)), table(decoder()))


def test_config_entries_given_to_save(tmp_path):
    pretrained.save(decoder(), tmp_path, config={"eos_token_id": 7})
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == 7
    for entries in ({"n_head": 4}, {"something_new": 1}, {"transformers_weights": "x"}):
        with pytest.raises(ValueError, match="config"):
            pretrained.save(decoder(), tmp_path, config=entries)


def test_objects_other_than_models_are_not_saved(tmp_path):
    with pytest.raises(TypeError, match=r"must be one of attention_jax.models, got Linear"):
        pretrained.save(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), tmp_path)
    arrays = {"x": np.ones(2, np.complex64)}
    with pytest.raises(ValueError, match="x has dtype complex64"):
        tensor_files.write(tmp_path / "x", arrays, arrays.values())
