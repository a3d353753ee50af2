"""Chat templates: messages as the text that a model was trained on."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from attention_jax.models.pretrained import folders
from attention_jax.models.pretrained.tokenizer import SETTINGS

FILE = "chat_template.jinja"
Message = Mapping[str, str]  # role and content


class Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks answers, for training: here nothing but its content counts."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Template:
    """A chat template in Jinja, as in ``tokenizer_config.json``.

    >>> from experiments.serving.template import Template
    >>> template = Template("{% for x in messages %}<{{ x.role }}>{{ x.content }}{% endfor %}<bot>")
    >>> template([{"role": "user", "content": "hi"}])
    '<user>hi<bot>'
    """

    def __init__(self, source: str, special: Mapping[str, str] | None = None) -> None:
        """Compiles a template.

        Args:
          source: in Jinja. It is run in a sandbox, since it comes with the checkpoint.
          special: the tokens that it may name, such as ``eos_token``.
        """
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template is invalid: {error}") from error
        self._special = dict(special or {})

    def __call__(self, messages: Sequence[Message]) -> str:
        """The conversation as a text, up to where the next answer begins.

        Raises:
          ValueError: the template refuses the messages, since it knows no system message for
            example.
        """
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=True, **self._special
            )
        except (jinja2.TemplateError, TypeError, ArithmeticError, LookupError) as error:
            raise ValueError(f"the chat template refuses the messages: {error}") from error


def load_template(folder: Path) -> Template | None:
    """The template of a checkpoint, None if it has none.

    Raises:
      ValueError: an invalid one.
    """
    settings = folders.read_json(folder / SETTINGS) if (folder / SETTINGS).exists() else {}
    source: Any = settings.get("chat_template")
    if (folder / FILE).exists():
        source = (folder / FILE).read_text(encoding="utf-8")
    if isinstance(source, list):  # several templates by name
        named = {x.get("name"): x.get("template") for x in source if isinstance(x, dict)}
        source = named.get("default")
    if source is None:
        return None
    if not isinstance(source, str):
        raise ValueError(f"{folder / SETTINGS}: chat_template must be a text, got {source!r}")
    return Template(source, special_tokens(settings))


def special_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that ``tokenizer_config.json`` names, ``eos_token`` for example."""
    found = {}
    for name, x in settings.items():
        content = x.get("content") if isinstance(x, dict) else x
        if name.endswith("_token") and isinstance(content, str):
            found[name] = content
    return found


def _to_json(x: Any, indent: int | None = None) -> str:
    return json.dumps(x, ensure_ascii=False, indent=indent)  # Jinja's own escapes HTML


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
