"""The whole training step, against its bare matrix products and a plain loop of transformers.

Rows of the table:
  gemms         the floor: the products of all weights with all tokens as large matrix products,
                forward and both backward products of each; those of attention are left out
  dmoe          a step of the trainer: forward with auxiliary losses and statistics, backward, norm,
                the control reduction and its host read, clipping, AdamW; it is not a logged one
  transformers  Mixtral of the same shape with `experts_implementation="grouped_mm"` and the
                switch loss: forward, backward, `clip_grad_norm_`, `AdamW(fused=True)`

Every contender is a process of its own, so that peak memory (`VmHWM` on a CPU) is its own and no
allocator is shared; a round tells each in turn to take one step.

Letters: T tokens, D width, V vocabulary size.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dmoe.bench.measure import interleave, machine, peak_bytes, quartiles, summary
from dmoe.config.load import load
from dmoe.config.schema import Config
from dmoe.distributed.init import init_distributed
from dmoe.observability.profiler import DTYPES, peak_memory
from dmoe.train.allocator import keep_freed_memory
from dmoe.train.engine import build_engine
from dmoe.train.step import Batch, train_step

LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class StepShape:
    """Sizes of a language model and its batch."""

    dim: int = 512
    layers: int = 4
    heads: int = 8
    experts: int = 16
    hidden: int = 768
    top_k: int = 2
    vocabulary: int = 8192
    batch: int = 16
    length: int = 256

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.batch * self.length


SHAPES = {
    "mixtral": StepShape(),
    "quickstart": StepShape(128, 3, 4, 8, 192, 2, 256, 24, 128),
}
"""`mixtral`: 84 M parameters; `quickstart`: that of configs/quickstart.yaml."""


class Child:
    """A contender in a process of its own, which takes one step per line that it reads."""

    def __init__(self, name: str, shape: StepShape, dtype: str, device: str, more: list[str]):
        arguments = json.dumps([name, asdict(shape), dtype, device, more])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dmoe.bench.step", arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.peak = 0
        """Bytes: peak memory after `step`, rise of torch's allocations in one after `rise`."""

    def wait(self) -> None:
        """Wait for the answer to the last line, a number of bytes. Raises SystemExit."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("peak "):
                self.peak = int(line.split()[1])
                return
        raise SystemExit(f"a contender ended with exit code {self.process.wait()}")

    def step(self, command: str = "step") -> None:
        """Take one step; with `rise`, two, and measure what torch allocates in the second."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()
        self.wait()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def run(
    shape: StepShape | None = None,
    *,
    dtype: str = "bf16",
    device: str = "cpu",
    rounds: int = 7,
    overrides: list[str] | None = None,
    names: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Time the contenders in interleaved rounds, and measure their peak memory.

    Args:
        shape: sizes; default: 84 M parameters.
        dtype: `fp32` or `bf16` (autocast; weights and moments are float32).
        device: `cpu` or `cuda`.
        rounds: rounds of the clock.
        overrides: fields of `dmoe`'s config, as on the command line.
        names: keys of `CONTENDERS`; default: all that are installed.
    """
    shape = shape or StepShape()
    load(None, overrides or [])  # a mistake in them is this process's to say
    with ExitStack() as stack:
        children = {
            name: stack.enter_context(Child(name, shape, dtype, device, overrides or []))
            for name in names or installed()
        }
        for child in children.values():
            child.wait()
        times = interleave({name: child.step for name, child in children.items()}, rounds)
        rows = summary(times, next(iter(children)))
        for row in rows:
            child = children[row["name"]]
            row["peak_mb"] = child.peak / 1e6
            child.step("rise")
            row["step_mb"] = child.peak / 1e6
            row["tokens_per_second"] = shape.tokens / row["ms"] * 1e3
    report: dict[str, Any] = {
        "machine": machine(device),
        "shape": asdict(shape) | {"dtype": dtype},
        "rows": rows,
        "ms": times,
    }
    if {"dmoe", "transformers"} <= times.keys():
        pairs = zip(times["dmoe"], times["transformers"], strict=True)
        report["faster_than"] = {"transformers": quartiles([b / a for a, b in pairs])}
    return report


def installed() -> list[str]:
    """Return the contenders that can run here, the floor first."""
    from importlib.util import find_spec

    return [name for name in CONTENDERS if name != "transformers" or find_spec(name) is not None]


def floor(shape: StepShape, dtype: str, device: str, more: list[str]) -> Callable[[], object]:
    """Return the matrix products of a step, each weight's three."""
    tokens, rows, dim = shape.tokens, shape.tokens * shape.top_k, shape.dim
    block = [(tokens, dim, 3 * dim), (tokens, dim, dim)]
    block += [(rows, dim, 2 * shape.hidden), (rows, shape.hidden, dim)]
    products = [*block * shape.layers, (tokens, dim, shape.vocabulary)]

    def random(*size: int) -> Tensor:
        return torch.randn(size, dtype=DTYPES[dtype], device=device)

    made = {(r, i, o): (random(r, i), random(i, o), random(r, o)) for r, i, o in set(products)}
    outputs = {key: [torch.empty_like(t) for t in tensors] for key, tensors in made.items()}

    def step() -> None:
        for key in products:
            (x, weight, grad), (grad_x, grad_weight, out) = made[key], outputs[key]
            torch.mm(x, weight, out=out)
            torch.mm(grad, weight.t(), out=grad_x)
            torch.mm(x.t(), grad, out=grad_weight)

    return step


def ours(shape: StepShape, dtype: str, device: str, more: list[str]) -> Callable[[], object]:
    """Return a step of the trainer on one batch of random tokens."""
    if device == "cpu":
        keep_freed_memory()  # as `dmoe train` does
    config = our_config(shape, dtype, device, more)
    engine = build_engine(config, init_distributed(device), shape.vocabulary)
    input, target = random_tokens(shape)
    batch = Batch(input, target, torch.zeros(shape.batch, dtype=torch.int64), 0, 0)
    return lambda: train_step(engine, [batch], LEARNING_RATE)


def our_config(shape: StepShape, dtype: str, device: str, more: list[str]) -> Config:
    """Return the config of Mixtral in this shape; `more` are overrides."""
    sizes = [f"model.dim={shape.dim}", f"model.layers={shape.layers}", f"model.heads={shape.heads}"]
    sizes += [f"moe.num_experts={shape.experts}", f"moe.expert_dim={shape.hidden}"]
    sizes += [f"moe.top_k={shape.top_k}", f"data.seq_len={shape.length}"]
    run = [f"train.global_batch={shape.batch}", f"train.precision={dtype}"]
    run += [f"train.device={device}", "model.tie_embeddings=true", "model.qk_norm=false"]
    return load(None, [*sizes, *run, *more])


def transformers(
    shape: StepShape, dtype: str, device: str, more: list[str]
) -> Callable[[], object]:
    """Return a step of a plain loop around transformers' Mixtral."""
    model = their_model(shape).to(device).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), LEARNING_RATE, (0.9, 0.95), weight_decay=0.1, fused=True
    )
    token = random_tokens(shape)[0].to(device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bf16"):
            loss = model(input_ids=token, labels=token).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def their_model(shape: StepShape) -> Any:
    """Return transformers' Mixtral in this shape."""
    from transformers import MixtralConfig, MixtralForCausalLM

    options: Any = {"experts_implementation": "grouped_mm"}
    config = MixtralConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.dim,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        max_position_embeddings=shape.length,
        tie_word_embeddings=True,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
        use_cache=False,
        **options,
    )
    made: Any = MixtralForCausalLM
    return made(config)


def random_tokens(shape: StepShape) -> tuple[Tensor, Tensor]:
    """Return inputs and targets, [B, S]."""
    random = torch.Generator().manual_seed(0)
    token = torch.randint(shape.vocabulary, (shape.batch, shape.length + 1), generator=random)
    return token[:, :-1].contiguous(), token[:, 1:].contiguous()


CONTENDERS: dict[str, Callable[[StepShape, str, str, list[str]], Callable[[], object]]] = {
    "gemms": floor,
    "dmoe": ours,
    "transformers": transformers,
}


def serve(arguments: str) -> None:
    """Be a `Child`: build the contender, and take a step for each line."""
    name, sizes, dtype, device, more = json.loads(arguments)
    step = CONTENDERS[name](StepShape(**sizes), dtype, device, more)
    print("peak 0", flush=True)
    for line in sys.stdin:
        if line.strip() == "rise":
            print(f"peak {peak_bytes(step, device)}", flush=True)
            continue
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        print(f"peak {peak_memory(torch.device(device))}", flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
