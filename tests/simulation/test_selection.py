"""A trace of scores, selected again, against real runs with the other bias and with next choices.

Weights stand still, and the model has one layer: its hidden states do not depend on the choices.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dmoe.config.errors import CheckpointError, ConfigError
from dmoe.config.load import load
from dmoe.config.rules import moe_blocks
from dmoe.moe.rng import generator
from dmoe.moe.routing import BatchShape, TokenContext
from dmoe.replay.part import ChoiceSpec
from dmoe.simulation import simulate
from dmoe.simulation.drops import kept_experts
from dmoe.simulation.formats import export_trace, open_any
from dmoe.simulation.load import make_load
from dmoe.simulation.replay import Setting, replay_steps
from dmoe.simulation.selection import reselected, with_next_choices
from dmoe.simulation.trace import Trace, open_trace
from dmoe.train.tasks import task_of
from tests.cli.commands import run_in_process
from tests.simulation.runs import train
from tests.tiny import VOCAB, tiny

STILL = ("optim.lr=1e-30", "optim.weight_decay=0", "model.layers=1")
BIAS = 0.02
SIGMOID = ("moe.router.score=sigmoid", "moe.balance.recenter=false")
GROUPS = ("moe.router.kind=group_limited", "moe.router.groups=4", "moe.router.topk_groups=2")
NEXT = "moe.capacity.overflow=next_choice"
SCORE = ("moe.capacity.priority=score", "moe.capacity.group=global")
PLAIN = "moe.router.renormalize=false"
ADAPTIVE = ("moe.router.kind=adaptive", "moe.top_k=4", "moe.router.top_p=0.4", PLAIN)
BUDGET = ("moe.router.kind=budget", "moe.router.budget=0.2", "moe.top_k=4", PLAIN)
CASES = [
    pytest.param(SIGMOID, (NEXT, "parallel.virtual_ranks=4"), BIAS, id="sigmoid"),
    pytest.param(GROUPS, (NEXT, *SCORE), BIAS, id="groups"),
    pytest.param(
        ADAPTIVE, (NEXT, "train.micro_batch=4"), BIAS, id="adaptive", marks=pytest.mark.slow
    ),
    pytest.param(("moe.router.kind=noisy",), (NEXT,), 0.0, id="noisy", marks=pytest.mark.slow),
    pytest.param(BUDGET, (), BIAS, id="budget", marks=pytest.mark.slow),
]


def kept(trace: Trace, step: int, setting: Setting) -> np.ndarray:
    """Return the experts that compute each assignment, [N, 1, K], -1 for none."""
    offers = setting.capacity.overflow == "next_choice"
    return kept_experts(
        trace.choices(step), (trace.all_scores if offers else trace.scores)(step),
        setting.capacity, trace.spec, ranks=setting.ranks, micro_batch=setting.micro_batch,
        next_NLS=trace.next_choices(step) if offers else None,
    )  # fmt: skip


@pytest.mark.parametrize(("router", "limits", "bias"), CASES)
def test_choices_and_drops_of_another_bias_are_those_of_a_real_run(
    router: tuple[str, ...], limits: tuple[str, ...], bias: float, tmp_path: Path
) -> None:
    train(tmp_path / "before", "tracking.trace=scores", *STILL, *router)
    _, kept_FLTK = train(
        tmp_path / "run", "tracking.trace=scores", f"moe.balance.bias={bias}",
        *STILL, *router, *limits,
    )  # fmt: skip
    config = load(str(tmp_path / "run" / "resolved.yaml"))
    before, real = open_trace(tmp_path / "before"), open_trace(tmp_path / "run")
    again, own = reselected(before, config), with_next_choices(real, config)
    ranks = config.parallel.virtual_ranks
    micro = config.train.micro_batch or 8 // ranks
    setting = Setting(ranks, 1, micro, config.moe.capacity)
    found_NLK = kept_FLTK.transpose(1, 2).flatten(0, 1).numpy()
    moved, rerouted, size = 0, 0, real.spec.tokens_per_step
    for step, traffic in zip(real.steps, replay_steps(again, setting), strict=True):
        assert (again.all_scores(step) == real.all_scores(step)).all()
        chosen_NLK, found = real.choices(step), found_NLK[step * size : (step + 1) * size]
        assert (again.choices(step) == chosen_NLK).all()
        assert (kept(again, step, setting) == found).all()
        assert traffic.kept_L.tolist() == [(found >= 0).sum()]
        moved += int((chosen_NLK != before.choices(step)).sum())
        rerouted += int(((found >= 0) & (found != chosen_NLK)).sum())
        if limits:
            assert (kept(own, step, setting) == found).all()
    assert (moved > 0, rerouted > 0) == (bias > 0, bool(limits))
    assert (found_NLK < 0).any()
    if limits:
        load_of_plan = make_load(config, 1, choices=real)  # one process with all ranks
        rate = 1 - (found_NLK >= 0).sum() / sum((real.choices(s) >= 0).sum() for s in real.steps)
        assert load_of_plan.drop_rate(1, micro) == pytest.approx(float(rate))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run with a trace of scores."""
    folder = tmp_path_factory.mktemp("recorded") / "run"
    train(folder, "tracking.trace=scores", *STILL)
    return folder


def test_the_command_and_what_it_refuses(recorded: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        done = run_in_process("simulate", "--replay", str(recorded), *arguments, cwd=tmp_path)
        return done.returncode, done.stdout + done.stderr

    code, text = run("--bias", "0,0.02", "--factor", "1", NEXT, "--ranks", "2", "--json")
    assert code == 0, text
    assert '"bias": 0.02' in text
    code, text = run("--bias", "0,0.02", "--ranks", "2", "--plot", "plot.html")
    assert (code, "bias" in text) == (0, True), text
    assert "bias step 0.02" in (tmp_path / "plot.html").read_text(encoding="utf-8")
    for arguments, sentence in {
        ("--bias", "-1"): "moe.balance.bias=-1",
        ("--bias", "0.1", *GROUPS): "has other choices in step 1",
        ("--bias", "0.1", "moe.router.kind=hash"): "moe.balance.bias",
    }.items():
        code, text = run(*arguments)
        assert (code, sentence in text, text.count("\n")) == (2, True, 1), (arguments, text)


def test_a_run_that_had_a_bias_from_its_past_is_refused(recorded: Path) -> None:
    """Its bias is not in the trace: the scores alone give other choices than were made."""
    config = load(str(recorded / "resolved.yaml"), [NEXT, "moe.balance.bias=0.02"])
    trace = with_next_choices(open_trace(recorded), config)
    assert (trace.choices(0) == open_trace(recorded).choices(0)).all()
    with pytest.raises(ConfigError, match=r"other choices in step 2 .*first step"):
        trace.choices(1)


def test_it_is_a_trace_of_choices_too(recorded: Path, tmp_path: Path) -> None:
    config, trace = load(str(recorded / "resolved.yaml")), open_trace(recorded)
    for step in trace.steps:
        order = np.argsort(-trace.all_scores(step), axis=2, kind="stable")[:, :, :2]
        assert (trace.choices(step) == order).all()
        chosen = np.take_along_axis(trace.all_scores(step), order, 2)
        assert (trace.scores(step) == chosen).all()
    folder = export_trace(trace, f"megatron:{tmp_path / 'out'}", config)
    assert (open_any(folder, config).choices(1) == trace.choices(1)).all()
    parts = [replace(part, scores=None) for part in trace.parts]
    assert not Trace(trace.path, parts, trace.spec).has_all_scores
    part = next((recorded / "trace").glob("*.safetensors"))
    content = part.read_bytes()
    (tmp_path / part.name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="damaged"):
        open_trace(tmp_path)


def test_a_budget_knows_the_costs_of_unequal_experts() -> None:
    """Routing without a network selects as the layers of the model do: it had equal costs."""
    shapes = "moe.experts.shapes=[[64],[8],[64],[8],[64],[8],[64],[8]]"
    router = ("moe.router.kind=budget", "moe.router.renormalize=false", "moe.router.budget=0.4")
    config = tiny(shapes, *router, "moe.top_k=4", "moe.experts.zero=1")
    spec = ChoiceSpec("", config.train.seed, 8, 16, len(moe_blocks(config)), 9, 4)
    expert_NLK, _ = simulate._route_step(config, spec, 3)
    model = task_of(config, VOCAB).build_model(1)
    drawn = [generator(config.train.seed, "simulated tokens", 3, b) for b in range(8)]
    x_ND = torch.cat([torch.randn(16, config.model.dim, generator=g) for g in drawn])
    context = TokenContext(noise_key=(config.train.seed, 3), first_sequence=0)
    for layer, module in enumerate(model.moe_layers()):
        made = module.router(x_ND, context, BatchShape(8))
        wanted = made.expert_TK.masked_fill(~made.is_selected_TK, -1)
        assert (expert_NLK[:, layer] == wanted.numpy()).all()
        assert 0.1 < float(made.is_selected_TK.float().mean()) < 0.9, "the budget decides"
