"""Which tensor of a checkpoint is which of a model: older names, copies, and what is left over."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import jax

from attention_jax.models.pretrained.safetensors import File
from attention_jax.models.pretrained.tensors import Tensor

Place = tuple[File, str]
"""A file, and the name of a tensor there."""
Stored = dict[str, Place]


class Matched(NamedTuple):
    """What a checkpoint's tensors are to a model."""

    used: Stored
    """By the names that the model expects; under their own where it expects none."""
    left_out: list[str]
    """Of parts that the model does not have."""
    wrong: list[str]
    """What cannot be, in words."""


def stored(files: Iterable[File], family: ModuleType, ignored: Collection[str]) -> Stored:
    """Where each tensor is, by its present name, without those to be ignored.

    Raises:
      ValueError: a name that stands twice.
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
                raise ValueError(f"{name} stands twice, in {found[new][0].path.name} and again")
            found[new] = file, name
    return found


def redundant(found: Stored, family: ModuleType) -> set[str]:
    """The copies that hold nothing of their own: equal to what they are copies of, or alone."""
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
    family: ModuleType,
    without: Collection[str],
    copies: Collection[str],
) -> Matched:
    """Each tensor by the name that the model expects, with or without the family's prefix.

    Args:
      found: the tensors there are.
      tensors: those that the model expects.
      family: its IGNORED are no parameters, its COPIES repeat another tensor.
      without: patterns of the parts that the model does not have.
      copies: those that are ``redundant``.
    """
    used: Stored = {}
    left_out, wrong, repeated = [], [], {}
    for name, place in found.items():
        forms = _forms(name, family)
        expected = _find(name, tensors, family)
        copy = next((x for x in forms if x in family.COPIES), None)
        if expected is not None:
            if expected in used:
                raise ValueError(f"{expected} stands twice, as {name} and {used[expected][1]}")
            used[expected] = place
        elif _any_matches(family.IGNORED, forms):
            continue
        elif _any_matches(without, forms):
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
            used[expected] = found[name]  # which of the equals is stored is an accident
        elif name not in copies:
            wrong.append(_differs(name, expected))
    return Matched(used, left_out, wrong)


def mistakes(used: Stored, tensors: Mapping[str, Tensor], leaves: Any) -> list[str]:
    """Where the tensors are not those of the model, in words."""
    missing = [f"{name} is missing" for name in tensors if name not in used]
    if "lm_head.weight is missing" in missing:
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
            others.append(f"{name} has shape {list(entry.shape)}, expected {list(expected)}")
        if entry.dtype not in ("F64", "F32", "F16", "BF16"):
            others.append(f"{name} has dtype {entry.dtype}, expected a floating one")
    return [*_some(missing), *_some(sorted(unexpected)), *_some(others)]


def _some(wrong: list[str], most: int = 8) -> list[str]:
    """The first of a list, and how many more there are."""
    more = len(wrong) - most
    return wrong if more <= 0 else [*wrong[:most], f"and {more} more like these"]


def _forms(name: str, family: ModuleType) -> tuple[str, ...]:
    """A name with and without the prefix, which depends on the head of what was saved."""
    prefix: str = family.PREFIX
    return name, prefix + name, name.removeprefix(prefix)


def _find(name: str, names: Collection[str], family: ModuleType) -> str | None:
    return next((x for x in _forms(name, family) if x in names), None)


def _any_matches(patterns: Collection[str], forms: Collection[str]) -> bool:
    return any(re.fullmatch(pattern, x) for pattern in patterns for x in forms)


def _equal(a: Place, b: Place) -> bool:
    """Whether two tensors hold the same bytes."""
    (one, name), (other, theirs) = a, b
    x, y = one.entries[name], other.entries[theirs]
    if one is other and name == theirs:
        return True
    chunks: Iterator[Any] = zip(one.chunks(name), other.chunks(theirs), strict=False)
    return (x.dtype, x.shape) == (y.dtype, y.shape) and all(p == q for p, q in chunks)


def _differs(copy: str, original: str) -> str:
    ways = f"ignore=[{re.escape(copy)!r}] leaves it out"
    if copy == "lm_head.weight":
        ways += ", config={'tie_word_embeddings': False} uses it"
    return f"{copy} should be a copy of {original} and is not ({ways})"
