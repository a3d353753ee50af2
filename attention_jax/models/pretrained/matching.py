"""Matches the tensors of a checkpoint with those of a model: older names, copies, leftovers."""

from __future__ import annotations

import operator
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax

from attention_jax.models.pretrained.family import Family
from attention_jax.models.pretrained.tensor_files import File
from attention_jax.models.pretrained.tensors import Tensor

Place = tuple[File, str]
"""A file, and the name of a tensor in it."""
Stored = dict[str, Place]
"""Places by name."""

_HEADS = ("classifier.weight", "classifier.out_proj.weight", "qa_outputs.weight")
_TIED = ("lm_head.weight", "proj_out.weight")  # heads that the embedding can replace
# What puts a fresh head on, by the end of Hugging Face's name of the model.
_FRESH = {
    "ForSequenceClassification": "classifier",
    "ForTokenClassification": "tagger",
    "ForQuestionAnswering": "reader",
}


class Matched(NamedTuple):
    """The tensors of a checkpoint, sorted by their use in a model."""

    used: Stored
    """By the names that the model expects; unexpected ones under their own."""
    left_out: list[str]
    """Of heads that the model does not have."""
    errors: list[str]


def stored(files: Iterable[File], family: Family, ignored: Collection[str]) -> Stored:
    """Where each tensor is stored, by its present name, without ignored ones.

    Raises:
      ValueError: two tensors of the same name.
    """
    found: Stored = {}
    for file in files:
        for name in file:
            new = name
            for old, present in family.RENAMED.items():
                new = new.replace(old, present)
            forms = *_forms(new, family), name
            if any(re.fullmatch(pattern, x) for pattern in ignored for x in forms):
                continue
            if new in found:
                raise ValueError(f"two tensors are named {name}, one in {found[new][0].path.name}")
            found[new] = file, name
    return found


def redundant(found: Stored, family: Family) -> set[str]:
    """The copies without information of their own: equal to another, or the only one stored."""
    result = set()
    for copy, original in family.COPIES.items():
        name = _find(copy, found, family)
        others = [x for x, y in family.COPIES.items() if y == original]
        present = [_find(x, found, family) for x in (original, *others)]
        first = next((x for x in present if x is not None), None)
        if name is not None and first is not None and _equal(found[name], found[first]):
            result.add(name)
    return result


def match(
    found: Stored,
    tensors: Mapping[str, Tensor],
    family: Family,
    optional: Collection[str],
    copies: Collection[str],
) -> Matched:
    """Finds each stored tensor's name in the model, with or without the family's prefix.

    Args:
      found: the stored tensors.
      tensors: those that the model expects.
      family: of the checkpoint.
      optional: patterns of heads that the model does not have.
      copies: those that are ``redundant``.
    """
    used: Stored = {}
    left_out, errors, repeated = [], [], {}
    for name, place in found.items():
        forms = _forms(name, family)
        expected = _find(name, tensors, family)
        copy = next((x for x in forms if x in family.COPIES), None)
        if expected is not None:
            if expected in used:
                raise ValueError(f"two tensors are {expected}: {name} and {used[expected][1]}")
            used[expected] = place
        elif _any_matches(family.IGNORED, forms):
            continue
        elif _any_matches(optional, forms):
            left_out.append(place[1])
        elif copy is not None:
            repeated[copy] = name
        else:
            used[name] = place
    for copy, original in family.COPIES.items():
        if copy not in repeated:
            continue
        name = repeated[copy]
        expected = _find(original, tensors, family) or original
        if expected not in used:
            used[expected] = found[name]  # any of them may be the one that is stored
        elif name not in copies:
            errors.append(_differs(name, expected))
    return Matched(used, left_out, errors)


def mismatches(
    used: Stored, tensors: Mapping[str, Tensor], leaves: Any, architecture: str
) -> list[str]:
    """Errors for tensors that are missing, unexpected, or of another shape or dtype.

    Args:
      used: the stored tensors, from ``match``.
      tensors: those that the model expects.
      leaves: the variables of the model.
      architecture: Hugging Face's name of the model.
    """
    missing = [
        f"{name} is missing{_fresh(name, architecture)}" for name in tensors if name not in used
    ]
    if any(f"{name} is missing" in missing for name in _TIED):  # the last tensor
        missing[-1] += " (config={'tie_word_embeddings': True} makes the embedding the head)"
    unexpected = [
        f"{name} is not expected (ignore= leaves tensors out)" for name in used.keys() - tensors
    ]
    others = []
    for name, tensor in tensors.items():
        if name not in used:
            continue
        file, theirs = used[name]
        entry = file.entries[theirs]
        expected = jax.eval_shape(tensor.form.back, leaves[tensor.path].get_value()).shape
        if entry.shape != expected:
            labels = name in _HEADS and not architecture.endswith("ForQuestionAnswering")
            others.append(
                f"{name} has shape {list(entry.shape)}, expected {list(expected)}"
                + (f": {expected[0]} labels in id2label" if labels else "")
            )
        if entry.dtype not in ("F64", "F32", "F16", "BF16"):
            others.append(f"{name} has dtype {entry.dtype}, expected a floating one")
    return [*_some(missing), *_some(sorted(unexpected)), *_some(others)]


def _fresh(name: str, architecture: str) -> str:
    """What to do if a tensor is missing because the checkpoint has no head."""
    kind = next((x for x in _FRESH if architecture.endswith(x)), None)
    if name not in _HEADS or kind is None:
        return ""
    headless = architecture.removesuffix(kind) + "Model"
    return (
        f" (load with config={{'architectures': [{headless!r}]}}, and put a fresh head on with "
        f"models.{_FRESH[kind]})"
    )


def _some(errors: list[str], most: int = 8) -> list[str]:
    """The first errors of a list, and the number of the others."""
    more = len(errors) - most
    return errors if more <= 0 else [*errors[:most], f"and {more} more like these"]


def _forms(name: str, family: Family) -> tuple[str, ...]:
    """A name with and without the prefix, which files have or not depending on their head."""
    prefix: str = family.PREFIX
    return name, prefix + name, name.removeprefix(prefix)


def _find(name: str, names: Collection[str], family: Family) -> str | None:
    return next((x for x in _forms(name, family) if x in names), None)


def _any_matches(patterns: Collection[str], forms: Collection[str]) -> bool:
    return any(re.fullmatch(pattern, x) for pattern in patterns for x in forms)


def _equal(a: Place, b: Place) -> bool:
    """Whether two tensors have the same bytes."""
    (one, name), (other, theirs) = a, b
    x, y = one.entries[name], other.entries[theirs]
    if one is other and name == theirs:
        return True
    return x == y and all(map(operator.eq, one.chunks(name), other.chunks(theirs)))


def _differs(copy: str, original: str) -> str:
    ways = f"ignore=[{re.escape(copy)!r}] leaves it out"
    if copy in _TIED:
        ways += ", config={'tie_word_embeddings': False} uses it"
    return f"{copy} should be a copy of {original} but differs ({ways})"
