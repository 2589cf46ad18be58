"""Fault 18: 200 random bit flips in the newest checkpoint, in the manifest and in shards.

torch's own checkpoints load 198 of 200 such flips without an error.
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


def test_each_of_200_bit_flips_falls_back_with_one_warning(original: Path, tmp_path: Path) -> None:
    resumer, rng = Resumer(), random.Random(18)
    with copied(original, tmp_path) as run:
        assert resumer.resume(run) == (NEW, [])
        newest = digest_of(resumer.engine)
        files = sorted((run / "checkpoints" / step_name(NEW)).iterdir())
        assert len(files) == 3, "two shards and the manifest"
        for number in range(FLIPS):
            file = files[number % len(files)]
            bit = rng.randrange(8 * file.stat().st_size)
            flip(file, bit)
            resumer.assert_falls_back(run, file.name)
            flip(file, bit)
            if number == 0:
                older = digest_of(resumer.engine)
            assert digest_of(resumer.engine) == older, (
                f"bit {bit} of {file.name} has changed a tensor"
            )
        assert resumer.resume(run) == (NEW, [])
        assert digest_of(resumer.engine) == newest != older


def test_a_bit_flip_in_the_only_checkpoint_is_refused(original: Path, tmp_path: Path) -> None:
    """Starting from step 0 would overwrite the run: exit code 3, the file named."""
    resumer = Resumer()
    with copied(original, tmp_path) as run:
        shutil.rmtree(run / "checkpoints" / step_name(OLD))
        shard = max((run / "checkpoints" / step_name(NEW)).glob("shard-*"))
        flip(shard, 8 * shard.stat().st_size - 1)
        resumer.assert_refuses(run, shard.name, "no checkpoint")
