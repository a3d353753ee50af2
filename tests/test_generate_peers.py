"""Processors, beam search and left-padded prompts equal those of Hugging Face."""

import itertools
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")
    from transformers.generation import logits_process

from attention_jax.models import beam_search, generate, pretrained, sampling  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

V, NEW, K, PAD = 11, 6, 3, 10
STOP = (3, 7, 9)
PROMPT = np.array([[5, 1, 4], [2, 9, 7]])
MADE = {
    "temperature": (sampling.temperature(0.7), "TemperatureLogitsWarper", 0.7),
    "top_k": (sampling.top_k(4), "TopKLogitsWarper", 4),
    "top_p": (sampling.top_p(0.8), "TopPLogitsWarper", 0.8),
    "min_p": (sampling.min_p(0.05), "MinPLogitsWarper", 0.05),
    "repetition_penalty": (
        sampling.repetition_penalty(1.3),
        "RepetitionPenaltyLogitsProcessor",
        1.3,
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_processors_equal_hugging_face(name):
    processor, theirs, number = MADE[name]
    rng = np.random.default_rng(0)
    logits, tokens = rng.normal(size=(5, V)).astype(np.float32) * 2, rng.integers(0, V, (5, 4))
    warper = getattr(logits_process, theirs)(number)
    expected = warper(torch.tensor(tokens), torch.tensor(logits)).numpy()
    got = [processor(jnp.asarray(t), jnp.asarray(x)) for t, x in zip(tokens, logits, strict=True)]
    np.testing.assert_allclose(np.stack(got), expected, rtol=1e-6)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=V,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=STOP[0],
        pad_token_id=PAD,
        initializer_range=0.5,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    path = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(path)
    return model, pretrained.load(path)


def theirs(model, **options):
    with torch.no_grad():
        return model.generate(
            torch.tensor(PROMPT),
            attention_mask=torch.ones(PROMPT.shape, dtype=torch.long),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=list(STOP),
            pad_token_id=PAD,
            **options,
        )


SEARCHES = [*itertools.product((0.0, 0.6, 2.0), (False, True, "never"))]


@pytest.mark.parametrize(
    ("penalty", "early"),
    [x if x == (0.6, False) else pytest.param(*x, marks=pytest.mark.slow) for x in SEARCHES],
)
def test_beams_equal_hugging_face(gpt2, penalty, early):
    model, ours = gpt2
    options = {"length_penalty": penalty, "early_stopping": early}
    out = theirs(
        model,
        num_beams=K,
        num_return_sequences=K,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    expected = out.sequences[:, PROMPT.shape[1] :].numpy().reshape(len(PROMPT), K, -1)
    got = beam_search(
        ours, PROMPT, max_new_tokens=NEW, beams=K, stop=STOP, pad_token=PAD, **options
    )
    np.testing.assert_array_equal(got.tokens[..., : expected.shape[-1]], expected)
    np.testing.assert_allclose(got.score.reshape(-1), out.sequences_scores.numpy(), atol=1e-4)


def test_greedy_with_a_penalty_equals_hugging_face(gpt2):
    model, ours = gpt2
    expected = theirs(model, repetition_penalty=1.5)[:, PROMPT.shape[1] :].numpy()
    how = sampling.likeliest(sampling.repetition_penalty(1.5))
    got = generate(ours, PROMPT, max_new_tokens=NEW, stop=STOP, pad_token=PAD, sampling=how)
    np.testing.assert_array_equal(got.tokens[:, : expected.shape[1]], expected)


def test_logits_of_left_padded_prompts_equal_hugging_face(gpt2):
    model, ours = gpt2
    real = np.array([[False, False, True], [True] * 3])
    positions = np.where(real, real.cumsum(1) - 1, 1)  # what they put at padding
    with torch.no_grad():
        expected = model(
            torch.tensor(PROMPT),
            attention_mask=torch.tensor(real.astype(int)),
            position_ids=torch.tensor(positions),
        ).logits.numpy()
    for at in (None, positions, real.cumsum(1) - 1):
        got = np.asarray(ours(PROMPT, real=real, positions=at))
        np.testing.assert_allclose(got[real], expected[real], atol=1e-4)
