"""`python -m dmoe` is `dmoe`."""

from dmoe.cli.main import run

run()
