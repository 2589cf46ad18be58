"""Process that encodes parts: `python -m dmoe.data.prepare.worker`, started by `workers.py`.

Reads from stdin, and writes to the descriptor that the first argument names, messages of the form:

    8 bytes, the length | JSON        and, for a part, the bytes of its pieces, one after the other

A new process per worker, not a fork, and JSON, not pickle. It ends when stdin does, so it never
survives its parent by more than the part that it is at.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

from dmoe.config.errors import ConfigError
from dmoe.config.plugin_loader import load_plugins
from dmoe.config.schema import Config, DataConfig
from dmoe.data.prepare.part_file import encode_part, write_file
from dmoe.data.prepare.parts import Part, Piece
from dmoe.data.tokenizers import Tokenizer, open_tokenizer


def part_path(directory: Path, number: int) -> Path:
    """Return the path of a part file."""
    return directory / f"{number:07d}.part"


def write_message(stream: BinaryIO, body: Any, payload: tuple[bytes, ...] = ()) -> None:
    """Write one message."""
    text = json.dumps(body).encode()
    stream.write(b"".join([len(text).to_bytes(8, "little"), text, *payload]))
    stream.flush()


def read_message(stream: BinaryIO) -> Any:
    """Read one message without its payload; None at the end of the stream."""
    head = stream.read(8)
    if len(head) < 8:
        return None
    text = stream.read(int.from_bytes(head, "little"))
    return json.loads(text) if text else None


def send_part(stream: BinaryIO, part: Part) -> None:
    """Write a part as one message."""
    described = [
        [p.split, p.document, p.domain, p.opens, p.closes, p.is_tokens, len(p.data)]
        for p in part.pieces
    ]
    body = {"number": part.number, "digest": part.digest, "pieces": described}
    write_message(stream, body, tuple(piece.data for piece in part.pieces))


def encode_to_file(
    pieces: list[Piece], number: int, digest: str, tokenizer: Tokenizer, directory: Path
) -> dict[str, Any]:
    """Encode a part into its file; return the answer of a worker: done, or what is wrong."""
    try:
        write_file(part_path(directory, number), encode_part(pieces, number, digest, tokenizer))
    except ConfigError as error:
        return {"error": [error.field, str(error.value), error.allowed, error.fix]}
    except OSError as error:
        return {"os_error": [error.errno, error.strerror]}
    return {"done": number}


def main() -> None:
    """Serve one parent until it closes stdin."""
    # Ctrl-C reaches the whole group; the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    source = sys.stdin.buffer
    # Without a buffer, which would be written once more at the end, to a parent that is gone.
    with suppress(BrokenPipeError), os.fdopen(int(sys.argv[1]), "wb", buffering=0) as answers:
        setup = read_message(source)
        if setup is None:
            return
        config = load_plugins(Config(data=DataConfig(**setup["data"]))).data
        tokenizer, directory = open_tokenizer(config), Path(setup["directory"])
        while (body := read_message(source)) is not None:
            pieces = [_read_piece(source, described) for described in body["pieces"]]
            if pieces and len(pieces[-1].data) < body["pieces"][-1][-1]:
                return  # the parent was killed while it sent
            answer = encode_to_file(pieces, body["number"], body["digest"], tokenizer, directory)
            write_message(answers, answer)


def _read_piece(stream: BinaryIO, described: list[Any]) -> Piece:
    split, document, domain, opens, closes, is_tokens, size = described
    return Piece(split, document, domain, opens, closes, is_tokens, stream.read(size))


def setup_message(config: DataConfig, directory: Path) -> dict[str, Any]:
    """Return the first message to a worker."""
    return {"data": asdict(config), "directory": str(directory)}


if __name__ == "__main__":
    main()
