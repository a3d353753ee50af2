"""Checkpoints by their name on the Hugging Face hub, read from a cache laid out as the hub's."""

import shutil
import sys

import numpy as np
import pytest
import tiny_bert
from flax import nnx

from attention_jax import models
from attention_jax.models import pretrained

constants = pytest.importorskip("huggingface_hub.constants")

NAME, COMMIT, OLD = "org/tiny-bert", "1" * 40, "2" * 40
TOKENS = np.array([[3, 1, 4]])


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A cache with two revisions of a checkpoint, as the hub's: blobs, links to them, and refs."""
    root = tmp_path_factory.mktemp("hub")
    repository = root / "cache" / "models--org--tiny-bert"
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    for commit, ref in ((COMMIT, "main"), (OLD, "v1")):
        (repository / "refs" / ref).write_text(commit)
        written = tiny_bert.write(root / commit)
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for file in written.iterdir():
            blob = repository / "blobs" / f"{ref}-{file.name}"
            shutil.copy(file, blob)
            (snapshot / file.name).symlink_to(blob)
    other = models.EncoderConfig(
        9,
        models.Layers(features=4, num_layers=1, num_heads=1, order="post"),
        embedding_norm=True,
        types=2,
    )
    pretrained.save(models.Encoder(other, rngs=nnx.Rngs(1)), root / OLD)
    for file in ("config.json", "model.safetensors"):
        shutil.copy(root / OLD / file, repository / "blobs" / f"v1-{file}")
    return root


@pytest.fixture
def offline(stored, monkeypatch, tmp_path):
    """Reads that cache only; runs in an empty folder."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(stored / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return stored


def test_a_name_is_looked_up_in_the_cache(offline):
    found, same = (pretrained.load(x) for x in (NAME, offline / COMMIT))
    np.testing.assert_array_equal(found(TOKENS), same(TOKENS))
    tokenizer = pretrained.load_tokenizer(NAME)
    assert tokenizer.vocabulary == len(tiny_bert.TOKENS)


@pytest.mark.parametrize("revision", ["v1", OLD])
def test_a_revision_is_a_tag_or_a_commit(offline, revision):
    assert pretrained.load(NAME, revision=revision).config.layers.features == 4


def test_an_existing_folder_comes_first(offline):
    """Two levels of folders look like a name."""
    shutil.copytree(offline / OLD, "org/tiny-bert")
    assert pretrained.load(NAME).config.layers.features == 4
    with pytest.raises(ValueError, match=r"revision is that of a repository .* folder 'org/tiny"):
        pretrained.load(NAME, revision="v1")


@pytest.mark.parametrize("load", [pretrained.load, pretrained.load_tokenizer])
@pytest.mark.parametrize(
    ("name", "revision"), [("org/other", None), (NAME, "v2"), ("org/a..b", None)]
)
def test_what_the_cache_does_not_have_raises(offline, load, name, revision):
    at = "" if revision is None else f" at revision {revision!r}"
    message = rf"^there is no folder {name!r}, and the hub .* of that name{at}: [^\n]*$"
    with pytest.raises(FileNotFoundError, match=message):
        load(name, revision=revision)


def test_sentence_embeddings_need_their_description(offline):
    with pytest.raises(FileNotFoundError, match=r"must have modules\.json"):
        pretrained.load_embedder(NAME)


def test_a_package_that_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    message = r"no folder 'org/name', and the package huggingface_hub, .*: pip install -e '\.\[pre"
    with pytest.raises(ModuleNotFoundError, match=message):
        pretrained.load("org/name")
