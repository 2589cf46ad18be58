"""Commands `dmoe checkpoint import`, `upcycle` and `prune`: runs made from other models."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dmoe.cli.common import ARGUMENTS_HELP, TrustCode, integer, load_arguments, number
from dmoe.config.errors import ConfigError

if TYPE_CHECKING:
    from dmoe.conversion.own_import import Imported
    from dmoe.conversion.prune import PruneResult
    from dmoe.conversion.upcycle import UpcycleResult

Arguments = Annotated[
    list[str] | None, typer.Argument(metavar="[CONFIG] [K=V ...]", help=ARGUMENTS_HELP)
]
Step = Annotated[
    int | None,
    typer.Option(help="Step of the checkpoint. Default: the newest intact one.", **integer()),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
SPLIT_HELP = "Cut each feed-forward in this many parts: experts of 1/G of its width."
DROP_HELP = "Share of the hidden units of each expert that is re-initialised (Drop-Upcycling)."
NOISE_HELP = "Noise on the experts, as a share of the standard deviation of each matrix."


def import_model(
    folder: Annotated[
        str,
        typer.Argument(metavar="DIR", help="A Mixtral, Qwen3-MoE, Llama, Mistral or Qwen3."),
    ],
    arguments: Arguments = None,
    as_json: AsJson = False,
) -> None:
    """Create a run of dmoe's own transformer from a published model.

    What DIR decides of the model is filled in, its tokenizer too. Creates train.run_dir with a
    checkpoint of step 0, from which dmoe train --resume continues on any number of ranks. To train
    the model of transformers itself, use dmoe train model.source=DIR.

    Example: dmoe checkpoint import my-mixtral train.run_dir=runs/mixtral
    """
    config, _ = load_arguments(arguments or [])

    from dmoe.conversion.own_import import import_own

    result = import_own(folder, config)
    print(json.dumps(asdict(result), indent=2) if as_json else import_text(result))


def import_text(result: Imported) -> str:
    """Describe an imported run in sentences."""
    from dmoe.report.format import format_count

    line = f"{result.source} is a {result.family} of {format_count(result.parameters)} parameters"
    return "\n".join([line, *result.notes, f"train it with: dmoe train --resume {result.path}"])


def upcycle(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_DIR",
            help="Run of a dense model (model.moe_every=0), or a published Llama, SmolLM or Qwen3.",
        ),
    ],
    arguments: Arguments = None,
    step: Step = None,
    split: Annotated[int, typer.Option(help=SPLIT_HELP, **integer(1))] = 1,
    drop: Annotated[float, typer.Option(help=DROP_HELP, **number())] = 0.0,
    noise: Annotated[float, typer.Option(help=NOISE_HELP, **number())] = 0.0,
    trust_code: TrustCode = False,
    as_json: AsJson = False,
) -> None:
    """Initialize a mixture of experts from a dense model: each expert is a copy of a feed-forward.

    CONFIG is the config of the mixture. Creates its train.run_dir with a checkpoint of step 0 that
    computes the same function as the dense model, unless --drop or --noise change it. Then dmoe
    train with the same CONFIG and train.run_dir continues from it, on any number of ranks.

    Example: dmoe checkpoint upcycle runs/dense configs/seeds/upcycle.yaml train.run_dir=runs/sparse
    """
    config, given = load_arguments(arguments or [])

    from dmoe.conversion.expert_copies import ExpertInit
    from dmoe.conversion.upcycle import upcycle as upcycle_run
    from dmoe.conversion.upcycle import upcycle_published
    from dmoe.runs.directory import find_run

    init = ExpertInit(split, drop, noise)
    if (Path(run) / "config.json").is_file() and not (Path(run) / "resolved.yaml").is_file():
        if step is not None:
            raise ConfigError("--step", step, "belongs to a run, and RUN is none", "leave it out")
        result = upcycle_published(run, config, init=init)
    else:
        result = upcycle_run(find_run(run), config, given, step, trust_code=trust_code, init=init)
    print(json.dumps(asdict(result), indent=2) if as_json else upcycle_text(result))


def upcycle_text(result: UpcycleResult) -> str:
    """Describe an upcycled run in sentences."""
    from dmoe.report.format import format_count

    init, step = result.init, "" if result.step is None else f", step {result.step}"
    made = "copied to" if init.split == 1 else f"cut in {init.split} parts, copied to"
    changes = [f"{init.drop:g} of the hidden units re-initialised"] if init.drop else []
    changes += [f"noise of {init.noise:g}"] if init.noise else []
    after = f"dmoe train --resume {result.path}"
    if result.step is not None:
        after = f"the same CONFIG and train.run_dir={result.path}"
    lines = [
        f"{len(result.layers)} feed-forwards of {result.source}{step}, "
        f"{made} {result.experts} experts each"
        + (f", with {' and '.join(changes)}" if changes else "")
        + f": {format_count(result.dense_parameters)} parameters are now "
        f"{format_count(result.parameters)}",
        *result.notes,
        f"logits on held-out text differ by at most {result.difference:.1e}"
        + (f"; the loss is {result.loss:.4f}, it was {result.dense_loss:.4f}" if changes else ""),
        f"train it with {after}" if result.step is not None else f"train it with: {after}",
    ]
    return "\n".join(lines)


def prune(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run, e.g. runs/latest.")],
    keep: Annotated[int, typer.Option(help="Experts that stay in each MoE layer.", **integer(1))],
    to: Annotated[str, typer.Option("--to", metavar="DIR", help="The new run directory.")],
    merge: Annotated[
        bool, typer.Option("--merge", help="Merge the others into those that stay, by load.")
    ] = False,
    step: Step = None,
    as_json: AsJson = False,
) -> None:
    """Make a run with fewer experts: those of largest load in the last logged steps stay.

    Prints the held-out loss before and after. Creates DIR with a checkpoint of step 0, from which
    dmoe train --resume DIR continues on any number of ranks.

    Example: dmoe checkpoint prune runs/latest --keep 4 --merge --to runs/pruned
    """
    from dmoe.conversion.prune import prune as prune_run
    from dmoe.runs.directory import find_run

    result = prune_run(find_run(run), to, keep, step, merge=merge)
    print(json.dumps(asdict(result), indent=2) if as_json else prune_text(result))


def prune_text(result: PruneResult) -> str:
    """Describe a pruned run in sentences."""
    from dmoe.report.format import format_count

    lines = [
        f"{result.source}, step {result.step}: {len(result.kept[0])} experts stay in each MoE "
        f"layer{', the others are merged into them' if result.merged else ''}"
    ]
    for layer, (kept, share) in enumerate(zip(result.kept, result.load_kept, strict=True)):
        ids = ", ".join(map(str, kept))
        lines.append(f"layer {layer}: experts {ids}, which had {share:.0%} of the choices")
    counts = f"{format_count(result.parameters_before)} to {format_count(result.parameters)}"
    lines.append(f"parameters: {counts}")
    lines.append(f"held-out loss: {result.loss_before:.4f} before, {result.loss:.4f} after")
    lines.append(f"train it with: dmoe train --resume {result.path}")
    return "\n".join(lines)
