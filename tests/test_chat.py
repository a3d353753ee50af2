"""``python -m experiments chat``: conversations, templates and texts that come piece by piece."""

import functools
import io
import itertools
import json
import pathlib
import shlex
import signal
import subprocess
import sys

import numpy as np
import pytest
import tiny_llama
from helpers import slow

from attention_jax.models import generate, serving
from experiments.__main__ import main
from experiments.serving import chat, checkpoint
from experiments.serving.template import Template, load_template
from experiments.serving.text import TextStream

USER = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama.write(tmp_path_factory.mktemp("llama") / "tiny")


@functools.cache
def loaded(folder):
    return checkpoint.load_checkpoint(str(folder), checkpoint.LoadOptions())


def say(conversation, text, interrupted=lambda: False):
    notes = []
    pieces = list(conversation.ask(text, note=notes.append, interrupted=interrupted))
    return "".join(pieces), notes


# --- Templates.


def test_a_template_renders_messages(folder):
    text = load_template(folder)([{"role": "system", "content": "short"}, USER])
    assert text == "<|start|>system\nshort<|end|>\n<|start|>user\nhi<|end|>\n<|start|>assistant\n"


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, None),
        ({"chat_template": None}, None),
        ({"chat_template": "{{ bos_token }}", "bos_token": {"content": "<s>"}}, "<s>"),
        ({"chat_template": [{"name": "tools", "template": "x"}]}, None),
        ({"chat_template": [{"name": "default", "template": "x"}]}, "x"),
        ({"chat_template": "{% generation %}{{ messages[0]|tojson }}{% endgeneration %}"}, None),
    ],
)
def test_where_a_template_may_be(settings, text, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    found = load_template(tmp_path)
    if "generation" in str(settings):
        text = '{"role": "user", "content": "hi"}'
    assert (found if found is None else found([USER])) == text
    (tmp_path / "chat_template.jinja").write_text("from a file")
    assert load_template(tmp_path)([USER]) == "from a file"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no system message') }}",
        "{{ messages[9].content }}",
        "{{ messages.__class__.__mro__ }}",  # of the sandbox
        "{% for x in range(10**9) %}{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ messages + 1 }}",
    ],
)
def test_a_template_that_fails_raises(source):
    with pytest.raises(ValueError, match="the chat template refuses the messages"):
        Template(source)([USER])
    with pytest.raises(ValueError, match="the chat template is invalid"):
        Template("{% for %}")


# --- Text.


def pieces(folder, text, stop=(), prompt=""):
    tokenizer = loaded(folder).tokenizer
    stream = TextStream(tokenizer, tokenizer.backend.encode(prompt).ids, stop)
    found = [stream.add(token) for token in tokenizer.backend.encode(text).ids]
    return [*found, stream.finish()], stream


def test_characters_are_not_split(folder):
    found, _ = pieces(folder, "é€😀!")
    assert found == ["", "é", "", "", "€", "", "", "", "😀", "!", ""]


def test_bytes_that_are_no_character_do_not_stay_back(folder):
    tokenizer = loaded(folder).tokenizer
    stream = TextStream(tokenizer)
    half = tokenizer.backend.encode("😀").ids[:2]
    found = [stream.add(half[0]) for _ in range(20)]
    assert "".join(found).count("\ufffd") >= 10
    stream = TextStream(tokenizer)
    assert [stream.add(half[0]), stream.add(half[1]), stream.finish()] == ["", "", "\ufffd"]


def test_a_stop_string_ends_the_text_wherever_tokens_end(folder):
    found, stream = pieces(folder, "one\nUsed\nUser: two", stop=["\nUser:", "never"])
    assert "".join(found) == "one\nUsed"
    assert stream.stopped
    found, stream = pieces(folder, "one\nUs", stop=["\nUser:"])
    assert "".join(found) == "one\nUs"
    assert not stream.stopped


# --- Conversations.


def test_an_answer_is_that_of_generate(folder):
    options = chat.Options(temperature=0, max_new_tokens=20, system="be brief")
    conversation = chat.Chat(loaded(folder), options)
    text, notes = say(conversation, "hello")
    of = loaded(folder)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    prompt = np.array([of.conversation(messages)])
    made = generate(of.model, prompt, max_new_tokens=20, stop=of.end)
    tokens = made.tokens[0, : int(made.count[0])].tolist()
    assert text == of.tokenizer.decode(tokens).lstrip()
    assert notes == ([] if tokens[-1] in of.end else ["cut after --max-new-tokens"])
    assert conversation.messages == [*messages, {"role": "assistant", "content": text}]


def test_only_new_tokens_are_read(folder, monkeypatch):
    conversation = chat.Chat(loaded(folder), chat.Options(max_new_tokens=4, seed=1))
    read = []
    of_row = serving.Batch._read
    monkeypatch.setattr(
        serving.Batch,
        "_read",
        lambda self, row, count: (read.append(count), of_row(self, row, count)),
    )
    say(conversation, "a long message " * 10)
    first = sum(read)
    read.clear()
    say(conversation, "short")
    assert first > 150
    assert sum(read) < 80  # the new message, and what does not fill a page


def test_draws_depend_on_the_seed(folder):
    texts = [
        say(chat.Chat(loaded(folder), chat.Options(max_new_tokens=8, seed=seed)), "hi")[0]
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_ctrl_c_ends_the_answer_and_not_the_conversation(folder):
    conversation = chat.Chat(loaded(folder), chat.Options(max_new_tokens=100, seed=3))
    after = itertools.count()
    text, notes = say(conversation, "hi", interrupted=lambda: next(after) >= 5)
    assert notes == ["interrupted"]
    assert conversation.messages[-1] == {"role": "assistant", "content": text}
    assert conversation.batch.running == 0
    assert say(conversation, "again")[1] != ["interrupted"]


def test_the_first_ctrl_c_is_noted_and_the_second_raises():
    with chat._interrupts() as interrupted:
        assert not interrupted()
        signal.raise_signal(signal.SIGINT)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_conversation_that_outgrows_the_model_forgets_its_beginning(folder):
    options = chat.Options(max_new_tokens=10, context=160, seed=0, system="s")
    conversation = chat.Chat(loaded(folder), options)
    notes = [say(conversation, f"message {i} {'x' * 20}")[1] for i in range(4)]
    assert any("outgrown the 160 tokens" in x for x in itertools.chain(*notes))
    assert conversation.messages[0]["role"] == "system"
    assert "message 0" not in str(conversation.messages)
    before = list(conversation.messages)
    with pytest.raises(ValueError, match="the message has 2"):
        say(conversation, "x" * 200)
    assert conversation.messages == before


def test_an_answer_that_fills_the_context_says_so(folder):
    conversation = chat.Chat(loaded(folder), chat.Options(max_new_tokens=500, context=128, seed=0))
    assert "the conversation has no more room" in say(conversation, "hi")[1][0]


def test_without_a_template_it_is_a_transcript(tmp_path):
    of = loaded(tiny_llama.write(tmp_path, template=None))
    messages = [USER, {"role": "assistant", "content": "yes"}, USER]
    text = of.tokenizer.decode(of.conversation(messages))
    assert text == "User: hi\nAssistant: yes\nUser: hi\nAssistant:"
    assert of.stop == ("\nUser:",)


# --- The command.


@pytest.mark.parametrize("options", [[], slow(["--quantize", "int8"])])
def test_a_script_pipes_messages(folder, options, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n\nthere"))
    assert main(["chat", str(folder), "--max-new-tokens", "3", "--temperature", "0", *options]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") >= 2
    assert ">" not in out
    assert err == "(cut after --max-new-tokens)\n" * 2


def test_a_terminal_ends_with_ctrl_d(folder, monkeypatch, capsys):
    typed = iter(["hi", KeyboardInterrupt(), EOFError()])

    def read(prompt):
        x = next(typed)
        if isinstance(x, BaseException):
            raise x
        return x

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(
        sys, "stdin", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})()
    )
    assert main(["chat", str(folder), "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.count(chat.HELLO) == 2


def test_the_example_of_the_readme_runs(folder, monkeypatch, capsys):
    readme = (pathlib.Path(chat.__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    command = next(x for x in readme.splitlines() if x.startswith("python -m experiments chat"))
    name, _, *options = shlex.split(command)[3:]
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi"))
    assert main([name, str(folder), *options]) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("chat", "chat needs the folder of a checkpoint, or org/name"),
        ("chat --seed 1", "chat needs the folder of a checkpoint"),
        ("chat nowhere", "folder must be that of a checkpoint, got 'nowhere'"),
        ("chat {} --sed 1", "did you mean --seed?"),
        ("chat {} --temperature -1", "temperature must be positive"),
        ("chat {} --temperature 0 --top-k 3", "top_k needs a temperature above 0"),
        ("chat {} --context 0", "context must be at least 1"),
        ("chat {} --max-new-tokens 0", "max_new_tokens must be at least 1"),
        ("chat {} --dtype float8", "--dtype must be one of float32, bfloat16, float16"),
        ("serve", "serve needs the folder of a checkpoint"),
        ("serve {} --port 70000", "port must be from 0 to 65535"),
        ("serve {} --rows 0", "rows must be at least 1"),
        ("serve {} --max-prompt 4000", "max_prompt must be from 1 to context - 1"),
        ("serve {} --host 203.0.113.1", "cannot listen on 203.0.113.1, port 8000"),
    ],
)
def test_mistakes_are_one_line(arguments, message, folder, capsys):
    assert main(arguments.format(folder).split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_a_checkpoint_of_another_kind_is_refused(tmp_path, capsys):
    import tiny_bert

    folder = tiny_bert.write(tmp_path)
    assert main(["chat", str(folder)]) == 2
    assert "must be a decoder, such as a GPT-2, got Encoder" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["jinja2", slow("starlette")])
def test_a_missing_extra_is_one_line(module, folder):
    code = f"""if True:
        import sys
        sys.modules[{module!r}] = None
        from experiments.__main__ import main
        sys.exit(main(["serve", {str(folder)!r}]))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert line.endswith('python -m pip install -e ".[serve]"')
