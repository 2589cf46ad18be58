"""Chat templates: how a conversation is written as text (Jinja2, as transformers renders them).

The template is that of the tokenizer (`chat_template.jinja`, or `chat_template` of
`tokenizer_config.json`, beside `tokenizer.json`), a file, or `chatml`. It runs in a sandbox that
reaches no file and changes no argument, and gets `messages`, `add_generation_prompt`, the special
tokens of `tokenizer_config.json`, and `raise_exception`. It gets no date (`strftime_now`): the same
data are the same text on every day.

A template may mark the answers, `{% generation %} ... {% endgeneration %}`. Few do, so there is
another way in `encode.py`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dmoe.config.errors import ConfigError
from dmoe.config.schema import DataConfig
from dmoe.data.instruct.conversations import Message
from dmoe.data.instruct.generation_tag import GenerationTag

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
BUILT_IN = {"chatml": CHATML}
_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")


@dataclass(frozen=True)
class ChatTemplate:
    """A template and the special tokens that it names."""

    name: str
    """For messages: the file, or the built-in name."""
    source: str
    tokens: Mapping[str, str] = field(default_factory=dict)
    """`bos_token` and so on."""

    @property
    def marks_answers(self) -> bool:
        return _MARK.search(self.source) is not None

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything that determines the text."""
        content = json.dumps([self.source, dict(self.tokens)], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def render(
        self, messages: Sequence[Message], place: str, *, add_generation_prompt: bool = False
    ) -> str:
        """Write a conversation as text, with START and END around each marked answer.

        Args:
            messages: the conversation.
            place: where it is from, for messages.
            add_generation_prompt: end with what comes before an answer.

        Raises:
            ConfigError: on data.chat_template: the template refuses the conversation, or is wrong.
        """
        try:
            text: str = self._template().render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self.tokens,
            )
        except (
            TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RecursionError,
        ) as error:
            allowed = f"cannot write {place} ({error})"
            fix = "repair or remove it, or use another template"
            raise ConfigError("data.chat_template", self.name, allowed, fix) from error
        return text

    def _template(self) -> Any:
        if "compiled" not in self.__dict__:
            self.__dict__["compiled"] = _compile(self.source)
        return self.__dict__["compiled"]


def _compile(source: str) -> Any:
    """Compile a template in the sandbox that transformers uses."""

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(source)


def open_chat_template(config: DataConfig) -> ChatTemplate:
    """Open the template that `data.chat_template` names, by default that of the tokenizer.

    Raises:
        ConfigError: on data.chat_template: none is found, or it cannot be read.
    """
    name = config.chat_template
    settings = _tokenizer_config(config.tokenizer)
    tokens = {key: _content(settings[key]) for key in _SPECIAL if settings.get(key) is not None}
    if name in BUILT_IN:
        return ChatTemplate(name, BUILT_IN[name], tokens)
    if name is not None:
        try:
            return ChatTemplate(name, Path(name).expanduser().read_text("utf-8"), tokens)
        except (OSError, ValueError) as error:
            allowed = f"must be {' or '.join(BUILT_IN)} or a file that can be read ({error})"
            raise ConfigError("data.chat_template", name, allowed, "check the path") from error
    beside = Path(config.tokenizer).expanduser().with_name("chat_template.jinja")
    if config.tokenizer.endswith(".json") and beside.is_file():
        return ChatTemplate(str(beside), beside.read_text("utf-8"), tokens)
    source = settings.get("chat_template")
    if isinstance(source, list):
        named = {part["name"]: part["template"] for part in source}
        source = named.get("default")
    if isinstance(source, str):
        return ChatTemplate("that of the tokenizer", source, tokens)
    allowed = f"must be given, because data.tokenizer={config.tokenizer} has no chat template"
    raise ConfigError("data.chat_template", None, allowed, "use chatml, or the path of a template")


def _tokenizer_config(tokenizer: str) -> dict[str, Any]:
    path = Path(tokenizer).expanduser().with_name("tokenizer_config.json")
    if not tokenizer.endswith(".json") or not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        allowed = f"has a {path} beside it that is no JSON ({error})"
        raise ConfigError("data.tokenizer", tokenizer, allowed, "repair it") from error
    return found if isinstance(found, dict) else {}


def _content(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)
