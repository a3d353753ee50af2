"""A small BERT checkpoint that knows every text of ASCII, to fine-tune within moments."""

import json
import string

from flax import nnx
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from attention_jax.models import Encoder, EncoderConfig, Layers, pretrained

SPECIAL = ["[PAD]", "[unused0]", "[unused1]", "[unused2]", "[UNK]", "[CLS]", "[SEP]"]
LETTERS = [c for c in string.printable.lower() if not c.isspace()]
TOKENS = list(dict.fromkeys([*SPECIAL, "§", "¶", *LETTERS, *(f"##{c}" for c in LETTERS)]))


def write(folder, tokens=TOKENS):
    """Writes the encoder and its tokenizer; returns the folder."""
    layers = Layers(features=8, num_layers=2, num_heads=2, hidden=16, order="post")
    config = EncoderConfig(len(tokens), layers, max_length=512, types=2, embedding_norm=True)
    pretrained.save(Encoder(config, rngs=nnx.Rngs(0)), folder)
    made = Tokenizer(models.WordPiece({x: i for i, x in enumerate(tokens)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.add_special_tokens([x for x in tokens if x in SPECIAL and "unused" not in x])
    made.decoder = decoders.WordPiece()
    ends = [(x, tokens.index(x)) for x in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    made.save(str(folder / "tokenizer.json"))
    return folder


def of_another_family(folder):
    """Writes a folder whose configuration is that of another family of checkpoints."""
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder
