"""Command `dmoe generate`."""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from dmoe.cli.common import TrustCode, integer, number
from dmoe.cli.continuation import Continuer, Message
from dmoe.config.errors import ConfigError
from dmoe.config.yaml_guard import short
from dmoe.observability import escape_controls
from dmoe.runs.directory import find_run


def command(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run directory, e.g. runs/latest.")],
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Text to continue; may be empty. Given several times, all of them."),
    ] = None,
    prompts_file: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Prompts to continue, one per line, or JSON per line."),
    ] = None,
    tokens: Annotated[
        int,
        typer.Option(
            help="Maximum number of new tokens; stops earlier at the end of a document.",
            **integer(),
        ),
    ] = 200,
    temperature: Annotated[
        float,
        typer.Option(
            help="0 takes the most likely token, 1 samples from the model's distribution.",
            **number(),
        ),
    ] = 0.8,
    top_k: Annotated[
        int | None, typer.Option(help="Sample from the k most likely tokens.", **integer())
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Sample from the fewest tokens whose probabilities sum to this.", **number()
        ),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="Text that ends a continuation, and is no part of it; may be repeated."),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="Prompts are messages of a user, written by the chat template. Without any, the "
            "lines of stdin are the turns of a conversation.",
        ),
    ] = False,
    chat_template: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Template of --chat: chatml or a file. Default: the tokenizer's."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.", **integer())] = 0,
    batch: Annotated[
        int, typer.Option(help="Prompts that are continued at the same time.", **integer(1))
    ] = 16,
    step: Annotated[
        int | None,
        typer.Option(
            help="The checkpoint of this step. Default: the newest intact one.", **integer()
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON per prompt.")
    ] = False,
    trust_code: TrustCode = False,
) -> None:
    """Continue texts with a trained model, in one process with all experts.

    The text of one prompt is printed as it is generated, those of several below one another.

    Example: dmoe generate runs/latest --prompt "def main(" --tokens 100 --temperature 0.7
    """
    _check_options(tokens, temperature, top_k, top_p, seed, step)
    stops = stop or []
    if "" in stops:
        raise ConfigError("--stop", "", "must not be empty", "leave it out")
    if chat_template is not None and not chat:
        raise ConfigError("--chat-template", chat_template, "needs --chat", "add --chat")
    prompts = read_prompts(prompt or [], prompts_file)
    if not prompts and (not chat or as_json):
        fix = "use --prompt TEXT (may be empty) or --prompts-file FILE"
        raise ConfigError("--prompt", None, "must be given, or a file with prompts", fix)

    directory = find_run(run)

    from dmoe.models.next_logits import uncached_reason
    from dmoe.train.restore import restore_model

    restored = restore_model(directory, step, trust_code=trust_code)
    if restored.config.train.task != "language_modelling":
        raise ConfigError(
            "RUN",
            directory.path,
            "must be the run of a language model",
            "name another",
        )
    continuer = Continuer(
        restored, stops, tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    ask = continuer.use_chat(chat_template) if chat else None
    if ask is None and restored.config.data.format == "instruct":
        print(
            "note: the model was trained on conversations, and none begins with a bare prompt: "
            "--chat writes it as a message of the user",
            file=sys.stderr,
        )
    if reason := uncached_reason(restored.model):
        print(
            f"note: no key-value cache, so each token takes as long as its context: {reason}",
            file=sys.stderr,
        )
    if ask is not None and not prompts:
        _converse(continuer, ask)
        return
    is_live = len(prompts) == 1 and not as_json
    for first in range(0, len(prompts), batch):
        part = prompts[first : first + batch]
        encoded = [
            continuer.encode(text) if ask is None else ask([{"role": "user", "content": text}])
            for text in part
        ]
        heads = [continuer.shown_prompt(ids) if ask is None else "" for ids in encoded]
        if is_live:
            show(heads[0])
        found = continuer.run(encoded, first, show if is_live else None)
        for index, (text, head, new) in enumerate(zip(part, heads, found, strict=True), first + 1):
            if as_json:
                print(json.dumps({"prompt": text, **asdict(new)}), flush=True)
                continue
            if not is_live:
                print(f"--- prompt {index} of {len(prompts)}")
                show(head + new.text)
            print(flush=True)


def _converse(continuer: Continuer, ask: Callable[[Sequence[Message]], list[int]]) -> None:
    """Answer the lines of stdin as the turns of one conversation, until its end."""
    messages: list[Message] = []
    for turn in itertools.count():
        if sys.stdin.isatty():
            show("> ")
        line = sys.stdin.readline()
        if not line:
            return
        messages.append({"role": "user", "content": line.rstrip("\n")})
        (answer,) = continuer.run([ask(messages)], turn, show)
        print(flush=True)
        messages.append({"role": "assistant", "content": answer.text})


def show(text: str) -> None:
    """Write a part of a text at once; to a terminal, with control characters escaped.

    A pipe or a file gets what the model wrote.
    """
    sys.stdout.write(escape_controls(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def read_prompts(given: list[str], path: str | None) -> list[str]:
    """Return the prompts of the command line and of a file.

    A line that begins with `{` or `"` is JSON: an object with `prompt`, or a string. So a prompt
    may hold line breaks. Empty lines are left out.

    Raises:
        ConfigError: the file cannot be read.
    """
    prompts = list(given)
    if path is not None:
        try:
            lines = Path(path).read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            allowed = f"cannot be read ({reason})"
            raise ConfigError("--prompts-file", path, allowed, "check the path") from None
        prompts += [
            _prompt_of_line(line, f"{path}:{place}")
            for place, line in enumerate(lines, 1)
            if line.strip()
        ]
    return prompts


def _prompt_of_line(line: str, place: str) -> str:
    if line.lstrip()[0] not in '{"':
        return line
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        allowed = f"line begins like JSON ({place}) and is no string and no object with prompt"
        fix = 'write {"prompt": "..."} or a plain line'
        raise ConfigError("--prompts-file", short(line), allowed, fix)
    return prompt


def _check_options(
    tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    step: int | None,
) -> None:
    if tokens < 1:
        raise ConfigError("--tokens", tokens, "must be 1 or more", "use 200")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ConfigError(
            "--temperature",
            temperature,
            "must be a finite number, 0 or more",
            "use 0.8, or 0 for the most likely text",
        )
    if top_k is not None and top_k < 1:
        raise ConfigError(
            "--top-k", top_k, "must be 1 or more", "leave it out to sample from all tokens"
        )
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(
            "--top-p",
            top_p,
            "must be greater than 0 and at most 1",
            "leave it out to sample from all tokens",
        )
    if seed < 0:
        raise ConfigError("--seed", seed, "must not be negative", "use 0")
    if step is not None and step < 0:
        raise ConfigError(
            "--step", step, "must not be negative", "leave it out for the newest checkpoint"
        )
