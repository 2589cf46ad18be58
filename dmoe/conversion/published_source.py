"""A published directory as a model of dmoe's own: Mixtral, Qwen3-MoE, Llama, Mistral, Qwen3.

Every tensor of the files must have a place in the model, and every parameter a tensor: what is
left over is refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from dmoe.config.errors import CheckpointError, ConfigError
from dmoe.config.plugins import get, put
from dmoe.config.schema import Config
from dmoe.conversion.own_config import PublishedModel, read_published
from dmoe.conversion.own_names import pieces
from dmoe.data import open_tokenizer
from dmoe.hf.published import PublishedDirectory, read_json
from dmoe.models.transformer import Transformer

DERIVED = ("rotary_emb.inv_freq",)
"""Endings of tensors that old files hold and the config gives."""
TIED = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
VOCABULARY = (EMBEDDING, TIED)
"""Tensors with a row per token."""


@dataclass(frozen=True)
class PublishedSource:
    """A published directory whose model dmoe's transformer is."""

    files: PublishedDirectory
    model: PublishedModel
    argument: str
    """Name of the argument that errors name."""

    def config(self, given: Config, free: tuple[str, ...] = ()) -> Config:
        """Return the config with what the directory decides, tokenizer included.

        Args:
            given: the user's: a value that differs from the default must be that of the directory.
            free: fields that are the user's.

        Raises:
            ConfigError: a field of the user's that contradicts the directory.
        """
        folder, config, default = self.files.folder, given, Config()
        for field, value in self.model.fields.items():
            mine = get(given, field)
            if field in free or mine == value:
                continue
            if mine != get(default, field):
                allowed = f"{folder} has {value}"
                raise ConfigError(field, mine, allowed, "leave it out, or use that")
            config = put(config, field, value)
        tokenizer = folder / "tokenizer.json"
        if given.data.tokenizer == default.data.tokenizer and self.model.vocab_size != 256:
            if not tokenizer.is_file():
                fix = "name the tokenizer of this model"
                allowed = f"has 256 tokens, the model {self.model.vocab_size}, and {folder} none"
                raise ConfigError("data.tokenizer", given.data.tokenizer, allowed, fix)
            config = put(config, "data.tokenizer", str(tokenizer.absolute()))
        return config

    def load(self, config: Config) -> tuple[Transformer, list[str]]:
        """Return the model in float32 with the weights of the files, and what a user should know.

        Args:
            config: with the fields of the directory.

        Raises:
            ConfigError: the tokenizer has more tokens than the model.
            CheckpointError: a tensor is missing, left over or of another shape.
        """
        notes, rows = [], open_tokenizer(config.data).vocab_size
        if rows > self.model.vocab_size:
            allowed = f"has {rows} tokens with its separator, the model {self.model.vocab_size}"
            fix = "use the tokenizer of this model"
            raise ConfigError("data.tokenizer", config.data.tokenizer, allowed, fix)
        if rows < self.model.vocab_size:
            notes.append(
                f"{self.model.vocab_size - rows} rows of the embedding that no token of the "
                "tokenizer has are left out"
            )
        with torch.device("meta"):
            model = Transformer(config.model, config.moe, rows)
        model.to_empty(device="cpu")
        model.initialize(config.train.seed)  # buffers too
        self._fill(model, rows)
        return model, notes

    @torch.no_grad()
    def _fill(self, model: Transformer, rows: int) -> None:
        folder, facts = self.files.folder, self.files.tensors
        parameters, used = dict(model.named_parameters()), set[str]()
        for piece in pieces(model, self.model.family):
            if piece.name not in facts:
                raise CheckpointError(f"{folder}: {piece.name!r} is missing")
            value, into = self.files.read(piece.name), piece.view(parameters[piece.parameter])
            if piece.name in VOCABULARY:
                value = value[:rows]
            if value.shape != into.shape:
                shapes = f"{list(value.shape)}, not {list(into.shape)}"
                raise CheckpointError(f"{folder}: {piece.name!r} has shape {shapes}")
            into.copy_(value)
            used.add(piece.name)
        for name in sorted(facts.keys() - used):
            if name == TIED and torch.equal(self.files.read(name), self.files.read(EMBEDDING)):
                continue  # written although it is tied
            if not name.endswith(DERIVED):
                raise CheckpointError(
                    f"{folder}: {name!r} has no place in dmoe's transformer, so the model would be "
                    "another one"
                )


def open_published(folder: str | Path, argument: str = "DIR") -> PublishedSource:
    """Open a published directory.

    Args:
        folder: with config.json and safetensors files.
        argument: what errors name.

    Raises:
        ConfigError: no such directory, or not a model that dmoe's transformer is.
        CheckpointError: a file is missing or damaged.
    """
    path = Path(folder).expanduser()
    if not (path / "config.json").is_file():
        allowed = "is no directory of a published model (it has no config.json)"
        raise ConfigError(argument, folder, allowed, "give one, e.g. of save_pretrained")
    model = read_published(read_json(path / "config.json"), argument, folder)
    if not any(path.glob("*.safetensors")):
        fix = "convert it: model.save_pretrained(DIR, safe_serialization=True)"
        raise ConfigError(argument, folder, "holds no *.safetensors", fix)
    return PublishedSource(PublishedDirectory(path), model, argument)
