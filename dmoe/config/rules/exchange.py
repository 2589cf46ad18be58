"""Options of the exchange of tokens (`parallel.exchange`) that do not go together."""

from __future__ import annotations

from dataclasses import replace

from dmoe.config.errors import ConfigError
from dmoe.config.plugins import parse
from dmoe.config.rules.model import moe_widths
from dmoe.config.schema import Config, ExchangeConfig


def check_exchange(config: Config, precision: str | None = None) -> None:
    """Refuse options of the exchange that the model or another setting cannot have.

    Args:
        config: a whole config.
        precision: fp32, bf16 or fp16, once `auto` is resolved.

    Raises:
        ConfigError: for the first such option.
    """
    exchange, why = config.parallel.exchange, dict[str, str]()
    own = config.model.source is None and config.modular.bank == "none"
    if own and not moe_widths(config):
        why = dict.fromkeys(vars(exchange), "needs a model with MoE layers")
    moe, copies = config.moe, config.parallel.placement.copies != 0
    if not own:
        why["overlap"] = "needs dmoe's own MoE layers, neither a published model nor modules"
    elif moe.capacity.pool > 1:
        why["overlap"] = "does not work with pooled slots (moe.capacity.pool)"
    elif copies:
        why["overlap"] = "does not work with copies for the step (parallel.placement.copies)"
    if "overlap" in why:
        why["chunks"] = why["overlap"]
    elif moe.experts.shapes or parse(moe.experts.kind, "moe.experts.kind") is not None:
        why["chunks"] = "needs experts of one shape, of dmoe's own kinds"
    if copies:
        why["levels"] = "does not work with copies for the step (parallel.placement.copies)"
    elif exchange.overlap or exchange.chunks > 1:
        why["levels"] = "works with neither overlap nor chunks: its second step waits for the first"
    if config.modular.bank != "none":
        why["once_per_rank"] = f"needs MoE layers, not the modules of bank={config.modular.bank}"
    elif moe.exchange == "padded":
        why["once_per_rank"] = "needs moe.exchange=packed: padded slots are rows of the experts"
    elif copies or exchange.overlap or exchange.chunks > 1:
        why["once_per_rank"] = "works with neither overlap nor chunks nor parallel.placement.copies"
    elif moe.top_k == 1 and own:
        why["once_per_rank"] = "saves nothing with moe.top_k=1, one row per token"
    if moe.exchange == "padded" and moe.capacity.pool > 1:
        why["wire"] = "does not work with padded pooled slots, whose counts are in the rows"
    elif (precision := precision or config.train.precision) in ("bf16", "fp16"):
        why["wire"] = f"saves nothing with train.precision={precision}"
    if moe.exchange == "padded":
        why["library"] = "needs moe.exchange=packed: padded slots are rows of the experts"
    elif config.modular.bank != "none":
        why["library"] = f"needs MoE layers, not the modules of bank={config.modular.bank}"
    elif copies or replace(exchange, library="torch") != ExchangeConfig():
        why["library"] = "has an exchange of its own, without other options or copies for the step"
    elif config.train.device == "cpu":
        why["library"] = "moves rows between GPUs, and train.device=cpu"
    elif (precision or config.train.precision) not in ("bf16", "auto"):
        why["library"] = f"sends rows of bfloat16, not train.precision={config.train.precision}"
    elif config.debug.collectives:
        why["library"] = "cannot be compared by debug.collectives, which sees collectives of torch"
    for name, reason in why.items():
        value, default = getattr(exchange, name), getattr(ExchangeConfig(), name)
        if value != default:
            raise ConfigError(
                f"parallel.exchange.{name}", value, reason, f"use {str(default).lower()}"
            )


def check_chunks_divide(config: Config, ep: int) -> None:
    """Refuse chunks that do not divide the experts of each of `ep` ranks.

    Raises:
        ConfigError: for such a number; with one rank nothing is sent.
    """
    chunks, local = config.parallel.exchange.chunks, config.moe.num_experts // ep
    if ep > 1 and local % chunks:
        sizes = [n for n in range(1, local + 1) if local % n == 0]
        allowed = f"must divide the {local} experts of each of {ep} ranks"
        raise ConfigError("parallel.exchange.chunks", chunks, allowed, f"use one of {sizes}")


def check_two_nodes(config: Config, ep: int) -> None:
    """Refuse two levels for an EP group that is not two nodes of several ranks, as in `verify`.

    Raises:
        ConfigError: for such a size; with one rank nothing is sent.
    """
    if config.parallel.exchange.levels == 2 and ep > 1 and (ep % 2 or ep < 4):
        allowed = f"needs two nodes of several ranks each, and an EP group has {ep} ranks"
        raise ConfigError("parallel.exchange.levels", 2, allowed, "use 1")


def check_row_kernels(config: Config) -> None:
    """Refuse `moe.kernels=triton` where rows would be moved by other kernels.

    Raises:
        ConfigError: for the first reason found.
    """
    exchange = config.parallel.exchange
    if config.moe.kernels == "torch":
        return
    reason = None
    if config.model.source is not None or config.modular.bank != "none":
        reason = "needs dmoe's own MoE layers, neither a published model nor modules"
    elif (
        exchange.once_per_rank
        or exchange.library != "torch"
        or config.parallel.placement.copies != 0
    ):
        reason = "does not know the rows of exchange.once_per_rank, exchange.library and copies"
    if reason is not None:
        raise ConfigError("moe.kernels", config.moe.kernels, reason, "use torch")
