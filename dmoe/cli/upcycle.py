"""`dmoe checkpoint upcycle`"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from dmoe.cli.arguments import ARGUMENTS_HELP, load_arguments

if TYPE_CHECKING:
    from dmoe.training.upcycle import Upcycled

__all__ = ["upcycle"]


def upcycle(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run of a dense model (model.moe_every=0).")],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[CONFIG] [K=V ...]", help=ARGUMENTS_HELP)] = None,
    step: Annotated[int | None, typer.Option(help="The checkpoint of this step. Default: the newest whole one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The same as JSON on stdout.")] = False,
) -> None:
    """Begin a mixture of experts with the weights of a dense run: every expert is a copy of its feed-forward.

    CONFIG is that of the mixture. Its train.run_dir is made, with a checkpoint of step 0 that says what the dense model says; dmoe
    train with the same CONFIG and train.run_dir goes on from there, on any number of ranks.

    Example: dmoe checkpoint upcycle runs/dense configs/seeds/upcycle.yaml train.run_dir=runs/sparse
    """
    config, given = load_arguments(arguments or [])

    from dmoe.training.run_dir import find_run
    from dmoe.training.upcycle import upcycle as make

    made = make(find_run(run), config, given, step)
    print(json.dumps(asdict(made), indent=2) if as_json else told(made))


def told(made: Upcycled) -> str:
    from dmoe.training.explanation.section import many

    return (
        f"{len(made.layers)} feed-forwards of {made.source}, step {made.step}, copied to {made.experts} experts each: "
        f"{many(made.dense_parameters)} parameters are now {many(made.parameters)}\n"
        f"held-out logits differ by at most {made.difference:.1e}\n"
        f"go on with the same CONFIG and train.run_dir={made.path}"
    )
