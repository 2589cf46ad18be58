"""Traces: what they predict, how they are read, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmoe.config.errors import CheckpointError, ConfigError
from dmoe.config.load import load
from dmoe.config.router_kinds import WORKLOADS
from dmoe.config.schema import CapacityConfig, PlacementConfig
from dmoe.moe.placement import contiguous_placement
from dmoe.moe.placement_plan import plan_placement
from dmoe.replay.part import ChoiceSpec
from dmoe.replay.writer import ChoiceWriter
from dmoe.report import write_report
from dmoe.runs.metrics_log import read_metrics
from dmoe.simulation.drops import as_routing, kept_experts
from dmoe.simulation.formats import export_trace, open_any
from dmoe.simulation.oracle import best_with_copies, max_over_mean
from dmoe.simulation.replay import Setting, replay_steps
from dmoe.simulation.simulate import route_only, traffic_matrix
from dmoe.simulation.trace import Trace, by_rank, load_per_rank, open_trace, rows_of_ranks
from tests.cli.commands import SMALL, run_in_process
from tests.moe.strategies import drawn
from tests.references.capacity import apply_capacity_reference
from tests.simulation.runs import train
from tests.tiny import tiny

PERIODIC = PlacementConfig("periodic", every=1, from_="last")
STILL = ("optim.lr=1e-30", "optim.weight_decay=0")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run with a trace of choices, whose router keeps its scores."""
    folder = tmp_path_factory.mktemp("recorded") / "run"
    train(folder, "tracking.trace=choices", "moe.capacity.factor=1.5", *STILL)
    return folder


@pytest.mark.parametrize(
    "overrides",
    [
        ("moe.capacity.pool=4", "parallel.virtual_ranks=4"),
        ("moe.capacity.group=sequence",),
        ("moe.capacity.group=sequence", "moe.capacity.priority=score"),
        ("moe.capacity.group=global", "moe.capacity.priority=score", "train.micro_batch=4"),
    ],
)
def test_drops_at_another_capacity_are_those_of_a_real_run(
    overrides: tuple[str, ...], recorded: Path, tmp_path: Path
) -> None:
    """The real run has the recorded choices (`moe.replay.from`) and factor 1, not 1.5.

    By score, the first layer: what it drops changes the scores of the second.
    """
    given, config = f"moe.replay.from={recorded / 'trace'}", tiny(*overrides)
    _, kept_FLTK = train(tmp_path / "run", given, *STILL, *overrides)
    trace, ranks = open_trace(recorded), config.parallel.virtual_ranks
    micro = config.train.micro_batch or 8 // ranks
    capacity = replace(config.moe.capacity, factor=1.0)
    predicted = np.concatenate(
        [
            kept_experts(
                trace.choices(step), trace.scores(step), capacity, trace.spec,
                ranks=ranks, micro_batch=micro,
            )
            for step in trace.steps
        ]
    )  # fmt: skip
    found = kept_FLTK.transpose(1, 2).flatten(0, 1).numpy()
    assert 0.02 < (predicted < 0).mean() < 0.6
    layers = 1 if capacity.priority == "score" else 2
    assert (predicted[:, :layers] == found[:, :layers]).all()


@drawn
@given(
    seed=st.integers(0, 99),
    group=st.sampled_from(["rank", "sequence", "global"]),
    priority=st.sampled_from(["position", "score"]),
    layout=st.sampled_from([(1, 1, 4), (2, 1, 2), (2, 2, 1), (4, 4, 1), (4, 2, 1), (2, 2, 2)]),
)
def test_drops_and_traffic_equal_the_queues_walked_in_order(
    seed: int, group: str, priority: str, layout: tuple[int, int, int]
) -> None:
    random, (ranks, ep, n) = np.random.default_rng(seed), layout
    spec = ChoiceSpec("", 0, 4, 3, 2, 4, 2)
    expert_NLK = np.argsort(random.random((12, 2, 4)), axis=-1)[..., :2]
    expert_NLK[random.random(expert_NLK.shape) < 0.2] = -1
    score_NLK = random.random(expert_NLK.shape).astype(np.float32)
    capacity = CapacityConfig(0.8, group=group, priority=priority)  # type: ignore[arg-type]
    found = kept_experts(expert_NLK, score_NLK, capacity, spec, ranks=ranks, micro_batch=n)
    accumulation, tokens = 4 // (ranks * n), ranks * n * 3
    groups = {"rank": ranks, "sequence": ranks * n, "global": 1}[group]
    slots = max(1, int(np.ceil(0.8 * 2 * (tokens // groups) / 4 - 1e-9)))
    sent = np.zeros((accumulation, 2, ranks, ep), int)
    for a in range(accumulation):
        for layer in range(2):
            part = slice(a * tokens, (a + 1) * tokens), layer
            routing = as_routing(expert_NLK[part], score_NLK[part], 4)
            expected, _ = apply_capacity_reference(routing, capacity, groups, slots)
            kept_TK = expected.numpy()
            assert (np.where(kept_TK, expert_NLK[part], -1) == found[part]).all()
            for t, k in np.argwhere(kept_TK):
                owner = expert_NLK[part][t, k] // (4 // ep)
                sent[a, layer, t // (n * 3), owner] += 1
    count_BLE = spec.count(found)
    assert (by_rank(count_BLE, ranks, ep, n) == sent).all()
    rows = np.zeros((accumulation, 2, ranks), int)
    for source in range(ranks):
        for p in range(ep):
            rows[:, :, source // ep * ep + p] += sent[:, :, source, p]
    assert (rows_of_ranks(sent) == rows).all()
    assert (traffic_matrix(sent[0, 0]).sum(0) == rows[0, 0]).all()


def test_counts_say_what_choices_say(recorded: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", "tracking.trace=counts", "moe.capacity.factor=1.5", *STILL)
    counts, choices = open_trace(tmp_path / "run"), open_trace(recorded)
    assert not counts.has_choices
    assert (load_per_rank(counts, 4, 2, 1) == load_per_rank(choices, 4, 2, 1)).all()
    assert load_per_rank(choices, 4, 2, 1).sum() == 3 * 8 * 16 * 2 * 2
    for group in ("rank", "sequence"):
        for factor in (None, 1.0):
            setting = Setting(4, 2, 2, CapacityConfig(factor, group=group))  # type: ignore[arg-type]
            pairs = zip(replay_steps(counts, setting), replay_steps(choices, setting), strict=True)
            assert all((a.sent_ALWP == b.sent_ALWP).all() for a, b in pairs)
    with pytest.raises(ConfigError, match=r"tracking\.trace=choices"):
        next(replay_steps(counts, Setting(4, 2, 2, CapacityConfig(1.0, group="global"))))


@pytest.mark.parametrize("last", [2, 8])
def test_a_trace_that_goes_on_is_cut_with_its_scores(last: int, tmp_path: Path) -> None:
    spec, random = ChoiceSpec("", 0, 2, 3, 1, 8, 2), np.random.default_rng(0)
    ids = random.integers(0, 8, (4, 6, 1, 2))
    scores = random.random((*ids.shape[:-1], last)).astype(np.float32)
    for start in (0, 2):  # killed behind step 4, resumed behind step 2
        options = {"field": "tracking.trace", "all_scores": last == 8}
        writer = ChoiceWriter(tmp_path, spec, "run", start, **options)  # type: ignore[arg-type]
        for step in range(start, 4):
            writer.add(step, ids[step], "", scores[step])
        writer.flush()
    trace = open_trace(tmp_path)
    assert trace.steps == range(4)
    for step in trace.steps:
        assert (trace.choices(step) == ids[step]).all()
        read = trace.all_scores if last == 8 else trace.scores
        assert (read(step) == scores[step]).all()
        assert trace.scores(step).shape == ids[step].shape


@pytest.mark.parametrize("layout", ["flame", "megatron"])
def test_published_layouts_there_and_back(layout: str, recorded: Path, tmp_path: Path) -> None:
    if layout == "flame":
        pytest.importorskip("pyarrow")
    config, trace = load(str(recorded / "resolved.yaml")), open_trace(recorded)
    folder = export_trace(trace, f"{layout}:{tmp_path / 'out'}", config)
    again = open_any(folder, config)
    assert (again.spec.layers, again.spec.top_k) == (2, 2)
    for step in trace.steps:
        assert (again.choices(step) == trace.choices(step)).all()
    scores, wanted = again.scores(0), trace.scores(0)
    wanted = wanted if layout == "flame" else wanted / wanted.sum(-1, keepdims=True)
    assert scores == pytest.approx(wanted, rel=1e-3)
    other = tiny("moe.top_k=1", "moe.router.renormalize=false")
    with pytest.raises(ConfigError, match=r"moe\.top_k"):
        open_any(folder, other)
    damaged = next(folder.rglob("*.parquet" if layout == "flame" else "gates.pt"))
    damaged.write_bytes(damaged.read_bytes()[:-40] + bytes(40))
    with pytest.raises(CheckpointError):
        open_any(folder, config)


@pytest.mark.parametrize("code", sorted(WORKLOADS))
def test_workloads_reach_what_the_oracle_allows(code: str, tmp_path: Path) -> None:
    config = tiny(
        *("moe.router.kind=workload", f"moe.router.workload={code}", "moe.num_experts=16"),
        *("moe.router.ranks=4", "train.global_batch=32", "train.steps=5"),
    )
    route_only(config, tmp_path, 4, 4)
    load = load_per_rank(open_trace(tmp_path), 4, 4, 8)
    for step, rows_ALW in enumerate(load):
        for rows in rows_ALW[0].tolist():
            factor, best = max_over_mean(rows), best_with_copies(sum(rows), 4)
            hot = {"W2": 1.6, "W6": 1.6, "W7": 1.6 if step == 3 else 1.0, "W5": 4 / 3}
            assert factor >= best
            if code != "W1":
                assert factor == pytest.approx(hot.get(code, 1.0), abs=0.02)


def test_placement_and_copies_make_the_rows_even(recorded: Path) -> None:
    """By the planners of the run: the second step has the placement that the first one asks for."""
    trace, dropless = open_trace(recorded), CapacityConfig()
    fixed, moved, copied = (
        list(replay_steps(trace, Setting(4, 4, 2, dropless, placement)))
        for placement in (PlacementConfig(), PERIODIC, PlacementConfig(copies=2))
    )
    assert (fixed[0].sent_ALWP == moved[0].sent_ALWP).all()
    first_LE, second_LE = (trace.counts(step).sum(0) for step in (0, 1))
    for layer in range(2):
        placement = plan_placement(first_LE[layer].tolist(), contiguous_placement(8, 4))
        rows = [second_LE[layer][list(own)].sum() for own in placement.experts]
        assert moved[1].rows_ALW[0, layer].tolist() == rows
    for one, two in zip(fixed, copied, strict=True):
        assert two.copies
        assert (one.sent_ALWP.sum((2, 3)) == two.sent_ALWP.sum((2, 3))).all()
        assert (two.straggler_AL <= one.straggler_AL).all()
        assert two.straggler_AL.mean() < 1.1 < one.straggler_AL.mean()


def test_the_command(recorded: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        done = run_in_process("simulate", *arguments, cwd=tmp_path)
        return done.returncode, done.stdout + done.stderr

    code, text = run(
        *("--replay", str(recorded), "--ranks", "4,8", "--ep", "2,4", "--factor", "1,none"),
        *(
            "--group",
            "rank,sequence",
            "--placement",
            "fixed,periodic",
            "--copies",
            "0,2",
            "--plot",
            "plot.html",
        ),
    )
    assert code == 0, text
    assert len(text.splitlines()) == 2 + 2 * 2 * 2 * 2 * 3 + 1
    assert max(map(len, text.splitlines())) <= 100
    assert "Straggler factor" in (tmp_path / "plot.html").read_text(encoding="utf-8")
    refused = {
        ("--replay", str(recorded), "--ep", "3", "--ranks", "4"): (2, "--ep=3: must divide"),
        ("--replay", str(recorded), "--ranks", "3"): (2, "--ranks=3: times"),
        ("--replay", str(recorded), "moe.top_k=4"): (2, "2 experts per token (moe.top_k)"),
        ("--replay", "nowhere"): (2, "is no directory with a trace"),
        ("--ranks", "8", "--ep", "3"): (2, "parallel.ep=3: must divide the world of 8"),
        ("--factor", "1"): (2, "belongs to --replay"),
        ("--bias", "0.1"): (2, "moe.balance.bias=0.1"),
        ("--replay", str(recorded), "--bias", "0.1"): (2, "record it with tracking.trace=scores"),
        ("--replay", str(recorded), "--group", "host"): (2, "rank, sequence, global"),
        # a capacity that no config may have was replayed; a plot ended in a traceback
        ("--replay", str(recorded), "--factor", "0"): (2, "moe.capacity.factor=0"),
        ("--replay", str(recorded), "--plot", "none/x.html"): (2, "--plot=none/x.html: cannot be"),
        ("--replay", str(recorded), "--factor", "1", "moe.capacity.overflow=next_choice"): (
            2,
            "tracking.trace=scores",
        ),
    }
    for arguments, (wanted, sentence) in refused.items():
        code, text = run(*arguments)
        assert (code, sentence in text) == (wanted, True), (arguments, code, text)
        assert text.count("\n") == 1


def test_a_simulated_run_and_its_report(tmp_path: Path) -> None:
    overrides = (*SMALL, "train.run_dir=run", "train.sample_tokens=0", "train.steps=2")
    done = run_in_process(
        "simulate", *overrides, "--ranks", "4", "--ep", "2", "--json", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)["rows"]
    lines = [json.loads(line) for line in (tmp_path / "run/simulation.jsonl").open()]
    assert [(line["step"], line["layer"]) for line in lines] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    for line in lines:
        assert np.sum(line["traffic"], axis=0).tolist() == line["rows"]
        assert not np.any(np.array(line["traffic"])[:2, 2:])
    assert row["straggler_mean"] == pytest.approx(np.mean([line["straggler"] for line in lines]))
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert "Simulated ranks" in page
    assert "4 ranks, EP 2" in page
    logged = [
        line for line in read_metrics(tmp_path / "run/metrics.jsonl") if line["event"] == "train"
    ]
    dropped = [layer["drop_rate"] for line in logged for layer in line["layers"]]
    assert [line["drop_rate"] for line in lines] == pytest.approx(dropped)
    _with_damaged_lines(tmp_path / "run")


def _with_damaged_lines(run: Path) -> None:
    """A cut line ended `dmoe report` with a traceback, and one without a brace left no word."""
    texts = (run / "simulation.jsonl").read_text().splitlines()
    cut = [texts[0][:30], "nothing", texts[2].replace("straggler", "stranger"), texts[3]]
    for kept, words in ((cut, "3 line(s)"), (cut[:3], "3 line(s)"), (texts, "")):
        (run / "simulation.jsonl").write_text("\n".join(kept) + "\n")
        page = write_report([run], run / "report.html").read_text(encoding="utf-8")
        assert ("of simulation.jsonl could not be read" in page) == bool(words)
        assert words in page
        assert ("4 ranks, EP 2" in page) == (len(kept) == 4)


def test_a_cut_or_changed_trace_is_refused(recorded: Path, tmp_path: Path) -> None:
    part = next((recorded / "trace").glob("*.safetensors"))
    content = part.read_bytes()
    copy = tmp_path / part.name
    copy.write_bytes(content[:-10])
    with pytest.raises(ConfigError, match="cut off"):
        open_trace(tmp_path)
    copy.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # a score
    with pytest.raises(CheckpointError, match="damaged"):
        open_trace(tmp_path)
    copy.write_bytes(content)
    trace: Trace = open_trace(tmp_path)
    assert trace.steps == range(3)
