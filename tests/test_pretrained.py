"""Checkpoints: logits equal those of Hugging Face's models, loaded and saved."""

import json
import os
import warnings

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    transformers = pytest.importorskip("transformers")


import peers  # noqa: E402
from checkpoints import write_modules  # noqa: E402
from peers import BERT, CLIP, DISTILBERT, LLAMA, MODELS, MODERNBERT, T5, VIT, WHISPER, V  # noqa: E402

from attention_jax.models import pretrained  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

T, B = 11, 3
LENGTHS = np.array([T, 7, 1])
REAL = np.arange(T) < LENGTHS[:, None]

WITH_LABELS = ("ForSequenceClassification", "ForTokenClassification")
WITH_TYPES = {"bert", "roberta", "xlm-roberta", "camembert", "electra"}
PADDING = 2  # where positions count from padding, no other token may be equal to it
SAME = {"xlm-roberta", "camembert"}  # written as another family unless asked otherwise
LEFT_OUT = {"vit": [r"pooler\..*"]}  # which ours does not have


def peer(name, seed=0):
    return peers.peer(*MODELS[name], seed)


def tokens(seed, shape=(B, T)):
    return np.random.default_rng(seed).integers(3, V, shape)


def encoded(name, real):
    """The arguments of an encoder of texts: tokens, and their types if it has any."""
    types = {"types": tokens(2) % 2} if name.split()[0] in WITH_TYPES else {}
    return np.where(real, tokens(0), 1 if name.startswith("mpnet") else PADDING), types


def ended(real):
    """Texts that end with the last token of the vocabulary, which is padding too."""
    last = real & ~np.pad(real, ((0, 0), (0, 1)))[:, 1:]
    return np.where(real & ~last, tokens(0), V - 1)


def spectrograms():
    return np.random.default_rng(0).normal(size=(B, 18, 6)).astype(np.float32)


def theirs(name, model, real=REAL):
    with torch.no_grad():
        if name.startswith("vit"):
            images = np.random.default_rng(0).normal(size=(B, 2, 12, 12)).astype(np.float32)
            out = model(torch.tensor(images))
        elif name.startswith("clip_text"):
            out = model(torch.tensor(ended(real)), torch.tensor(real.astype(int)))
            return (out.text_embeds if "projected" in name else out.pooler_output).numpy()
        elif name.startswith("clip_vision"):
            images = np.random.default_rng(0).normal(size=(B, 2, 12, 12)).astype(np.float32)
            out = model(torch.tensor(images))
            return (out.image_embeds if "projected" in name else out.pooler_output).numpy()
        elif name.startswith("clip"):
            images = np.random.default_rng(0).normal(size=(B, 2, 12, 12)).astype(np.float32)
            mask = torch.tensor(real.astype(int))
            out = model(torch.tensor(ended(real)), torch.tensor(images), mask)
            return out.logits_per_text.numpy()
        elif name.startswith("whisper"):
            x = torch.tensor(spectrograms().transpose(0, 2, 1))
            out = model(input_features=x, decoder_input_ids=torch.tensor(tokens(1, (B, 6))))
        elif name.startswith("t5"):
            out = model(
                input_ids=torch.tensor(tokens(0)),
                attention_mask=torch.tensor(REAL.astype(int)),
                decoder_input_ids=torch.tensor(tokens(1, (B, 6))),
            )
        else:
            ids, types = encoded(name, real)
            options = {"attention_mask": torch.tensor(real.astype(int))}
            if types:
                options["token_type_ids"] = torch.tensor(types["types"])
            out = model(torch.tensor(ids), **options)
    if name.endswith("spans"):
        return torch.stack([out.start_logits, out.end_logits], dim=-1).numpy()
    return (out.logits if hasattr(out, "logits") else out.last_hidden_state).numpy()


def ours(name, model, real=REAL):
    if name.startswith("clip_text"):
        return model(ended(real), real=real)
    if name.startswith(("vit", "clip_vision")):
        images = np.random.default_rng(0).normal(size=(B, 2, 12, 12)).astype(np.float32)
        return model(images.transpose(0, 2, 3, 1))
    if name.startswith("clip"):
        images = np.random.default_rng(0).normal(size=(B, 2, 12, 12)).astype(np.float32)
        return model(ended(real), images.transpose(0, 2, 3, 1), real=real)
    if name.startswith("whisper"):
        return model(spectrograms(), tokens(1, (B, 6)))
    if name.startswith("t5"):
        return model(tokens(0), tokens(1, (B, 6)), source_real=REAL)
    ids, types = encoded(name, real)
    out = model(ids, real=real, **types)
    return np.stack(out, axis=-1) if name.endswith("spans") else out


def assert_same(name, a, b, atol=1e-4, real=REAL):
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape
    if a.shape[:2] == (B, T):  # results at padding are undefined
        # Dynamic scaling follows the length: theirs includes padding, ours is that of each row.
        whole = real.all(1, keepdims=True) if name == "llama dynamic" else True
        a, b = a[real & whole], b[real & whole]
    assert np.ptp(a) > 0.1  # otherwise the comparison is empty
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each model as Hugging Face writes it, made when it is asked for."""
    made = {}

    def folder(name):
        if name not in made:
            path = tmp_path_factory.mktemp("checkpoint")
            model = peer(name)
            model.save_pretrained(path)
            made[name] = path, theirs(name, model)
        return made[name]

    return folder


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_hugging_face(name, folders):
    path, expected = folders(name)
    assert_same(name, ours(name, pretrained.load(path, ignore=LEFT_OUT.get(name, ()))), expected)


@pytest.mark.parametrize("name", MODELS)
def test_hugging_face_loads_what_we_save(name, folders, tmp_path):
    path, expected = folders(name)
    model = pretrained.load(path, ignore=LEFT_OUT.get(name, ()))
    kind = name.split()[0]
    config = {"model_type": kind, "architectures": [MODELS[name][0]]} if kind in SAME else {}
    pretrained.save(model, tmp_path, config=config)
    cls = getattr(transformers, MODELS[name][0])
    back, report = cls.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    lost = {key: names for key, names in report.items() if names}
    if name == "vit":  # their head, which ours does not have
        lost = {k: v for k, v in lost.items() if any("pooler" not in str(n) for n in v)}
    assert not lost
    assert_same(name, theirs(name, back.eval()), expected)
    if MODELS[name][0].endswith(WITH_LABELS):
        cls = getattr(transformers, MODELS[name][0])
        assert back.config.id2label == cls.config_class(**MODELS[name][1]).id2label
        assert tuple(back.config.label2id) == model.config.labels
    assert pretrained.load(tmp_path).config == model.config


@pytest.mark.parametrize("name", ["roberta", "xlm-roberta classes", "mpnet", "modernbert"])
def test_padding_on_the_left(name, folders):
    path, _ = folders(name)
    real = REAL[:, ::-1]
    expected = theirs(name, loaded(MODELS[name][0], path), real)
    if expected.ndim == 2:  # they take the first token, ours is the first one that is real
        expected = expected[real[:, 0]]
        assert len(expected) == 1
    got = np.asarray(ours(name, pretrained.load(path), real))
    assert_same(name, got if got.ndim > 2 else got[real[:, 0]], expected, real=real)


EMBEDDERS = [("roberta tokens", "mean"), ("mpnet", "mean"), ("distilbert classes", "cls")]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("name", "pool"), EMBEDDERS)
def test_sentence_embeddings(name, pool, tmp_path):
    """From a checkpoint of any head, which is left out without a warning."""
    model = peer(name)
    model.save_pretrained(tmp_path)
    write_modules(tmp_path, pool=pool)
    with torch.no_grad():
        ids, mask = encoded(name, REAL)[0], torch.tensor(REAL.astype(int))
        x = model.base_model(torch.tensor(ids), attention_mask=mask).last_hidden_state
    kept = mask[..., None]
    x = x[:, 0] if pool == "cls" else (x * kept).sum(1) / kept.sum(1)
    expected = torch.nn.functional.normalize(x).numpy()
    assert_same("", pretrained.load_embedder(tmp_path)(ids, real=REAL), expected)


def loaded(cls, folder):
    """As Hugging Face reads a folder."""
    return getattr(transformers, cls).from_pretrained(folder, attn_implementation="eager").eval()


def changed(folder, **entries):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    "entries",
    [
        {"rope_scaling": YARN, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rope_scaling": YARN, "original_max_position_embeddings": 5, "rope_theta": 500.0},
        {"rope_parameters": YARN | {"rope_theta": 500.0, "mscale": 3.0}},
        {"rope_parameters": YARN | {"rope_theta": 500.0, "factor": None}},
    ],
)
def test_rotary_entries_mean_the_same_as_in_hugging_face(entries, tmp_path):
    peer("llama").save_pretrained(tmp_path)
    plain = ours("llama", pretrained.load(tmp_path))
    changed(tmp_path, **entries)
    expected = theirs("llama", loaded("LlamaForCausalLM", tmp_path))
    assert np.abs(expected - plain)[REAL].max() > 0.01
    assert_same("llama", ours("llama", pretrained.load(tmp_path)), expected)


SIZES = {
    "BertConfig": BERT,
    "RobertaConfig": BERT,
    "XLMRobertaConfig": BERT,
    "CamembertConfig": BERT,
    "DistilBertConfig": DISTILBERT,
    "ElectraConfig": BERT,
    "MPNetConfig": BERT,
    "ModernBertConfig": MODERNBERT,
    "GPT2Config": MODELS["gpt2"][1],
    "LlamaConfig": LLAMA,
    "MistralConfig": LLAMA,
    "Gemma2Config": LLAMA,
    "T5Config": T5,
    "WhisperConfig": WHISPER,
    "ViTConfig": VIT,
    "CLIPConfig": CLIP,
    "CLIPTextConfig": CLIP["text_config"],
    "CLIPVisionConfig": CLIP["vision_config"],
}
REQUIRED = {"vocab_size", "hidden_size", "intermediate_size", "d_model", "d_kv", "d_ff"}


@pytest.mark.parametrize("name", SIZES)
def test_defaults_of_missing_entries_equal_hugging_face(name):
    numbers = "num_hidden_layers", "num_attention_heads", "num_layers", "num_heads"
    distilbert = "dim", "hidden_dim", "n_layers", "n_heads"
    needed = {*REQUIRED, *numbers, *distilbert, "n_embd", "n_layer", "n_head"}
    given = {key: x for key, x in SIZES[name].items() if key in needed}
    if "hidden_size" in given:
        given |= {"hidden_size": 24}  # an even width of a head
    config = getattr(transformers, name)(**given)
    a, b = peers.read(config, given)
    assert a == b


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_an_untied_head(name, tmp_path):
    cls = MODELS[name][0]
    model = peer(name)
    expected = theirs(name, model)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight[torch.arange(V - 1, -1, -1)])
    model.config.tie_word_embeddings = name == "t5"  # of T5 the entry is about a scale
    model.save_pretrained(tmp_path)
    assert_same(name, theirs(name, loaded(cls, tmp_path)), expected[..., ::-1])
    again = pretrained.load(tmp_path)
    assert_same(name, ours(name, again), expected[..., ::-1])
    pretrained.save(again, tmp_path)
    assert_same(name, theirs(name, loaded(cls, tmp_path)), expected[..., ::-1])


def test_bert_with_the_heads_of_its_pretraining(tmp_path):
    model = transformers.BertForPreTraining(transformers.BertConfig(**BERT)).eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(torch.tensor(tokens(0))).prediction_logits.numpy()
    with pytest.warns(UserWarning, match=r"left out .*seq_relationship"):
        assert_same("", pretrained.load(tmp_path)(tokens(0)), expected)


def test_hugging_face_loads_the_new_model_after_a_killed_save(tmp_path, monkeypatch):
    peer("gpt2", seed=1).save_pretrained(tmp_path / "new")
    peer("gpt2", seed=0).save_pretrained(tmp_path / "old", max_shard_size="5KB")
    assert (tmp_path / "old" / "model.safetensors.index.json").exists()
    new = pretrained.load(tmp_path / "new")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", killed)
        with pytest.raises(KeyboardInterrupt):
            pretrained.save(new, tmp_path / "old")
    for _ in range(2):
        back = theirs("gpt2", loaded("GPT2LMHeadModel", tmp_path / "old"))
        assert_same("gpt2", ours("gpt2", new), back)
        pretrained.save(new, tmp_path / "old")


@pytest.mark.parametrize("name", ["t5", "t5 1.1"])
def test_t5_in_float16(name, tmp_path):
    """The residual stream exceeds float16's largest number; Hugging Face's result is finite too."""
    model = peer(name)
    with torch.no_grad():
        for key, x in model.named_parameters():
            if key.endswith(".wo.weight"):
                x.mul_(3e4)
    model.save_pretrained(tmp_path)
    expected = theirs(name, model)
    half = getattr(transformers, MODELS[name][0]).from_pretrained(
        tmp_path, attn_implementation="eager", dtype=torch.float16
    )
    largest = []
    layer = half.encoder.block[0]
    layer.register_forward_hook(lambda *x: largest.append(float(x[2][0].abs().max())))
    atol = 0.02 * np.abs(expected).max()
    np.testing.assert_allclose(theirs(name, half.eval()).astype(np.float32), expected, atol=atol)
    assert largest[0] > 65_504
    got = ours(name, pretrained.load(tmp_path, param_dtype=jnp.float16))
    np.testing.assert_allclose(got, expected, atol=atol)
