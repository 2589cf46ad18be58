"""Worker processes: each gets a part when it has none.

A worker that dies (killed, out of memory) or cannot write ends the preparation with one sentence;
parts that are complete stay.
"""

from __future__ import annotations

import errno
import os
import select
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from dmoe.config.errors import ConfigError
from dmoe.config.schema import DataConfig
from dmoe.data.prepare.parts import Part
from dmoe.data.prepare.worker import (
    encode_to_file,
    read_message,
    send_part,
    setup_message,
    write_message,
)
from dmoe.data.tokenizers import Tokenizer

_START = "from dmoe.data.prepare.worker import main; main()"
CONTINUE = "run the same command again: the parts that are complete are kept"


class Encoder(Protocol):
    """Encodes parts, in any order."""

    def submit(self, part: Part) -> None:
        """Encode a part, at once or in a process; return when there is room for another one."""

    def finish(self) -> None:
        """Wait until all parts are encoded."""

    def close(self) -> None:
        """End the processes."""


class InProcess:
    """Encodes in this process."""

    def __init__(self, tokenizer: Tokenizer, directory: Path) -> None:
        self._tokenizer, self._directory = tokenizer, directory

    def submit(self, part: Part) -> None:
        """Encode a part. Raises ConfigError if it cannot be written."""
        answer = encode_to_file(
            part.pieces, part.number, part.digest, self._tokenizer, self._directory
        )
        check_answer(answer, self._directory)

    def finish(self) -> None:
        """Nothing is pending."""

    def close(self) -> None:
        """Nothing is open."""


@dataclass(eq=False)
class _Worker:
    process: subprocess.Popen[bytes]
    answers: BinaryIO
    is_busy: bool = False

    def fileno(self) -> int:
        return self.answers.fileno()


class WorkerPool:
    """Encodes in `count` processes."""

    def __init__(self, config: DataConfig, directory: Path, count: int) -> None:
        """Start the workers, which open the tokenizer meanwhile."""
        self._directory = directory
        self._setup = setup_message(config, directory)
        self._workers: list[_Worker] = []
        try:
            for _ in range(count):
                self._workers.append(self._start())
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> Sequence[int]:
        """Process ids of the workers."""
        return [worker.process.pid for worker in self._workers]

    def submit(self, part: Part) -> None:
        """Send a part to the first idle worker. Raises ConfigError if a worker failed."""
        while (worker := self._idle()) is None:
            self._receive()
        try:
            send_part(self._stdin(worker), part)
        except OSError:
            raise self._died(worker) from None
        worker.is_busy = True

    def finish(self) -> None:
        """Wait for all workers. Raises ConfigError if one failed."""
        while any(worker.is_busy for worker in self._workers):
            self._receive()

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.process.kill()
            with suppress(OSError):
                self._stdin(worker).close()
            worker.answers.close()
            worker.process.wait()
        self._workers = []

    def _start(self) -> _Worker:
        read, write = os.pipe()
        try:
            process = subprocess.Popen(
                [sys.executable, "-c", _START, str(write)],
                stdin=subprocess.PIPE,
                stdout=2,  # what a tokenizer prints is no answer
                pass_fds=[write],
            )
        finally:
            os.close(write)
        worker = _Worker(process, os.fdopen(read, "rb"))
        write_message(self._stdin(worker), self._setup)
        return worker

    def _idle(self) -> _Worker | None:
        return next((worker for worker in self._workers if not worker.is_busy), None)

    def _receive(self) -> None:
        """Wait for answers of busy workers."""
        busy = [worker for worker in self._workers if worker.is_busy]
        ready, _, _ = select.select(busy, [], [])
        for worker in ready:
            answer = read_message(worker.answers)
            if answer is None:
                raise self._died(worker)
            check_answer(answer, self._directory)
            worker.is_busy = False

    def _died(self, worker: _Worker) -> ConfigError:
        code = worker.process.wait()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return ConfigError(
            "--workers",
            len(self._workers),
            f"a worker died ({how}), perhaps for lack of memory",
            f"{CONTINUE}; with fewer workers it needs less memory",
        )

    @staticmethod
    def _stdin(worker: _Worker) -> BinaryIO:
        assert worker.process.stdin is not None
        stream: Any = worker.process.stdin
        return stream  # type: ignore[no-any-return]


def check_answer(answer: dict[str, Any], directory: Path) -> None:
    """Raise ConfigError for an answer that is not `done`."""
    if "error" in answer:
        raise ConfigError(*answer["error"])
    if "os_error" in answer:
        raise unwritable(directory.parent, OSError(*answer["os_error"]))


def unwritable(directory: Path, error: OSError) -> ConfigError:
    """Return the error for a file of `directory` that cannot be written."""
    is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    fix = f"make room, and {CONTINUE}" if is_full else "check the path and its permissions"
    return ConfigError("--out", directory, f"cannot be written ({error.strerror})", fix)
