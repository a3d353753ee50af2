"""The benchmark of fine-tuning: both contenders train the same model on the same batches."""

import dataclasses

import numpy as np
import pytest
import tiny_bert
from flax import nnx

from experiments.bench import finetuning
from experiments.bench.finetuning import MINILM, FineTuning
from experiments.datasets.text import PAD
from experiments.models import finetuning as models
from experiments.tasks import load

WORK = FineTuning(B=4, steps=2)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A checkpoint of two narrow layers, and tokens of its vocabulary."""
    monkeypatch.setattr(finetuning, "FIRST", 7)
    monkeypatch.setattr(finetuning, "LAST", len(tiny_bert.TOKENS))
    return tiny_bert.write(tmp_path)


def test_batches_are_of_similar_length_and_have_little_padding():
    batches = FineTuning(steps=40).batches()
    lengths = {batch.words.shape[1] for batch in batches}
    assert {batch.words.shape[0] for batch in batches} == {32}
    assert len(lengths) > 3
    real = np.concatenate([(batch.words != PAD).ravel() for batch in batches])
    assert 0.85 < real.mean() < 0.97


def test_random_weights_have_the_shape_of_the_published_ones(monkeypatch):
    def missing():
        raise ModuleNotFoundError("the package is not installed")

    monkeypatch.setattr(finetuning.pretrained, "minilm", missing)
    small = dataclasses.replace(
        MINILM, vocabulary=11, layers=dataclasses.replace(MINILM.layers, num_layers=1)
    )
    with finetuning.checkpoint(small) as folder:
        read = finetuning.pretrained.load(folder)
        assert read.config.layers.num_heads == 12
        assert read.config.layers.norm_epsilon == 1e-12
        assert read.embed.tokens.shape == (11, 384)
    assert not folder.exists()


@pytest.mark.slow
@pytest.mark.parametrize("freeze", [False, True])
def test_our_steps_change_what_is_trained(tiny, freeze):
    run = finetuning.ours(dataclasses.replace(WORK, steps=1, freeze=freeze), tiny)
    losses = [run() for _ in range(4)]  # of one batch
    assert all(np.isfinite(losses))
    assert losses[0] == losses[1]  # the rate starts at 0
    assert len(set(losses[1:])) == 3


@pytest.mark.parametrize("freeze", [False, True])
def test_both_compute_the_same_logits_and_train_the_same_weights(tiny, freeze):
    pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    work = dataclasses.replace(WORK, freeze=freeze)
    theirs = finetuning.torch_classifier(work, tiny)
    rate = finetuning.DROPOUT
    dropouts = [x for x in theirs.modules() if isinstance(x, torch.nn.Dropout)]
    assert {x.p for x in dropouts} == {rate, 0.0}  # that of the attention weights is 0
    config = load("trec").configured("cpu", model="pretrained", checkpoint=str(tiny), dropout=rate)
    labels = [str(i) for i in range(work.classes)]
    ours = models.build(config, labels, (), dropout_rate=rate, rngs=nnx.Rngs(0))
    ours.model.classify.kernel[...] = theirs.classify.weight.detach().numpy().T
    ours.model.classify.bias[...] = theirs.classify.bias.detach().numpy()
    ours.eval()
    theirs.eval()
    for words, _ in work.batches():
        expected = theirs(torch.tensor(words, dtype=torch.long)).detach().numpy()
        np.testing.assert_allclose(ours(words), expected, rtol=1e-4, atol=1e-5)
    trained = sum(x.numel() for x in theirs.parameters() if x.requires_grad)
    table = theirs.encoder.embeddings
    frozen = sum(x.numel() for x in table.parameters()) if freeze else 0
    assert trained == sum(x.numel() for x in theirs.parameters()) - frozen
    assert np.isfinite(finetuning.transformers(work, tiny)())
