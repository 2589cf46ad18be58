"""Command `dmoe generate`."""

from __future__ import annotations

import math
import sys
from typing import Annotated

import typer

from dmoe.cli.common import TrustCode, integer, number
from dmoe.config.errors import ConfigError
from dmoe.observability import escape_controls
from dmoe.runs.directory import find_run


def command(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run directory, e.g. runs/latest.")],
    prompt: Annotated[str, typer.Option(help="Text to continue; may be empty.")],
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
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.", **integer())] = 0,
    step: Annotated[
        int | None,
        typer.Option(
            help="The checkpoint of this step. Default: the newest intact one.", **integer()
        ),
    ] = None,
    trust_code: TrustCode = False,
) -> None:
    """Continue a text with a trained model, in one process with all experts.

    A model that was trained on conversations answers it as the message of a user.

    Example: dmoe generate runs/latest --prompt "def main(" --tokens 100 --temperature 0.7
    """
    _check_options(tokens, temperature, top_k, top_p, seed, step)

    directory = find_run(run)

    from dmoe.data import open_tokenizer
    from dmoe.models.generate import generate
    from dmoe.models.transformer import Transformer
    from dmoe.train.restore import restore_model

    restored = restore_model(directory, step, trust_code=trust_code)
    if restored.config.train.task != "language_modelling":
        raise ConfigError(
            "RUN",
            directory.path,
            "must be the run of a language model",
            "name another",
        )
    assert isinstance(restored.model, Transformer)
    tokenizer = open_tokenizer(restored.config.data)
    ids = tokenizer.encode(prompt.encode("utf-8", "surrogateescape")).tolist()
    stop = [tokenizer.separator]
    if restored.config.data.format == "instruct":
        from dmoe.data.instruct import end_ids, open_chat_template, prompt_ids

        # The model has only answered messages: without the template it reads something else.
        template = open_chat_template(restored.config.data)
        ids = prompt_ids([{"role": "user", "content": prompt}], template, tokenizer)
        stop += end_ids(template, tokenizer)
    with restored.autocast():
        new = generate(
            restored.model,
            ids or [tokenizer.separator],
            tokens,
            window=restored.config.data.seq_len,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop=stop,
        )
    text = tokenizer.decode([*ids, *new])
    # a pipe or a file gets what the model wrote
    print(escape_controls(text) if sys.stdout.isatty() else text)


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
