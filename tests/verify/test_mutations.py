"""The mutations of `python -m tests.verify.mutate` still fit the code."""

from __future__ import annotations

import pytest

from tests.verify.mutate import line_of
from tests.verify.mutations import MUTATIONS


@pytest.mark.parametrize("number", range(1, len(MUTATIONS) + 1))
def test_the_text_of_a_mutation_occurs_once(number: int) -> None:
    """Five texts had moved unseen when code was rewritten, so they would have been skipped."""
    mutation = MUTATIONS[number - 1]
    assert line_of(mutation) > 0
    assert mutation.old != mutation.new
