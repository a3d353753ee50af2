"""Fine-tuning the published encoder of 22 million parameters, with ours and with transformers.

Both train the same classifier, the mean of the encoder's outputs, dropout and a linear layer, from
the same weights, on the same padded batches, with AdamW on clipped gradients. The speed depends on
neither the values of the weights nor the labels: without the package that has the weights, random
ones of the same shapes are used.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np
from flax import nnx

from attention_jax.models import Encoder, EncoderConfig, Layers, pretrained
from experiments.datasets import text
from experiments.models import finetuning
from experiments.tasks import load
from experiments.tasks.classification import Batch
from experiments.training import tuning
from experiments.training.steps import trainer

RATE, CLIP, DROPOUT = 2e-5, 1.0, 0.1
FIRST, LAST = 1000, 30_000  # tokens that are words of the vocabulary

MINILM = EncoderConfig(
    30_522,
    Layers(
        features=384,
        num_layers=6,
        num_heads=12,
        hidden=1536,
        activation="gelu",
        norm_epsilon=1e-12,
        order="post",
    ),
    max_length=512,
    types=2,
    embedding_norm=True,
    pooler=True,
)


@dataclasses.dataclass(frozen=True)
class FineTuning:
    """Steps of fine-tuning on sentences as long as those of film reviews."""

    B: int = 32
    """Sentences in a batch."""
    steps: int = 4
    """Batches, from all lengths."""
    classes: int = 6
    freeze: bool = False
    """Whether the embeddings are not trained, as in the model ``pretrained`` of our tasks."""

    def __str__(self) -> str:
        trained = "frozen embeddings" if self.freeze else "all weights"
        return f"fine-tuning MiniLM (22M), {trained}, {self.steps} batches of {self.B} sentences"

    def note(self, seconds: float) -> str:
        """The speed, from the time of all batches."""
        real = np.concatenate([(batch.words != text.PAD).ravel() for batch in self.batches()])
        padding = 100 * (1 - real.mean())
        return f"{real.sum() / seconds:,.0f} tokens/s, and {padding:.0f} % padding"

    def batches(self) -> list[Batch]:
        """Random tokens, in batches of similar length."""
        rng = np.random.default_rng(0)
        lengths = np.clip(rng.lognormal(np.log(22), 0.45, 2048), 5, 64).astype(int)
        order = text.bucketed(lengths, self.B, 0, 0, finetuning.sizes(lengths))
        found = []
        for index, length in itertools.islice(order, self.steps):
            rows = [rng.integers(FIRST, LAST, n).tolist() for n in lengths[index]]
            labels = rng.integers(0, self.classes, self.B).astype(np.int32)
            found.append(Batch(text.padded(rows, length), labels))
        return found


@contextmanager
def checkpoint(config: EncoderConfig = MINILM) -> Iterator[Path]:
    """The folder of the published weights, or of random ones if their package is not installed."""
    try:
        folder = pretrained.minilm()
    except ModuleNotFoundError:
        with TemporaryDirectory() as temporary:
            folder = Path(temporary)
            pretrained.save(Encoder(config, rngs=nnx.Rngs(0)), folder)
            yield folder
        return
    yield folder


def ours(work: FineTuning, folder: Path) -> Callable[[], Any]:
    """Steps of our training loop; returns the last loss."""
    task = load("trec")
    config = task.configured(
        "cpu",
        model="pretrained",
        checkpoint=str(folder),
        batch_size=work.B,
        learning_rate=RATE,
        clip=CLIP,
        layer_decay=1.0,
        freeze=0 if work.freeze else None,
        dropout=DROPOUT,
        feature_dropout=DROPOUT,
    )
    labels = [str(i) for i in range(work.classes)]
    model = finetuning.build(config, labels, (), dropout_rate=DROPOUT, rngs=nnx.Rngs(0))
    training = trainer(task.loss, config, tuning.prepared(model, config))
    batches, state = work.batches(), training.put(training.initial)

    def run() -> Any:
        nonlocal state
        for step, batch in enumerate(batches):
            state, loss, *_ = training.update(state, batch, step)
        return float(jax.block_until_ready((loss, state))[0])

    return run


def transformers(work: FineTuning, folder: Path) -> Callable[[], Any]:
    """The same steps with torch and Hugging Face's encoder; returns the last loss."""
    import torch

    model = torch_classifier(work, folder)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    batches = [
        (torch.tensor(x, dtype=torch.long), torch.tensor(y, dtype=torch.long))
        for x, y in work.batches()
    ]

    def run() -> Any:
        for tokens, labels in batches:
            optimizer.zero_grad(set_to_none=True)
            loss = torch.nn.functional.cross_entropy(model(tokens), labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, CLIP)
            optimizer.step()
        return loss.item()

    return run


def torch_classifier(work: FineTuning, folder: Path) -> Any:
    """Hugging Face's encoder with dropout where ours has it, and our head."""
    import torch
    from transformers import BertModel, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)

    class Classifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = BertModel.from_pretrained(
                folder,
                add_pooling_layer=False,
                hidden_dropout_prob=DROPOUT,
                attention_probs_dropout_prob=0.0,
            )
            self.dropout = torch.nn.Dropout(DROPOUT)
            self.classify = torch.nn.Linear(self.encoder.config.hidden_size, work.classes)

        def forward(self, tokens: Any) -> Any:
            real = tokens != text.PAD
            x = self.encoder(tokens, attention_mask=real).last_hidden_state
            weights = real[..., None] / real.sum(1)[:, None, None]
            return self.classify(self.dropout((x * weights).sum(1)))

    model = Classifier().train()
    model.encoder.embeddings.requires_grad_(not work.freeze)
    return model
