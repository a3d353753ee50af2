"""Which facts a graph of facts lacks: who stands in this relation to that?

::

    python -m experiments train links                             # attention over (head, relation)
    python -m experiments train links --model distmult
    python -m experiments train links --graph wn18rr

A fact is (head, relation, tail). Given head and relation, all entities are scored as the tail;
given relation and tail as the head, by a relation of its own for that direction. A score is a
product of the entity's vector with one made of what is given: in ``distmult`` the product of the
two vectors, in ``attention`` what a Transformer encoder makes of the two tokens. Both are trained
by cross-entropy over all entities.

Data: FB15k-237, K. Toutanova and D. Chen 2015, 272,115 facts to train, 17,535 to validate, 20,466
to test, of 14,541 entities and 237 relations; and WN18RR, T. Dettmers et al. 2018, 86,835, 3,034
and 3,134, of 40,943 and 11; as distributed by Dettmers, MIT. The score is the filtered mean
reciprocal rank (entities that are right by another fact of any split do not count; of equal scores
half come before), and how many ranks are at most 1, 3 and 10. Published for DistMult on FB15k-237:
0.24, on WN18RR 0.43 (Dettmers et al. 2018).

The records of ``attention`` on FB15k-237 are with ``--steps 2000``, those on WN18RR, whose three
times as many entities are all scored at every step, with ``--steps 1500``.
"""

from __future__ import annotations

import collections
import dataclasses
import tarfile
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attention_jax.models import Layers
from attention_jax.models.layers import Stack
from attention_jax.nn import record_weights
from experiments.datasets import text
from experiments.datasets.files import path
from experiments.training import text_config
from experiments.training.config import TrainConfig, at_least_1, below_1, heads_divide, softmax_only
from experiments.training.losses import cross_entropy, logits
from experiments.training.task import AttentionView, Loss, Metrics, Task, self_attention

ARCHIVES = {"fb15k237": "kg/FB15k-237.tar.gz", "wn18rr": "kg/WN18RR.tar.gz"}
SPLITS = {"train": "train.txt", "validation": "valid.txt", "test": "test.txt"}
RANKS = (1, 3, 10)


@dataclasses.dataclass(frozen=True)
class Config(TrainConfig):
    """The options of who completes a graph."""

    model: Literal["distmult", "attention"] = "attention"
    """The rung of the ladder."""
    graph: Literal["fb15k237", "wn18rr"] = "fb15k237"
    """Of facts about people and places, or of words."""
    width: int = 128
    """Numbers per entity and relation (E)."""
    heads: int = 4
    """Of attention: heads (N); divides the width."""
    depth: int = 2
    """Of attention: layers."""
    dropout: float = 0.2
    """Of the vectors that are given, of what sublayers give, and of what scores."""
    scored: int = 1000
    """Facts of a split that are scored while training; all at the end, of the test split."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_1(self, "width", "heads", "depth", "scored")
        heads_divide(self, "width")
        below_1(self, "dropout")
        softmax_only(self)


PRESETS = {
    "cpu": Config(
        steps=3500,
        batch_size=256,
        learning_rate=5e-3,
        label_smoothing=0.1,
        weight_decay=0.0,
        evaluations=3,
        minutes=10,
    ),
    "smoke": Config(
        steps=4, batch_size=16, evaluations=1, width=16, heads=2, depth=1, synthetic=True
    ),
    "accelerator": Config(
        steps=30_000,
        batch_size=1024,
        learning_rate=2e-3,
        label_smoothing=0.1,
        weight_decay=0.0,
        width=256,
        heads=8,
        depth=3,
        dropout=0.3,
        evaluations=10,
        dtype="bfloat16",
    ),
}


class Data(NamedTuple):
    """Facts as numbers; a relation ``r`` turned around is ``r + len(relations)``."""

    entities: tuple[str, ...]
    relations: tuple[str, ...]
    splits: dict[str, np.ndarray]
    """``[n 3]``: head, relation, tail, as the files have them."""
    known: dict[tuple[int, int], np.ndarray]
    """All tails of any split, by head and relation, in both directions."""


class Batch(NamedTuple):
    """What is given, ``[B 2]``: head and relation; and the tails ``[B]``."""

    given: Any
    tails: Any


# --- Data.


def read(config: Config) -> dict[str, list[list[str]]]:
    """The facts of each split, as words."""
    if config.synthetic:
        return made_up()
    found = {}
    with tarfile.open(path(ARCHIVES[config.graph])) as archive:
        members = {member.name.rpartition("/")[2]: member for member in archive.getmembers()}
        for split, name in SPLITS.items():
            file: Any = archive.extractfile(members[name])
            rows = [line.split("\t") for line in file.read().decode().splitlines() if line]
            if bad := [row for row in rows if len(row) != 3]:
                raise ValueError(f"{name} must have facts of head, relation and tail, got {bad[0]}")
            found[split] = rows
    return found


def made_up() -> dict[str, list[list[str]]]:
    """Numbers and their sums with 1, 2 and 3, modulo 30: for ``smoke``, without any file."""
    facts = [[f"n{i}", f"plus{k}", f"n{(i + k) % 30}"] for i in range(30) for k in (1, 2, 3)]
    order = np.random.default_rng(0).permutation(len(facts))
    shuffled = [facts[i] for i in order]
    return {"train": shuffled[:60], "validation": shuffled[60:75], "test": shuffled[75:]}


def data(config: Config) -> Data:
    """The splits, and which facts are true."""
    found = read(config)
    everything = [fact for facts in found.values() for fact in facts]
    entities = tuple(sorted({x for head, _, tail in everything for x in (head, tail)}))
    relations = tuple(sorted({relation for _, relation, _ in everything}))
    entity = {name: i for i, name in enumerate(entities)}
    number = {name: i for i, name in enumerate(relations)}
    splits = {
        name: np.array([[entity[h], number[r], entity[t]] for h, r, t in facts], np.int32)
        for name, facts in found.items()
    }
    known: dict[tuple[int, int], list[int]] = collections.defaultdict(list)
    for given, tail in zip(*both_ways(np.concatenate(list(splits.values())), len(relations)),
                           strict=True):  # fmt: skip
        known[int(given[0]), int(given[1])].append(int(tail))
    return Data(entities, relations, splits, {k: np.array(v) for k, v in known.items()})


def both_ways(facts: np.ndarray, relations: int) -> Batch:
    """Each fact as a question for its tail, then each for its head.

    >>> given, tails = both_ways(np.array([[5, 1, 7]]), 3)
    >>> given.tolist(), tails.tolist()
    ([[5, 1], [7, 4]], [7, 5])
    """
    h, r, t = facts.T
    given = np.stack([np.concatenate([h, t]), np.concatenate([r, r + relations])], axis=1)
    return Batch(given, np.concatenate([t, h]))


# --- Models.


class Scorer(nnx.Module):
    """Scores of all entities as tails: ``W e_tail + b`` for a vector of what is given."""

    def __init__(self, config: Config, entities: int, relations: int, rngs: nnx.Rngs) -> None:
        E = config.width
        init = nnx.initializers.normal(E**-0.5)
        self.entities = nnx.Param(init(rngs.params(), (entities, E)))
        self.relations = nnx.Param(init(rngs.params(), (2 * relations, E)))
        self.bias = nnx.Param(jnp.zeros(entities))
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs)
        self.stack: Any = nnx.data(None)
        if config.model == "attention":
            layers = Layers(
                E,
                config.depth,
                config.heads,
                dropout_rate=config.dropout,
                activation="gelu_tanh",
                **text_config.attention_options(config),
            )
            self.stack = Stack(layers, causal=False, rngs=rngs)

    def __call__(self, given: Any) -> jax.Array:
        """Logits ``[B entities]`` of ``given [B 2]``."""
        given = jnp.asarray(given)
        table = self.entities[...]
        head, relation = table[given[:, 0]], self.relations[...][given[:, 1]]
        scale = table.shape[1] ** 0.5  # vectors begin with norm 1
        if self.stack is None:
            x = self.dropout(head * relation * scale)
        else:
            tokens = self.dropout(jnp.stack([head, relation], axis=1) * scale)
            x = self.dropout(self.stack(tokens).mean(axis=1))
        return x @ table.T + self.bias[...]


def init(config: Config, data: Data, rngs: nnx.Rngs) -> Any:
    """The rung."""
    return Scorer(config, len(data.entities), len(data.relations), rngs)


# --- The task.


def batches(config: Config, data: Data, step: int) -> Iterator[Batch]:
    """Questions in both directions, each fact twice in a pass."""
    given, tails = both_ways(data.splits["train"], len(data.relations))
    for index in text.shuffled(len(tails), config.batch_size, config.seed, step):
        yield Batch(given[index], tails[index])


def loss(config: Config, model: Any, batch: Batch) -> Loss:
    """Cross-entropy over all entities."""
    each = cross_entropy(model(batch.given), batch.tails, config.label_smoothing)
    return Loss(each.sum(), jnp.float32(each.size))


def ranks(model: Any, data: Data, asked: Batch, size: int = 256) -> np.ndarray:
    """The filtered rank of each tail, from 1: entities that are right besides it do not count."""
    found = []
    n = len(asked.tails)
    for start in range(0, n, size):
        index = np.minimum(np.arange(start, start + size), n - 1)  # the last fills the batch
        rows = np.asarray(logits(model, asked.given[index]))[: n - start]
        for row, given, tail in zip(rows, asked.given[start:], asked.tails[start:], strict=False):
            others = np.delete(row, data.known[int(given[0]), int(given[1])])
            own = row[tail]
            found.append(1 + np.sum(others > own) + np.sum(others == own) / 2)
    return np.array(found)


def evaluate(config: Config, model: Any, data: Data, split: str) -> Metrics:
    """Mean reciprocal rank and Hits@k over both directions of every fact; of a validation split,
    of the first ``scored`` facts of a fixed order."""
    facts = data.splits[split]
    if split == "validation":
        facts = facts[np.random.default_rng(0).permutation(len(facts))[: config.scored]]
    found = ranks(model, data, both_ways(facts, len(data.relations)))
    hits = {f"hits_{k}": float(np.mean(found <= k)) for k in RANKS}
    return {"mrr": float(np.mean(1 / found)), **hits}


def question(data: Data, given: str) -> np.ndarray:
    """A head and a relation, with a space between them, as numbers; ``~relation`` turns it around.

    Raises:
      ValueError: they are not known.
    """
    words = text.check(given).split()
    backwards = len(words) == 2 and words[1].startswith("~")
    names = [words[0], words[-1].removeprefix("~")]
    if len(words) != 2 or names[0] not in data.entities or names[1] not in data.relations:
        raise ValueError(
            f"text must be an entity and a relation, such as {data.entities[0]!r} "
            f"{data.relations[0]!r}, with ~ before a relation that is to be turned around; got "
            f"{given!r}"
        )
    shift = len(data.relations) if backwards else 0
    return np.array([[data.entities.index(names[0]), data.relations.index(names[1]) + shift]])


def sample(config: Config, model: Any, data: Data, given: str | None) -> str:
    """The five likeliest tails; without a question, of five facts of the test split."""
    if given is not None:
        asked = Batch(question(data, given), [None])
    else:
        facts = data.splits["test"]
        some = np.random.default_rng(config.seed).permutation(len(facts))[:5]
        asked = both_ways(facts[some], len(data.relations))
        asked = Batch(asked.given[:5], asked.tails[:5])
    said = []
    for row, (head, relation), tail in zip(
        np.asarray(logits(model, asked.given)), asked.given.tolist(), asked.tails, strict=True
    ):
        said.append(f"{data.entities[head]} {_relation(data, relation)}")
        for i in np.argsort(-row, kind="stable")[:5]:
            mark = " (the fact)" if tail is not None and i == tail else ""
            said.append(f"    {data.entities[i]}{mark}")
    return "\n".join(said)


def _relation(data: Data, number: int) -> str:
    n = len(data.relations)
    return data.relations[number] if number < n else f"~{data.relations[number - n]}"


def look(config: Config, model: Any, data: Data, given: str | None) -> list[AttentionView]:
    """The attention of the two tokens of a question."""
    if config.model != "attention":
        raise ValueError(f"model {config.model} has no attention to look at: take attention")
    asked = data.splits["test"][:1, :2] if given is None else question(data, given)
    _, weights = record_weights(model, asked)
    tokens = [data.entities[asked[0, 0]], _relation(data, int(asked[0, 1]))]
    return self_attention("encoder", tokens, weights)


TASK = Task(
    name="links",
    presets=PRESETS,
    data=data,
    init=init,
    batches=batches,
    loss=loss,
    evaluate=evaluate,
    metric="mrr",
    larger=True,
    unit="facts",
    sample=sample,
    look=look,
)
