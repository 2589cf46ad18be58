"""What is compared with what.

The truth is one process with the naive layer. Against it stand the real layer on one process, and on every world, EP size, exchange
and mode. The number of groups of tokens (ranks times virtual ranks) is the same in all of them, because `capacity.group: rank` and
losses of level `micro_batch` mean something else with other groups.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from dmoe.config.errors import ConfigError
from dmoe.config.rules import can_share, check, moe_widths, shares_something
from dmoe.config.schema import Config

Exchange = Literal["packed", "padded"]
Mode = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class Case:
    world: int
    ep: int
    virtual_ranks: int
    exchange: Exchange
    mode: Mode
    recompute: bool = False
    naive: bool = False

    def __str__(self) -> str:
        if self.naive:
            return "1 process, naive layer"
        ranks = "1 process" if self.world == 1 else f"{self.world} ranks EP={self.ep}"
        return f"{ranks} {self.exchange} {self.mode}{' recompute' if self.recompute else ''}"

    def config(self, base: Config) -> Config:
        """`base` as this case runs it."""
        return replace(
            base,
            parallel=replace(
                base.parallel, ep=self.ep, virtual_ranks=self.virtual_ranks, mode=self.mode
            ),
            moe=replace(base.moe, exchange=self.exchange),
            train=replace(base.train, recompute=self.recompute),
        )


@dataclass(frozen=True)
class Plan:
    cases: list[Case]
    refused: dict[str, str]
    """Combinations that are not run, and why."""


def reference(groups: int) -> Case:
    return Case(1, 1, groups, "packed", "ddp", naive=True)


def plan(config: Config, worlds: list[int], groups: int) -> Plan:
    """All cases for these worlds that the config allows. `groups` is a multiple of each world."""
    found, refused = list[Case](), dict[str, str]()
    exchanges: list[Exchange] = ["packed"]
    if moe_widths(config):
        if config.moe.capacity.factor is None:
            refused["padded"] = (
                "a dropless config has no fixed number of slots (moe.capacity.factor is null)"
            )
        else:
            exchanges.append("padded")
    for world in worlds:
        for case in _of_world(config, world, groups, exchanges):
            try:
                check(case.config(config), world)
                found.append(case)
            except ConfigError as error:
                refused[str(case)] = str(error)
    largest = [case for case in found if case.world == max(worlds)]
    if largest:  # recomputation must not count anything twice
        found.append(replace(largest[0], ep=max(case.ep for case in largest), recompute=True))
    return Plan(found, refused)


def _of_world(config: Config, world: int, groups: int, exchanges: list[Exchange]) -> list[Case]:
    sizes = [n for n in range(1, world + 1) if world % n == 0 and (n == 1 or _shards(config, n))]
    modes: list[Mode] = ["ddp"] if world == 1 else ["ddp", "fsdp"]
    return [
        Case(world, ep, groups // world, exchange, mode)
        for ep in reversed(sizes)
        for mode in modes
        for exchange in exchanges
    ]


def _shards(config: Config, ep: int) -> bool:
    return shares_something(config) and can_share(config, ep)
