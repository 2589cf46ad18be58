"""Fault 18: 200 random bits of a real run's newest checkpoint, one at a time, over all its files, manifest and shards alike.

torch's own checkpoints load 198 of 200 such flips without a word.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from dmoe.checkpoint.manifest import step_name
from tests.drills.two_ranks import NEW, OLD, Resumer, copied, original
from tests.drills.worker import digest_of

__all__ = ["original"]
pytestmark = pytest.mark.drills

FLIPS = 200


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def test_200_flipped_bits_are_200_falls_back_with_one_warning_each(
    original: Path, tmp_path: Path
) -> None:
    resumer, dice = Resumer(), random.Random(18)
    with copied(original, tmp_path) as run:
        assert resumer.resume(run) == (NEW, [])
        newest = digest_of(resumer.engine)
        files = sorted((run / "checkpoints" / step_name(NEW)).iterdir())
        assert len(files) == 3, "two shards and the manifest"
        for number in range(FLIPS):
            file = files[number % len(files)]
            bit = dice.randrange(8 * file.stat().st_size)
            flip(file, bit)
            resumer.falls_back(run, file.name)
            flip(file, bit)
            if number == 0:
                older = digest_of(resumer.engine)
            assert digest_of(resumer.engine) == older, (
                f"bit {bit} of {file.name} has found its way into a tensor"
            )
        assert resumer.resume(run) == (NEW, [])
        assert digest_of(resumer.engine) == newest != older


def test_a_flipped_bit_in_the_only_checkpoint_ends_the_run_untouched(
    original: Path, tmp_path: Path
) -> None:
    """Starting over would write over the run: exit code 3, the file named."""
    resumer = Resumer()
    with copied(original, tmp_path) as run:
        shutil.rmtree(run / "checkpoints" / step_name(OLD))
        shard = max((run / "checkpoints" / step_name(NEW)).glob("shard-*"))
        flip(shard, 8 * shard.stat().st_size - 1)
        resumer.refuses(run, shard.name, "no checkpoint")
