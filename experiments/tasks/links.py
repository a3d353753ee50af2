"""Link prediction: which facts are missing from a knowledge graph?

::

    python -m experiments train links                             # attention over (head, relation)
    python -m experiments train links --model distmult
    python -m experiments train links --graph wn18rr

A fact is (head, relation, tail). Models score every entity as the tail given head and relation, or
as the head given tail and an inverse relation with its own embedding. A score is the product of the
entity's embedding with a vector of the query: in ``distmult`` the elementwise product of the two
embeddings, in ``attention`` the mean output of a transformer encoder over the two tokens. Both are
trained by cross-entropy over all entities.

Data: FB15k-237, K. Toutanova and D. Chen 2015, 272,115 training, 17,535 validation and 20,466 test
facts on 14,541 entities and 237 relations; and WN18RR, T. Dettmers et al. 2018, 86,835, 3,034 and
3,134 facts on 40,943 entities and 11 relations; as distributed by Dettmers, MIT. The scores are the
filtered mean reciprocal rank (entities that complete another known fact are not ranked; ties share
the mean rank) and Hits@1, 3 and 10. Published MRR of DistMult: 0.24 on FB15k-237, 0.43 on WN18RR
(Dettmers et al. 2018).

The records of ``attention`` use ``--steps 2000`` on FB15k-237 and ``--steps 1500`` on WN18RR, which
has three times as many entities to score at every step.
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
from attention_jax.models.stack import Stack
from experiments.datasets import text
from experiments.datasets.files import path
from experiments.models.inference import full_batches, record_weights
from experiments.tasks.common import check_attends, random_indices
from experiments.training import search, text_config
from experiments.training.config import TrainConfig, at_least_1, below_1, heads_divide, softmax_only
from experiments.training.losses import cross_entropy, logits
from experiments.training.task import (
    ALL,
    Array,
    AttentionView,
    Loss,
    Metrics,
    Model,
    Rows,
    Task,
    self_attention,
)

ARCHIVES = {"fb15k237": "kg/FB15k-237.tar.gz", "wn18rr": "kg/WN18RR.tar.gz"}
SPLITS = {"train": "train.txt", "validation": "valid.txt", "test": "test.txt"}
RANKS = (1, 3, 10)


@dataclasses.dataclass(frozen=True)
class Config(TrainConfig):
    """Options of a link predictor."""

    model: Literal["distmult", "attention"] = "attention"
    """The model to train."""
    graph: Literal["fb15k237", "wn18rr"] = "fb15k237"
    """Freebase facts about people, places and works (fb15k237), or word senses (wn18rr)."""
    width: int = 128
    """Width of the embeddings of entities and relations (E)."""
    heads: int = 4
    """attention: number of heads (N); divides the width."""
    depth: int = 2
    """attention: number of layers."""
    dropout: float = 0.2
    """Dropout rate of the embeddings, the output of each sublayer and the query vector."""
    scored: int = 1000
    """Facts of the validation split to score; the test split is scored in full."""

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

SPACES = dict.fromkeys(("distmult", "attention"), search.USUAL)


class Data(NamedTuple):
    """Facts as indices; the inverse of relation ``r`` is ``r + len(relations)``."""

    entities: tuple[str, ...]
    relations: tuple[str, ...]
    splits: dict[str, np.ndarray]
    """``[n 3]``: head, relation, tail, in the direction of the files."""
    known: dict[tuple[int, int], np.ndarray]
    """Tails of all splits by head and relation, in both directions."""


class Batch(NamedTuple):
    """Heads and relations ``[B 2]``, and the tails to predict ``[B]``."""

    given: Array
    tails: Any


# --- Data.


def read(config: Config) -> dict[str, list[list[str]]]:
    """The facts of each split, as names."""
    if config.synthetic:
        return synthetic()
    facts = {}
    with tarfile.open(path(ARCHIVES[config.graph])) as archive:
        members = {member.name.rpartition("/")[2]: member for member in archive.getmembers()}
        for split, name in SPLITS.items():
            file: Any = archive.extractfile(members[name])
            rows = [line.split("\t") for line in file.read().decode().splitlines() if line]
            if bad := [row for row in rows if len(row) != 3]:
                raise ValueError(f"{name} must have lines of head, relation and tail, got {bad[0]}")
            facts[split] = rows
    return facts


def synthetic() -> dict[str, list[list[str]]]:
    """The sums of 0 to 29 with 1, 2 and 3, modulo 30; needs no files."""
    facts = [[f"n{i}", f"plus{k}", f"n{(i + k) % 30}"] for i in range(30) for k in (1, 2, 3)]
    order = np.random.default_rng(0).permutation(len(facts))
    shuffled = [facts[i] for i in order]
    return {"train": shuffled[:60], "validation": shuffled[60:75], "test": shuffled[75:]}


def load(config: Config) -> Data:
    """The splits as indices, and the known tails of each head and relation."""
    names = read(config)
    union = [fact for facts in names.values() for fact in facts]
    entities = tuple(sorted({x for head, _, tail in union for x in (head, tail)}))
    relations = tuple(sorted({relation for _, relation, _ in union}))
    entity = {name: i for i, name in enumerate(entities)}
    relation = {name: i for i, name in enumerate(relations)}
    splits = {
        split: np.array([[entity[h], relation[r], entity[t]] for h, r, t in facts], np.int32)
        for split, facts in names.items()
    }
    known: dict[tuple[int, int], list[int]] = collections.defaultdict(list)
    queries = both_ways(np.concatenate(list(splits.values())), len(relations))
    for given, tail in zip(*queries, strict=True):
        known[int(given[0]), int(given[1])].append(int(tail))
    return Data(entities, relations, splits, {k: np.array(v) for k, v in known.items()})


def both_ways(facts: np.ndarray, relations: int) -> Batch:
    """Each fact as a query for its tail, then each as a query for its head.

    >>> given, tails = both_ways(np.array([[5, 1, 7]]), 3)
    >>> given.tolist(), tails.tolist()
    ([[5, 1], [7, 4]], [7, 5])
    """
    h, r, t = facts.T
    given = np.stack([np.concatenate([h, t]), np.concatenate([r, r + relations])], axis=1)
    return Batch(given, np.concatenate([t, h]))


# --- Models.


class Scorer(nnx.Module):
    """Scores every entity as the tail: ``x . e_tail + b_tail`` for the query vector ``x``."""

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
                features=E,
                num_layers=config.depth,
                num_heads=config.heads,
                dropout_rate=config.dropout,
                activation="gelu_tanh",
                **text_config.attention_options(config),
            )
            self.stack = Stack(layers, causal=False, rngs=rngs)

    def __call__(self, given: Array) -> jax.Array:
        """Logits ``[B entities]`` of ``given [B 2]``."""
        given = jnp.asarray(given)
        table = self.entities[...]
        head, relation = table[given[:, 0]], self.relations[...][given[:, 1]]
        scale = table.shape[1] ** 0.5  # embeddings are initialized with norm 1
        if self.stack is None:
            x = self.dropout(head * relation * scale)
        else:
            tokens = self.dropout(jnp.stack([head, relation], axis=1) * scale)
            x = self.dropout(self.stack(tokens).mean(axis=1))
        return x @ table.T + self.bias[...]


def init(config: Config, data: Data, rngs: nnx.Rngs) -> Model:
    """A fresh model."""
    return Scorer(config, len(data.entities), len(data.relations), rngs)


# --- The task.


def batches(config: Config, data: Data, step: int, rows: Rows = ALL) -> Iterator[Batch]:
    """Batches of queries in both directions; each fact occurs twice per epoch."""
    given, tails = both_ways(data.splits["train"], len(data.relations))
    for index in text.shuffled(len(tails), config.batch_size, config.seed, step):
        mine = rows.of(index)
        yield Batch(given[mine], tails[mine])


def loss(config: Config, model: Model, batch: Batch) -> Loss:
    """Cross-entropy over all entities."""
    each = cross_entropy(model(batch.given), batch.tails, config.label_smoothing)
    return Loss(each.sum(), jnp.float32(each.size))


def ranks(model: Model, data: Data, queries: Batch, size: int = 256) -> np.ndarray:
    """The filtered rank of each tail, from 1: other known tails of the query are not ranked."""
    result = []
    n = len(queries.tails)
    for index in full_batches(n, size):
        given, tails = queries.given[index], queries.tails[index]
        for row, (head, relation), tail in zip(
            np.asarray(logits(model, given)), given.tolist(), tails, strict=True
        ):
            others = np.delete(row, data.known[head, relation])
            result.append(1 + np.sum(others > row[tail]) + np.sum(others == row[tail]) / 2)
    return np.array(result[:n])


def evaluate(config: Config, model: Model, data: Data, split: str) -> Metrics:
    """Mean reciprocal rank and Hits@k over both directions of each fact.

    Of the validation split, a fixed random selection of ``scored`` facts is used.
    """
    facts = data.splits[split]
    if split == "validation":
        facts = facts[np.random.default_rng(0).permutation(len(facts))[: config.scored]]
    rank = ranks(model, data, both_ways(facts, len(data.relations)))
    hits = {f"hits_{k}": float(np.mean(rank <= k)) for k in RANKS}
    return {"mrr": float(np.mean(1 / rank)), **hits}


def query_of(data: Data, given: str) -> np.ndarray:
    """Indices ``[1 2]`` of a head and a relation separated by a space; ``~`` inverts the relation.

    Raises:
      ValueError: the entity or the relation is unknown.
    """
    words = text.check(given).split()
    inverse = len(words) == 2 and words[1].startswith("~")
    names = [words[0], words[-1].removeprefix("~")]
    if len(words) != 2 or names[0] not in data.entities or names[1] not in data.relations:
        raise ValueError(
            f"text must be an entity and a relation, such as {data.entities[0]!r} "
            f"{data.relations[0]!r}, with ~ before the relation for its inverse, got {given!r}"
        )
    shift = len(data.relations) if inverse else 0
    return np.array([[data.entities.index(names[0]), data.relations.index(names[1]) + shift]])


def sample(config: Config, model: Model, data: Data, given: str | None) -> str:
    """The five likeliest tails for a user's query, or for five facts of the test split."""
    if given is not None:
        queries = Batch(query_of(data, given), [None])
    else:
        facts = data.splits["test"]
        chosen = facts[random_indices(len(facts), 5, config.seed)]
        queries = Batch(chosen[:, :2], chosen[:, 2])
    lines = []
    for row, (head, relation), tail in zip(
        np.asarray(logits(model, queries.given)), queries.given.tolist(), queries.tails, strict=True
    ):
        lines.append(f"{data.entities[head]} {_relation_name(data, relation)}")
        for i in np.argsort(-row, kind="stable")[:5]:
            mark = " (the fact)" if tail is not None and i == tail else ""
            lines.append(f"    {data.entities[i]}{mark}")
    return "\n".join(lines)


def _relation_name(data: Data, relation: int) -> str:
    n = len(data.relations)
    return data.relations[relation] if relation < n else f"~{data.relations[relation - n]}"


def look(config: Config, model: Model, data: Data, given: str | None) -> list[AttentionView]:
    """Attention weights between head and relation; default those of the first test fact."""
    check_attends(config, "attention")
    query = data.splits["test"][:1, :2] if given is None else query_of(data, given)
    _, weights = record_weights(model, query)
    tokens = [data.entities[query[0, 0]], _relation_name(data, int(query[0, 1]))]
    return self_attention("encoder", tokens, weights)


TASK = Task(
    name="links",
    presets=PRESETS,
    spaces=SPACES,
    data=load,
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
