"""What imports what, what is public, and what stands at the top of the repository."""

import ast
import doctest
import importlib
import inspect
import pathlib
import subprocess
import sys
import tomllib

import pytest

import attention_jax

PACKAGE = pathlib.Path(attention_jax.__file__).parent
ROOT = PACKAGE.parent

# Data flows one way: a file imports only from layers above its own. "" is the package itself.
LAYERS = [
    {"axes", "reference", "grid", "compat"},
    {"values", "positions.arguments", "positions.scalings"},
    {"closures", "dropout"},
    {"masks.arguments", "masks.base", "scores"},
    {"masks.bands", "masks.spans", "masks.layouts", "masks.places", "by_position"},
    {"masks.sight", "positions.vectors", "positions.rope", "positions.relative"},
    {"masks", "positions"},
    {"softmax", "blocks", "tiles", "lift"},
    {"arguments"},
    {"backends.request", "backends.xla", "backends.primitive"},
    {"backends.program", "backends.together", "backends.kernel_rules", "backends.pallas_tiles"},
    {"backends.blockwise", "backends.cudnn", "backends.splash"},
    {"backends.pallas_kernels"},
    {"backends.pallas_launch"},
    {"backends.pallas_gpu"},
    {"backends"},
    {"explanation"},
    {"attention"},
    {"cache"},
    {"mechanisms.additive", "mechanisms.seen", "mechanisms.inverted", "mechanisms.topk"},
    {"mechanisms.recurrence", "mechanisms.packing", "mechanisms.linformer", "mechanisms.routing"},
    {"mechanisms.linear", "mechanisms.gated_linear", "mechanisms.differential"},
    {"mechanisms.latent"},
    {"mechanisms.slot"},
    {"mechanisms"},
    {"nn.arguments"},
    {"nn.linear", "nn.drop_in", "nn.norms", "nn.padding"},
    {"nn.attention", "nn.feed_forward", "nn.embeddings"},
    {"nn.blocks"},
    {"nn.pooling", "nn.weights", "nn.adapters"},
    {"nn"},
    {"models.running"},
    {"models.layers"},
    {"models.decoder", "models.encoder", "models.vision"},
    {"models.encoder_decoder"},
    {"models.prompts", "models.sampling"},
    {"models.decoding", "models.beams"},
    {"models.pretrained.safetensors", "models.pretrained.tensors", "models.pretrained.entries"},
    {f"models.pretrained.{part}" for part in ("folders", "matching", "rope")},
    {f"models.pretrained.{x}" for x in ("adapters", "bert", "gpt2", "llama", "t5", "vit")},
    {"models.pretrained"},
    {"models"},
    {"_cases", "_peers"},
    {"_rules"},
    {"_problems"},
    {"testing"},
    {""},
]
RANK = {module: rank for rank, layer in enumerate(LAYERS) for module in layer}

PUBLIC = {
    "": [
        "BlockMap",
        "Explanation",
        "KVCache",
        "Mask",
        "Score",
        "attention",
        "attention_weights",
        "block_map",
        "cache",
        "explain",
        "masks",
        "positions",
        "reference",
        "scores",
    ],
    "masks": [
        "Mask",
        "at_positions",
        "block_sparse",
        "causal",
        "chunked",
        "dense",
        "dilated",
        "global_tokens",
        "lengths",
        "mask_fn",
        "neighborhood",
        "padding",
        "prefix",
        "segments",
        "window",
    ],
    "mechanisms": [
        "Features",
        "PackedState",
        "NAMED",
        "absorbed_latent_attention",
        "additive_attention",
        "additive_weights",
        "as_attention",
        "clusters",
        "delta_rule",
        "differential_attention",
        "differential_weight",
        "gated_linear_attention",
        "inverted_attention",
        "latent_attention",
        "linear_attention",
        "linformer_attention",
        "performer_features",
        "retention",
        "routing_attention",
        "slot_attention",
        "topk_attention",
        "update_centroids",
    ],
    "models": [
        "Beams",
        "Decoder",
        "DecoderConfig",
        "Encoder",
        "EncoderConfig",
        "EncoderDecoder",
        "EncoderDecoderConfig",
        "Generated",
        "Layers",
        "Relative",
        "Sampling",
        "VisionConfig",
        "VisionTransformer",
        "beam_search",
        "generate",
        "pretrained",
        "sampling",
        "stream",
    ],
    "models.pretrained": ["load", "load_adapters", "save", "save_adapters"],
    "nn": [
        "AttentionPooling",
        "Block",
        "ClassToken",
        "Embeddings",
        "FeedForward",
        "Frozen",
        "KeysValues",
        "MultiHeadAttention",
        "OnePlusRMSNorm",
        "Residual",
        "attention_fn",
        "dot_product_attention",
        "low_rank",
        "low_rank_state",
        "merged",
        "moved_embeddings",
        "pooling",
        "record_weights",
        "with_low_rank",
    ],
    "positions": [
        "DynamicNTK",
        "Linear",
        "Llama3",
        "NTK",
        "Rotary",
        "Scaling",
        "YaRN",
        "alibi",
        "alibi_slopes",
        "frequencies",
        "learned",
        "relative_bias",
        "relative_embedding",
        "rotary",
        "sinusoidal",
        "transformer_xl",
    ],
    "scores": [
        "Score",
        "alibi",
        "alibi_slopes",
        "at_positions",
        "bias",
        "relative_bias",
        "relative_buckets",
        "relative_embedding",
        "score_fn",
        "softcap",
    ],
}


def module_name(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(path):
    """The full names of what a file imports: for ``from a import b`` that of ``b`` if a module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full.removeprefix("attention_jax.") in MODULES else node.module


def test_every_module_has_a_layer():
    assert set(RANK) == set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_a_file_imports_only_from_layers_above_its_own(module):
    for name in imported(MODULES[module]):
        top, _, rest = name.partition(".")
        assert top not in ("experiments", "tests", "conftest")
        if top == "attention_jax":
            assert rest in MODULES, f"{name} is not a module of ours"
            assert RANK[rest] < RANK[module], f"{module or 'the package'} imports {name}"


def test_every_folder_of_modules_is_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["setuptools"]["packages"]
    tops = [PACKAGE, ROOT / "experiments"]
    folders = {path.parent for top in tops for path in top.rglob("__init__.py")}
    assert sorted(packages) == sorted(str(f.relative_to(ROOT)).replace("/", ".") for f in folders)


def test_the_reference_is_numpy_and_the_standard_library():
    tops = {name.partition(".")[0] for name in imported(MODULES["reference"])}
    assert tops <= {"numpy", *sys.stdlib_module_names}


def test_importing_the_package_starts_no_backend():
    # The number of devices is fixed once a backend starts.
    code = (
        "import attention_jax, jax; jax.config.update('jax_num_cpu_devices', 3); "
        "assert jax.device_count('cpu') == 3"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names(module):
    found = importlib.import_module(f"attention_jax.{module}".rstrip("."))
    assert sorted(found.__all__) == sorted(PUBLIC[module])
    missing = [name for name in found.__all__ if not hasattr(found, name)]
    assert not missing


@pytest.mark.parametrize(
    ("module", "name"),
    [(m, n) for m, names in PUBLIC.items() for n in names if n not in PUBLIC],
)
def test_public_functions_have_docstrings_and_examples_that_run(module, name):
    thing = getattr(importlib.import_module(f"attention_jax.{module}".rstrip(".")), name)
    if inspect.ismodule(thing):
        assert thing.__doc__
        return
    if isinstance(thing, dict):  # a table of functions: of each of which the same holds
        assert all(inspect.getdoc(function) for function in thing.values())
        return
    doc = inspect.getdoc(thing)
    assert doc, f"{name} has no docstring"
    assert doc.splitlines()[0].endswith((".", ":"))
    if inspect.isfunction(thing):
        assert doctest.DocTestParser().get_examples(doc), f"{name} has no example"


def test_nothing_else_stands_at_the_top():
    listed = subprocess.run(
        ["git", "ls-files", "--cached"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git repository")
    tops = {line.split("/")[0] for line in listed.stdout.splitlines()}
    allowed = {"attention_jax", "experiments", "tests", "pyproject.toml"}
    allowed |= {"README.md", "LICENSE", "CHANGELOG.md"}
    assert {top for top in tops if not top.startswith(".")} <= allowed
