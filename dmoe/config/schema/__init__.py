"""Every field of the config, with its default and a description under it.

The defaults are the quickstart: `dmoe train` without a file trains exactly this. A YAML file holds
only what differs. `dmoe explain --fields` prints the descriptions. Constraints on one field stand
beside it (`constraints.py`).

model: the network. modular: modules on it. run: parallelism, data, steps, optimizer. observability:
checkpoints, alerts, trackers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dmoe.config.schema.model import (
    BalanceConfig,
    CapacityConfig,
    ExpertsConfig,
    LoraConfig,
    ModelConfig,
    MoEConfig,
    ReplayConfig,
    RouterConfig,
)
from dmoe.config.schema.modular import ModularConfig
from dmoe.config.schema.observability import (
    AlertsConfig,
    CheckpointConfig,
    DebugConfig,
    GuardConfig,
    TrackingConfig,
)
from dmoe.config.schema.run import (
    DataConfig,
    ExchangeConfig,
    OptimConfig,
    ParallelConfig,
    PlacementConfig,
    TrainConfig,
)

__all__ = [
    "AlertsConfig",
    "BalanceConfig",
    "CapacityConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DebugConfig",
    "ExchangeConfig",
    "ExpertsConfig",
    "GuardConfig",
    "LoraConfig",
    "MoEConfig",
    "ModelConfig",
    "ModularConfig",
    "OptimConfig",
    "ParallelConfig",
    "PlacementConfig",
    "ReplayConfig",
    "RouterConfig",
    "TrackingConfig",
    "TrainConfig",
]


@dataclass(frozen=True)
class Config:
    """The whole config, in sections."""

    model: ModelConfig = field(default_factory=ModelConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    alerts: AlertsConfig = field(default_factory=AlertsConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)
    modular: ModularConfig = field(default_factory=ModularConfig)
