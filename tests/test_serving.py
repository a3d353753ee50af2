"""Continuous batching: each request gets the tokens that it gets alone."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import mostly_slow, randomized
from test_models import DECODERS

from attention_jax import models
from attention_jax.models import Batch, Request, Sampling, generate, sampling, serve, serving_steps

V, CAPACITY = 13, 9
CHOICES = (
    None,
    Sampling(temperature=0.7),
    Sampling(temperature=1.3),
    Sampling(top_k=3, top_p=0.9),
    sampling.likeliest(sampling.repetition_penalty(1.5)),
    (sampling.temperature(2.0), sampling.min_p(0.1)),
)


@functools.cache
def decoder(name="rotary, windows"):
    return randomized(models.Decoder(DECODERS[name], rngs=nnx.Rngs(0)))


def batch(rows=3, capacity=CAPACITY, page_size=4, chunk=4, **options):
    return Batch(
        decoder(), rows=rows, capacity=capacity, page_size=page_size, chunk=chunk, **options
    )


def requests(number=7, choices=CHOICES, stop=(5,), seed=0):
    rng, made = np.random.default_rng(seed), []
    for i in range(number):
        choice = choices[i % len(choices)]
        draws = sampling.as_choice(choice).draws
        length = int(rng.integers(1, CAPACITY))
        made.append(
            Request(
                rng.integers(0, V, length).tolist(),
                int(rng.integers(1, CAPACITY - length + 2)),
                choice,
                jax.random.key(i) if draws else None,
                stop,
            )
        )
    return made


def alone(request, model=None):
    """The tokens of ``generate``, in a program that is compiled once for each choice."""
    prompt, real = np.zeros((1, CAPACITY), int), np.zeros((1, CAPACITY), bool)
    prompt[0, : len(request.prompt)], real[0, : len(request.prompt)] = request.prompt, True
    tokens = generate(
        model or decoder(),
        prompt,
        real=real,
        max_new_tokens=CAPACITY,
        sampling=request.sampling,
        key=request.key,
        capacity=2 * CAPACITY,
    ).tokens[0]
    tokens = tokens[: request.max_new_tokens].tolist()
    ends = [i + 1 for i, token in enumerate(tokens) if token in request.stop]
    return tokens[: min(ends, default=None)]


def run(batch):
    """Steps until all requests have ended: the tokens and the end of each."""
    tokens, ends = {}, {}
    while batch.waiting or batch.running:
        for request, token, ended in batch.step():
            assert request not in ends
            tokens.setdefault(request, []).append(token)
            if ended:
                ends[request] = ended
    return tokens, ends


# --- The tokens.


NAMES = [name for name in DECODERS if name != "learned"]  # it has too few positions for ``alone``


@pytest.mark.parametrize("name", mostly_slow(NAMES, ["rotary, windows"]))
def test_tokens_are_those_of_generate_alone(name):
    given, tokens = requests(7), {}
    options = {"rows": 3, "capacity": CAPACITY, "page_size": 4, "pages": 8, "chunk": 4}
    for request, token, _ in serve(decoder(name), given, **options):
        tokens.setdefault(request, []).append(token)
    for number, request in enumerate(given):
        assert tokens[number] == alone(request, decoder(name))


def test_tokens_of_one_request_are_those_of_one_call_of_generate():
    request = Request([3, 1, 4], 5, Sampling(0.9), jax.random.key(7), stop=2)
    result = generate(
        decoder(),
        np.array([[3, 1, 4]]),
        max_new_tokens=5,
        sampling=request.sampling,
        key=request.key,
        stop=2,
    )
    tokens, _ = run_all(batch(), [request])
    assert tokens == {0: result.tokens[0, : result.count[0]].tolist()}


def test_tokens_do_not_depend_on_when_a_request_joins_or_on_the_others():
    given = requests(6)
    expected, _ = run_all(batch(), given)
    late, tokens = batch(rows=2, chunk=3), {}
    left = list(enumerate(given))[::-1]  # in another order, one every two steps
    numbers, steps = {}, 0
    while left or late.waiting or late.running:
        if left and steps % 2 == 0:
            number, request = left.pop(0)
            numbers[late.submit(request)] = number
        for event in late.step():
            tokens.setdefault(numbers[event.request], []).append(event.token)
        steps += 1
    assert tokens == expected


def run_all(batch, given):
    for request in given:
        batch.submit(request)
    return run(batch)


@pytest.mark.slow
def test_an_old_key_and_one_for_each_row_are_those_of_generate():
    for key in (
        jax.random.PRNGKey(3),
        jax.random.split(jax.random.key(3), 1),
        jax.random.key(3, impl="rbg"),
    ):
        request = Request([3, 1, 4], 5, Sampling(), key)
        assert run_all(batch(), [request])[0] == {0: alone(request)}


@pytest.mark.slow
def test_int8_caches():
    given = requests(3, choices=(None,))
    tokens, _ = run_all(batch(quantize="int8"), given)
    same = sum(tokens[i] == alone(request) for i, request in enumerate(given))
    assert same >= 2  # rounding may change a token


# --- Ends.


def test_why_requests_end():
    free = alone(Request([3, 1, 4], 7))
    given = [
        Request([3, 1, 4], 7, stop=free[2:3]),
        Request([3, 1, 4], 2),
        Request([3, 1, 4], 100),
        Request([3, 1, 4], 7, sampling.likeliest(nothing)),
    ]
    tokens, ends = run_all(batch(), given)
    assert ends == {0: "stop", 1: "length", 2: "capacity", 3: "invalid"}
    first = free.index(free[2]) + 1
    assert tokens == {0: free[:first], 1: free[:2], 2: free, 3: [-1]}


def nothing(tokens, logits):
    return logits - np.inf


def test_cancelled_requests_give_no_more_events():
    queue = batch(rows=1)
    numbers = [queue.submit(Request([3, 1], 6)) for _ in range(3)]
    assert (queue.waiting, queue.running) == (3, 0)
    queue.step()
    assert (queue.waiting, queue.running) == (2, 1)
    queue.cancel(numbers[0])
    queue.cancel(numbers[1])
    assert (queue.waiting, queue.running) == (1, 0)
    tokens, ends = run(queue)
    assert tokens == {2: alone(Request([3, 1], 6))}
    assert ends == {2: "length"}
    queue.cancel(numbers[2])  # has ended
    for wrong in (3, -1, "0"):
        with pytest.raises(ValueError, match="request must be a number from submit"):
            queue.cancel(wrong)


# --- Pages.


def test_prompts_that_begin_alike_share_pages():
    prefix = [3, 1, 4, 1, 5, 9, 2, 6]
    given = [Request([*prefix, i], 3) for i in (5, 3, 8)]
    shared = Batch(decoder(), rows=3, capacity=12, page_size=4, chunk=9)
    for request in given:
        shared.submit(request)
    events = shared.step()
    assert [e.request for e in events] == [0]  # 9 tokens read
    assert len(shared.step()) == 3  # 1 token of each of the others, as 8 are those of the first
    assert np.asarray(shared._state.pages.references).max() == 3
    tokens, _ = run(shared)
    again = shared.submit(given[1])  # its row still holds the prompt
    assert [e.request for e in shared.step()] == [again]
    assert shared._state.pages.references.max() >= 1
    for number, request in enumerate(given):
        assert [*tokens[number]] == alone(request)[-len(tokens[number]) :]
    assert run(shared)[0][again] == alone(given[1])[1:]


@pytest.mark.parametrize("pages", [3, 4, 7])
def test_requests_wait_for_pages(pages):
    given = requests(8, choices=(None, Sampling()), seed=1)
    few, tokens = batch(rows=4, pages=pages), {}
    for request in given:
        few.submit(request)
    admitted = []
    while few.waiting or few.running:
        for event in few.step():
            tokens.setdefault(event.request, []).append(event.token)
            admitted += [event.request] if event.request not in admitted else []
        assert not few._state.pages.overflowed.any()
    assert admitted == sorted(admitted) or pages == 7
    assert tokens == {i: alone(request) for i, request in enumerate(given)}


# --- Programs.


def test_new_numbers_and_lengths_compile_nothing_new():
    one = batch()
    run_all(one, [Request([3, 1, 4], 3), Request([3], 3, Sampling(0.5), jax.random.key(0))])
    programs = serving_steps.append, serving_steps.choose
    before = [program._cache_size() for program in programs]
    given = [
        Request([1] * n, 2, Sampling(0.5 + n / 10), jax.random.key(n)) for n in range(1, CAPACITY)
    ]
    run_all(one, given)
    run_all(batch(), given)
    assert [program._cache_size() for program in programs] == before


@pytest.mark.slow
def test_few_of_many_rows_are_decoded_by_a_smaller_program():
    given = [Request([3, i % V], 2 + i % 7) for i in range(33)]
    wide = batch(rows=33)
    assert wide._sizes == [33, 8, 2]
    tokens, _ = run_all(wide, given)
    assert tokens == {i: alone(request) for i, request in enumerate(given)}


def test_a_step_copies_neither_keys_nor_values():
    wide = batch(rows=2, capacity=2048, page_size=32)
    state, rows = wide._state, np.arange(2)
    program = serving_steps.append.lower(
        wide._model, wide._weights, state, rows, rows[:, None], rows
    )
    planned = program.compile().memory_analysis().temp_size_in_bytes
    assert planned < state.pools[0][0].nbytes


# --- Errors.


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"prompt": []}, ValueError, "prompt must be a sequence of at least one token"),
        ({"prompt": [[1, 2]]}, ValueError, "prompt must be a sequence of at least one token"),
        ({"prompt": [1.5]}, TypeError, "prompt must be integers"),
        ({"prompt": [V]}, ValueError, "prompt must hold tokens from 0 to 12"),
        ({"prompt": [1] * 10}, ValueError, "at most 9 tokens, the capacity of a row, got 10"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1"),
        ({"sampling": Sampling()}, ValueError, "key must be given with sampling"),
        ({"key": jax.random.key(0)}, ValueError, "key must be None without a draw"),
        ({"sampling": "greedy"}, TypeError, "sampling"),
        ({"stop": V}, ValueError, "stop must be tokens from 0 to 12"),
    ],
)
def test_a_request_that_can_never_run_is_refused(changes, error, message):
    with pytest.raises(error, match=message):
        batch().submit(Request(**{"prompt": [1], "max_new_tokens": 1, **changes}))


def test_what_cannot_be_served():
    with pytest.raises(TypeError, match="request must be a Request, got int"):
        batch().submit(3)
    with pytest.raises(TypeError, match="model"):
        Batch("gpt2", rows=1, capacity=4)
    with pytest.raises(ValueError, match="rows must be at least 1"):
        batch(rows=0)
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        batch(chunk=0)
    with pytest.raises(ValueError, match="capacity must be at most 9"):
        Batch(decoder("learned"), rows=1, capacity=10)
    few = batch(pages=1)
    with pytest.raises(ValueError, match="at most 4 tokens"):
        few.submit(Request([1] * 5, 1))
    assert list(serve(decoder(), [])) == []
