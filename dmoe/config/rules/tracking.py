"""Rules about trackers: the library of each must be installed. Imports none of them."""

from __future__ import annotations

from importlib.util import find_spec

from dmoe.config.errors import ConfigError
from dmoe.config.schema import Config

LIBRARIES = {
    "aim": "aim",
    "clearml": "clearml",
    "comet_ml": "comet_ml",
    "dvclive": "dvclive",
    "mlflow": "mlflow",
    "swanlab": "swanlab",
    "trackio": "trackio",
}
"""Module, and package on the index, of each tracker that is no dependency of dmoe."""


def check_tracking(config: Config) -> None:
    """Refuse a tracker whose library is not installed.

    Raises:
        ConfigError: naming the command that installs it.
    """
    for name in config.tracking.trackers:
        library = LIBRARIES.get(name)
        if library is not None and find_spec(library) is None:
            allowed = f"needs the library {library}, which is not installed"
            fix = f"pip install {library}, or leave it out: metrics.jsonl is always written"
            raise ConfigError("tracking.trackers", name, allowed, fix)
