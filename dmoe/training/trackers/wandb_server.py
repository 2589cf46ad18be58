"""Whether a wandb server and a key are there, asked before a run is opened: wandb itself would ask the user, or wait for minutes."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from pathlib import Path

from dmoe.training.trackers.bounded import bounded

__all__ = ["SECONDS", "keep_to_itself", "why_unreachable"]

SECONDS = 4.0
"""For the question whether it is a wandb server. Whether it takes the key, opening the run shows: a refusal comes at once."""
QUESTION = json.dumps({"query": "query { viewer { id } }"}).encode()
MOST_BYTES = 1 << 16


def why_unreachable() -> str | None:
    """One sentence why wandb cannot go online, or None if it can. Takes about `SECONDS` at most; asks nobody at the terminal."""
    import wandb

    settings = wandb.setup(settings=wandb.Settings(silent=True, x_disable_viewer=True)).settings
    silence = f"{settings.base_url} does not answer within {SECONDS:g} seconds"
    why = bounded(lambda: _ask(settings.base_url), SECONDS, silence)
    if why is None and not wandb.login(prompt=False, verify=False):
        why = "there is no API key (set WANDB_API_KEY, or use `wandb login`)"
    return why


def keep_to_itself(folder: Path) -> None:
    """What only the environment can tell wandb.

    It reports its own errors to its server, also offline, and waits for it at exit. And it keeps what waits for `wandb sync` in the
    home directory, which may be full, read-only or on another machine by then: here it is `folder`, in the run's directory.
    """
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    os.environ.setdefault("WANDB_DATA_DIR", str(folder))


def _ask(base_url: str) -> str | None:
    """Without the key: a server answers anyone who it is, and a wrong one has no business with it."""
    if not base_url.startswith(("http://", "https://")):
        return f"{base_url} is no http address"
    address = f"{base_url.rstrip('/')}/graphql"
    request = urllib.request.Request(address, data=QUESTION, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as response:
            text = response.read(MOST_BYTES)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):  # it wants the key first: opening the run shows it
            return None
        return f"{base_url} answers with error {error.code}"
    except Exception as error:  # no network, no such host, no HTTP: OSError, ValueError, http.client.HTTPException
        return f"{base_url} cannot be reached ({getattr(error, 'reason', error)})"
    try:
        known = "data" in json.loads(text)
    except (ValueError, TypeError):
        known = False
    return None if known else f"{base_url} is no wandb server"
