"""Chat templates as they are published, and for each its answers written out by hand.

`parts` of a template: the text of a conversation, cut into (text, is an answer).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Messages = list[dict[str, str]]
Parts = list[tuple[str, bool]]

QWEN = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception("
    "'Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    + ALTERNATE
    + "{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token}}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}" + ALTERNATE + "{% if (message['role'] == 'assistant') %}"
    "{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
MARKED = """{% for message in messages %}
    {% if message.role == 'assistant' %}
{{ '<|im_start|>assistant\\n' }}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}

    {% else %}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def qwen(messages: Messages) -> Parts:
    parts = list[tuple[str, bool]]()
    if messages[0]["role"] != "system":
        parts.append(("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n", False))
    for message in messages:
        parts.append((f"<|im_start|>{message['role']}\n", False))
        parts.append((f"{message['content']}<|im_end|>\n", message["role"] == "assistant"))
    return parts


def llama_3(messages: Messages) -> Parts:
    parts = [("<s>", False)]
    for message in messages:
        parts.append((f"<|start_header_id|>{message['role']}<|end_header_id|>\n\n", False))
        parts.append((f"{message['content'].strip()}<|eot_id|>", message["role"] == "assistant"))
    return parts


def mistral(messages: Messages) -> Parts:
    parts = [("<s>", False)]
    for message in messages:
        is_answer = message["role"] == "assistant"
        text = f"{message['content']}</s>" if is_answer else f"[INST] {message['content']} [/INST]"
        parts.append((text, is_answer))
    return parts


def gemma(messages: Messages) -> Parts:
    parts = [("<s>", False)]
    for message in messages:
        is_answer = message["role"] == "assistant"
        parts.append((f"<start_of_turn>{'model' if is_answer else message['role']}\n", False))
        parts.append((f"{message['content'].strip()}<end_of_turn>\n", is_answer))
    return parts


def marked(messages: Messages) -> Parts:
    parts = list[tuple[str, bool]]()
    for message in messages:
        is_answer = message["role"] == "assistant"
        parts.append((f"<|im_start|>{message['role']}\n", False))
        parts.append((f"{message['content']}<|im_end|>", is_answer))
        parts.append(("\n", False))
    return parts


@dataclass(frozen=True)
class Published:
    """A template, and how it writes a conversation."""

    source: str
    parts: Callable[[Messages], Parts]


TEMPLATES = {
    "qwen": Published(QWEN, qwen),
    "llama-3": Published(LLAMA_3, llama_3),
    "mistral": Published(MISTRAL, mistral),
    "gemma": Published(GEMMA, gemma),
    "marked": Published(MARKED, marked),
}
SPECIAL = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
]
