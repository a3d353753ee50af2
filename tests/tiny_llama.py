"""A small Llama checkpoint whose tokens are bytes, with a chat template, to talk with in tests."""

import json

from flax import nnx
from helpers import randomized
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from attention_jax.models import Decoder, DecoderConfig, Layers, pretrained
from attention_jax.positions import Rotary

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
END, START = "<|end|>", "<|start|>"
TEMPLATE = """{% for message in messages %}
<|start|>{{ message.role }}
{{ message.content }}<|end|>
{% endfor %}
{% if add_generation_prompt %}<|start|>assistant
{% endif %}"""


def write(folder, *, template=TEMPLATE, max_length=512, ends=True):
    """Writes model and tokenizer; returns the folder. Without ``ends`` no token ends a text."""
    words = {x: i for i, x in enumerate(BYTES)}
    made = Tokenizer(models.BPE(vocab=words, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(x, special=True, normalized=False) for x in (END, START)])
    layers = Layers(
        features=8, num_layers=1, num_heads=2, hidden=8, rotary=Rotary(), norm="rms", gated=True,
        activation="silu", bias=False, feed_forward_bias=False,
    )  # fmt: skip
    config = DecoderConfig(len(words) + 2, layers, tied=False, max_length=max_length)
    model = randomized(Decoder(config, rngs=nnx.Rngs(0)))
    folder.mkdir(parents=True, exist_ok=True)
    pretrained.save(model, folder, config={"eos_token_id": len(words)} if ends else None)
    made.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": END if ends else None, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
