"""Freed memory is kept for the next step: page faults counted, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from dmoe.train.allocator import keep_freed_memory
print(keep_freed_memory() if sys.argv[1] == "keep" else None)
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(b"x") * (96 << 20)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="not glibc")
def test_a_block_is_page_faulted_once_and_the_users_own_setting_is_left_alone():
    def run(mode, **more):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
        found = subprocess.run(
            [sys.executable, "-c", PROGRAM, mode],
            env=environment | more,
            capture_output=True,
            text=True,
            check=True,
        )
        told, *faults = found.stdout.split()
        return told, [int(count) for count in faults]

    pages = 96 * 1024 // 4
    assert all(count > 0.9 * pages for count in run("plain")[1]), "or there is nothing to win"
    told, (first, *_, last) = run("keep")
    assert told == "True"
    assert first > 0.9 * pages
    assert last < 0.05 * pages
    assert run("keep", MALLOC_ARENA_MAX="2")[0] == "False"
