"""Instruction data: conversations become sequences whose loss is on the answers alone.

conversations.py  the rows of files with `messages`, or `prompt` and `completion`
chat_template.py  the template that writes a conversation as text, as transformers does
encode.py         text -> tokens, and which of them are an answer
pack.py           conversations -> sequences, with padding at their ends
open.py           both splits of data.format=instruct
"""

from __future__ import annotations

from dmoe.data.instruct.chat_template import ChatTemplate, open_chat_template
from dmoe.data.instruct.encode import prompt_ids
from dmoe.data.instruct.open import read_instruct

__all__ = ["ChatTemplate", "open_chat_template", "prompt_ids", "read_instruct"]
