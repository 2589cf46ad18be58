"""Continue prompts with a restored model: tokens in, text out, alone or in a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from dmoe.cli.text_stream import TextStream

if TYPE_CHECKING:
    from dmoe.train.restore import RestoredModel

Message = dict[str, str]


@dataclass(frozen=True)
class Continuation:
    """What a model has written after one prompt."""

    text: str
    tokens: int
    ended_by: str
    """`tokens`, `end of document`, `end of turn`, or the stop string."""


class Continuer:
    """A language model with its tokenizer, and the options of a draw.

    Args:
        restored: the model.
        stop: strings that end a text.
        options: `temperature`, `top_k`, `top_p` and `seed` of `generate_batch`.
    """

    def __init__(
        self, restored: RestoredModel, stop: Sequence[str], max_tokens: int, **options: Any
    ) -> None:
        from dmoe.data import open_tokenizer

        self.restored, self.max_tokens, self.options = restored, max_tokens, options
        self.tokenizer = open_tokenizer(restored.config.data)
        self.stop = list(stop)
        self.turn_end: int | None = None
        """Token that ends an answer of a chat."""

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a prompt; of an empty one, the separator of documents."""
        ids: list[int] = self.tokenizer.encode(text.encode("utf-8", "surrogateescape")).tolist()
        return ids or [self.tokenizer.separator]

    def use_chat(self, template: str | None) -> Callable[[Sequence[Message]], list[int]]:
        """End texts where an answer ends; return the function from messages to a prompt.

        Args:
            template: `chatml` or a file; None: that of the run or of the tokenizer.

        Raises:
            ConfigError: on data.chat_template: there is none, or it cannot be read.
        """
        from dmoe.data.instruct.chat_template import open_chat_template
        from dmoe.data.instruct.encode import encode_text, prompt_ids, special_tokens
        from dmoe.data.instruct.generation_tag import END, START

        config = self.restored.config.data
        if template is not None:
            config = replace(config, chat_template=template)
        found = open_chat_template(config)
        example = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
        text = found.render(example, "an example").replace(START, "").replace(END, "")
        closing, special = text.rpartition("A")[2], special_tokens(self.tokenizer)
        ids = encode_text(closing.strip(), self.tokenizer, special).tolist()
        if ids and ids[0] in {token.id for token in special.values()}:
            self.turn_end = ids[0]
        elif closing.strip():
            self.stop.append(closing.strip())
        return lambda messages: prompt_ids(list(messages), found, self.tokenizer)

    def run(
        self,
        prompts: Sequence[list[int]],
        first: int = 0,
        write: Callable[[str], None] | None = None,
    ) -> list[Continuation]:
        """Continue a batch of prompts.

        Args:
            prompts: token ids.
            first: index of the first one among all prompts of the command.
            write: receives the parts of the text of a lone prompt as they come.
        """
        from dmoe.models.generate import generate_batch
        from dmoe.models.transformer import Transformer

        assert isinstance(self.restored.model, Transformer)
        streams = [TextStream(self.tokenizer.decode, ids, self.stop, write) for ids in prompts]
        ends = {self.tokenizer.separator: "end of document"}
        if self.turn_end is not None:
            ends[self.turn_end] = "end of turn"
        with self.restored.autocast():
            new = generate_batch(
                self.restored.model,
                prompts,
                self.max_tokens,
                window=self.restored.config.data.seq_len,
                stop=list(ends),
                first=first,
                on_token=partial(_add_token, streams),
                **self.options,
            )
        found = []
        for stream, ids in zip(streams, new, strict=True):
            text = stream.end()
            ended = "tokens" if len(ids) == self.max_tokens else " or ".join(ends.values())
            found.append(Continuation(text, len(ids), stream.stopped_by or ended))
        return found

    def shown_prompt(self, ids: list[int]) -> str:
        """Return the text of a prompt, without a last character that it only begins."""
        return self.tokenizer.decode(ids)[: TextStream(self.tokenizer.decode, ids).start]


def _add_token(streams: Sequence[TextStream], index: int, token: int) -> bool:
    return streams[index].add(token)
