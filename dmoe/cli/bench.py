"""Command group `dmoe bench`: speed and cost against bare matrix products and other libraries."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from dmoe.bench.options import check_choices, chosen_libraries, forced_router
from dmoe.cli.common import integer, number
from dmoe.config.errors import ConfigError

app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Measure speed and cost against the bare matrix products and the libraries that are "
    "installed, in interleaved rounds: medians and quartiles.\n\nExample: dmoe bench layer",
)

Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Json = Annotated[bool, typer.Option("--json", help="Print the numbers as JSON on stdout.")]
Rounds = Annotated[int, typer.Option(help="Rounds; each times every contender.", **integer(1))]
Tokens = Annotated[int, typer.Option(help="Tokens T of the batch.", **integer(1))]
Dim = Annotated[int, typer.Option(help="Width D.", **integer(1))]
Hidden = Annotated[int, typer.Option(help="Hidden width F of an expert.", **integer(1))]
Experts = Annotated[int, typer.Option(help="Experts E.", **integer(1))]
TopK = Annotated[int, typer.Option(help="Experts per token K.", **integer(1))]
DType = Annotated[str, typer.Option(help="bf16 or fp32.")]
Capacity = Annotated[
    float | None, typer.Option(help="Capacity factor. Default: dropless.", **number())
]
Workload = Annotated[
    str | None,
    typer.Option(
        metavar="W0..W7",
        help="Force the experts of a workload, for 8 ranks, or as many as divide E.",
    ),
]
Hot = Annotated[float, typer.Option(help="Rows of a hot expert over the mean.", **number())]
Libraries = Annotated[
    str | None,
    typer.Option(help="Other libraries to time, separated by commas. Default: the installed ones."),
]
Exchange = Annotated[str, typer.Option(help="packed or padded (needs --capacity).")]

OwnDim = Annotated[int | None, typer.Option(help="Width D.", **integer(1))]
OwnLayers = Annotated[int | None, typer.Option(help="Blocks.", **integer(1))]
OwnExperts = Annotated[int | None, typer.Option(help="Experts E.", **integer(1))]
OwnHidden = Annotated[int | None, typer.Option(help="Hidden width F of an expert.", **integer(1))]
OwnTopK = Annotated[int | None, typer.Option(help="Experts per token K.", **integer(1))]
OwnVocabulary = Annotated[int | None, typer.Option(help="Vocabulary V.", **integer(1))]
OwnBatch = Annotated[int | None, typer.Option(help="Sequences per step.", **integer(1))]
OwnLength = Annotated[int | None, typer.Option(help="Tokens per sequence.", **integer(1))]


@app.command()
def layer(
    tokens: Tokens = 4096,
    dim: Dim = 512,
    hidden: Hidden = 1024,
    experts: Experts = 16,
    top_k: TopK = 2,
    dtype: DType = "bf16",
    capacity: Capacity = None,
    exchange: Exchange = "packed",
    workload: Workload = None,
    hot: Hot = 1.6,
    rounds: Rounds = 21,
    libraries: Libraries = None,
    counts: Annotated[
        bool, typer.Option("--counts/--no-counts", help="Count memory, saved bytes and launches.")
    ] = True,
    breakdown: Annotated[
        bool, typer.Option("--breakdown", help="Profile where the time of each row goes.")
    ] = False,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Measure one layer, forward and backward, on one process.

    Example: dmoe bench layer --experts 64 --top-k 8 --hidden 256 --dtype fp32
    """
    check_choices(device=device, dtype=dtype, exchange=exchange)
    router = forced_router(workload, hot, experts, top_k)
    from dmoe.bench.layer import Shape, run
    from dmoe.bench.libraries import LIBRARIES

    shape = Shape(tokens, dim, hidden, experts, top_k)
    options: dict[str, Any] = {"capacity": capacity, "exchange": exchange, "workload": router}
    options |= {"libraries": chosen_libraries(libraries, LIBRARIES), "counts": counts}
    show(
        run(shape, dtype=dtype, device=device, rounds=rounds, breakdown=breakdown, **options),
        as_json,
    )


@app.command()
def exchange(
    ranks: Annotated[
        int, typer.Option(help="Local gloo ranks, one thread each.", **integer(2))
    ] = 2,
    tokens: Tokens = 4096,
    dim: Dim = 512,
    hidden: Hidden = 1024,
    experts: Experts = 16,
    top_k: TopK = 2,
    shared: Annotated[int, typer.Option(help="Shared experts.", **integer(0))] = 0,
    dtype: DType = "fp32",
    capacity: Capacity = 1.25,
    libraries: Libraries = None,
    variants: Annotated[
        bool,
        typer.Option("--variants/--no-variants", help="Time options of parallel.exchange too."),
    ] = True,
    rounds: Rounds = 11,
    as_json: Json = False,
) -> None:
    """Measure one layer on several ranks: packed, padded, other libraries, the bare exchange.

    Example: dmoe bench exchange --experts 64 --top-k 8 --hidden 256
    """
    check_choices(dtype=dtype)
    if experts % ranks or tokens % ranks:
        allowed = f"must divide the {experts} experts and the {tokens} tokens"
        raise ConfigError("--ranks", ranks, allowed, "use 2")
    from dmoe.bench.exchange import run
    from dmoe.bench.layer import Shape
    from dmoe.bench.libraries import OVER_RANKS

    shape = Shape(tokens, dim, hidden, experts, top_k)
    options: dict[str, Any] = {"capacity": capacity, "shared": shared, "variants": variants}
    options["libraries"] = chosen_libraries(libraries, OVER_RANKS)
    show(run(shape, ranks=ranks, dtype=dtype, rounds=rounds, **options), as_json)


@app.command()
def balance(
    ranks: Annotated[str, typer.Option(help="EP sizes, separated by commas.")] = "2,4,8",
    tokens: Tokens = 4096,
    dim: Dim = 512,
    hidden: Hidden = 1024,
    experts: Experts = 16,
    top_k: TopK = 2,
    hot: Hot = 1.6,
    dtype: DType = "fp32",
    rounds: Rounds = 7,
    as_json: Json = False,
) -> None:
    """Measure the balance of ranks on the workloads W0 to W7: fixed, periodic, copies.

    Example: dmoe bench balance --ranks 2
    """
    check_choices(dtype=dtype)
    sizes = [int(size) if size.isdigit() else 0 for size in ranks.split(",")]
    if any(size < 2 or experts % size or tokens % size for size in sizes):
        allowed = f"must be numbers from 2 up that divide {experts} experts and {tokens} tokens"
        both = [n for n in range(2, experts + 1) if experts % n == tokens % n == 0]
        fix = (
            f"use some of {both[:8]}" if both else "use other --experts or --tokens, e.g. 16, 4096"
        )
        raise ConfigError("--ranks", ranks, allowed, fix)
    if hot < 1:
        raise ConfigError("--hot", hot, "must be 1 or more", "use 1.6")
    from dmoe.bench.balance import check_workloads, run
    from dmoe.bench.layer import Shape

    shape = Shape(tokens, dim, hidden, experts, top_k)
    try:
        check_workloads(shape, sizes, hot)
    except ConfigError as error:
        options = {"num_experts": "experts", "router.": "", "top_k": "top-k", "moe.": "--"}
        raise error.renamed(options) from None
    show(run(shape, ranks=sizes, hot=hot, dtype=dtype, rounds=rounds), as_json)


@app.command()
def step(
    shape: Annotated[
        str, typer.Option(help="mixtral (84 M parameters) or quickstart; the rest changes it.")
    ] = "mixtral",
    dim: OwnDim = None,
    layers: OwnLayers = None,
    experts: OwnExperts = None,
    hidden: OwnHidden = None,
    top_k: OwnTopK = None,
    vocabulary: OwnVocabulary = None,
    batch: OwnBatch = None,
    length: OwnLength = None,
    override: Annotated[
        list[str] | None, typer.Option("--set", metavar="K=V", help="A field of dmoe's config.")
    ] = None,
    workload: Workload = None,
    hot: Hot = 1.6,
    dtype: DType = "bf16",
    rounds: Rounds = 7,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Measure whole training steps and their peak memory, each contender in its own process.

    Example: dmoe bench step --dtype fp32 --set train.recompute=experts
    """
    check_choices(device=device, dtype=dtype, shape=shape)
    from dataclasses import replace

    from dmoe.bench.step import SHAPES, run

    sizes = {"dim": dim, "layers": layers, "experts": experts, "hidden": hidden, "top_k": top_k}
    sizes |= {"vocabulary": vocabulary, "batch": batch, "length": length}
    given = {name: size for name, size in sizes.items() if size is not None}
    sized = replace(SHAPES[shape], **given)
    options: dict[str, Any] = {"rounds": rounds, "overrides": override or []}
    router = forced_router(workload, hot, sized.experts, sized.top_k)
    if router is not None:
        forced = {name: getattr(router, name) for name in ("kind", "workload", "ranks", "hot")}
        set_here = [f"moe.router.{name}={value}" for name, value in forced.items()]
        # transformers routes by itself
        options |= {"overrides": [*set_here, *(override or [])], "names": ("gemms", "dmoe")}
    report = run(sized, dtype=dtype, device=device, **options)
    show(report, as_json)


def show(report: dict[str, Any], as_json: bool) -> None:
    """Print a report: as JSON, or its scalars and one line per row, with quartiles in brackets."""
    if as_json:
        print(json.dumps(report))
        return
    for key, value in report.items():
        if key == "rows":
            print("\n".join(_table(value)))
        elif key != "ms":  # the raw times are for --json
            print(f"{key}: {_text(value)}")


def _table(rows: list[dict[str, Any]]) -> list[str]:
    """Align the columns of all rows, names left and numbers right."""
    keys = list(dict.fromkeys(key for row in rows for key in row if key[-3:] not in ("_q1", "_q3")))
    cells = [keys]
    for row in rows:
        line = []
        for key in keys:
            text = _text(row.get(key, ""))
            if f"{key}_q1" in row:
                text += f" ({_text(row[f'{key}_q1'])} .. {_text(row[f'{key}_q3'])})"
            line.append(text)
        cells.append(line)
    first, *widths = (max(map(len, column)) for column in zip(*cells, strict=True))
    return [
        "  ".join([f"{name:{first}}", *map(str.rjust, rest, widths)]).rstrip()
        for name, *rest in cells
    ]


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return " ".join(map(_text, value))
    return str(value)
