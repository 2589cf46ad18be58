"""Export of a checkpoint as a published directory; ten wrong conversions, each is found."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dmoe.checkpoint import save
from dmoe.checkpoint.tensor_reader import TensorReader
from dmoe.config.errors import CheckpointError, ConfigError
from dmoe.hf import export
from dmoe.hf.adapters import trim_identities
from dmoe.hf.compare import Comparison, compare_directories
from dmoe.hf.disk_format import DiskFormat
from dmoe.hf.published import PublishedDirectory
from tests.cli.commands import run_in_process
from tests.hf.families import FAMILIES, read
from tests.hf.tiny_hf import save_tokenizer, tiny_directory, tokens

Tensors = dict[str, Tensor]
MTP = "model.layers.61.eh_proj.weight"
"""A tensor that transformers' class does not know, as of multi-token prediction."""


def make_source(family: str, folder: Path, *, mtp: bool = False, **changes: Any) -> Path:
    """Save a tiny model with a tokenizer; with `mtp`, a tensor that its class ignores."""
    tiny_directory(family, folder, **changes)
    save_tokenizer(folder)
    if mtp:
        file = folder / "model.safetensors"
        tensors = load_file(file) | {
            MTP: torch.randn(32, 64, generator=torch.Generator().manual_seed(3))
        }
        save_file(tensors, file, {"format": "pt"})
    return folder


def make_checkpoint(source: Path, folder: Path, noise: float = 0.0) -> Path:
    """Save a checkpoint as of a run from the source, its weights trained by adding noise."""
    model = read(source)
    trim_identities(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * torch.randn(parameter.shape, generator=generator)
    state = {f"model.network.{name}": value for name, value in model.state_dict().items()}
    for name, value in weights(source).items():
        if name.endswith("balancing_biases"):  # transformers sets the last one to -1
            state[f"model.network.{name}"] = value.float()
    return save(folder, 1, state, {"config": {"model": {"source": str(source)}}})


def weights(folder: Path) -> Tensors:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_import_and_export_are_the_identity(family: str, tmp_path: Path) -> None:
    """The same bytes by the same names, in bfloat16 too; it loads, and generates the same."""
    from transformers import AutoTokenizer

    source = make_source(
        family,
        tmp_path / "source",
        mtp=family == "deepseek_v3",
        dtype=torch.bfloat16,
        vocab_size=259,
    )
    checkpoint = make_checkpoint(source, tmp_path / "checkpoints")
    out = tmp_path / "out"
    done = export.export_checkpoint(checkpoint, source, out, max_shard_bytes=50_000)
    ours, theirs = weights(out), weights(source)
    assert ours.keys() == theirs.keys()
    assert all(
        torch.equal(ours[n].view(torch.uint8), v.view(torch.uint8)) for n, v in theirs.items()
    )
    assert done.files > 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints", "out", "source"]
    model, info = read(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    before = read(source)
    prompt = tokens(1, 6)
    assert torch.equal(model.eval()(prompt).logits, before.eval()(prompt).logits)
    assert model.generate(prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (
        1,
        9,
    )
    assert (
        AutoTokenizer.from_pretrained(out).chat_template
        == AutoTokenizer.from_pretrained(source).chat_template
    )
    if family == "deepseek_v3":
        assert done.copied == [MTP]
        assert "copied from the source" in " ".join(done.notes)


def swapped_gate_and_up(t: Tensors) -> Tensors:
    a, b = (f"model.layers.1.mlp.experts.3.{n}_proj.weight" for n in ("gate", "up"))
    return t | {a: t[b], b: t[a]} if a in t else t


def one_expert_twice(t: Tensors) -> Tensors:
    one, two = (f"model.layers.1.mlp.experts.{n}.down_proj.weight" for n in (1, 2))
    return t | {two: t[one].clone()} if two in t else t


def transposed(t: Tensors) -> Tensors:
    name = "model.layers.1.self_attn.o_proj.weight"
    return t | {name: t[name].t()} if name in t else t


def missing_shared_expert(t: Tensors) -> Tensors:
    return {n: v for n, v in t.items() if "shared_experts" not in n}


def dropped_bias(t: Tensors) -> Tensors:
    return {n: v for n, v in t.items() if not n.endswith("gate_up_proj_bias")}


def router_in_bf16(t: Tensors) -> Tensors:
    return {n: v.bfloat16().float() if n.endswith("mlp.gate.weight") else v for n, v in t.items()}


def untied_head(t: Tensors) -> Tensors:
    name = "model.embed_tokens.weight"
    return t | {"lm_head.weight": t[name] + 0.01} if name in t else t


def ignored_interleaving(t: Tensors) -> Tensors:
    def halves(value: Tensor) -> Tensor:
        return torch.cat([value[..., ::2], value[..., 1::2]], -1)

    return {n: halves(v) if n.endswith("experts.gate_up_proj") else v for n, v in t.items()}


def experts_of_rank_0(t: Tensors) -> Tensors:
    changed = dict(t)
    for name in t:
        for expert in range(4, 8):
            if f".experts.{expert}." in name:
                changed[name] = t[name.replace(f".experts.{expert}.", f".experts.{expert - 4}.")]
    return changed


def no_mtp(t: Tensors) -> Tensors:
    return t


BUGS: list[tuple[Callable[[Tensors], Tensors], str, str]] = [
    (swapped_gate_and_up, "deepseek_v3", "gate_proj.weight is not what the source has there"),
    (one_expert_twice, "deepseek_v3", r"experts.2.down_proj.weight is a copy of \S+experts.1.down_proj"),
    (transposed, "mixtral", "o_proj.weight of the source, transposed"),
    (missing_shared_expert, "deepseek_v3", r"shared_experts\S+ (is missing|was not written)"),
    (dropped_bias, "gpt_oss", r"gate_up_proj_bias\S* (is missing|was not written)"),
    (router_in_bf16, "deepseek_v3", "gate.weight is rounded to bfloat16"),
    (untied_head, "tied", r"lm_head.weight'? is new"),
    (no_mtp, "deepseek_v3", r"eh_proj.weight'? (is missing|was not written)"),
    (ignored_interleaving, "gpt_oss", "gate_up_proj of the source, de-interleaved"),
    (experts_of_rank_0, "deepseek_v3", r"experts.4.\S+ is a copy of \S+experts.0."),
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Source and checkpoint of a little training, of each family that the bugs need."""
    found = {}
    for family, changes in {
        "deepseek_v3": {},
        "gpt_oss": {},
        "mixtral": {"head_dim": 8},
        "tied": {"tie_word_embeddings": True},
    }.items():
        folder = tmp_path_factory.mktemp(family)
        name = "mixtral" if family == "tied" else family
        source = make_source(name, folder / "source", mtp=family == "deepseek_v3", **changes)
        found[family] = source, make_checkpoint(source, folder / "checkpoints", noise=0.02)
    return found


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "mixtral", "tied"])
def test_a_little_training_is_no_problem(
    family: str, trained: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    source, checkpoint = trained[family]
    export.export_checkpoint(checkpoint, source, tmp_path / "out")
    result = compare_directories(PublishedDirectory(tmp_path / "out"), PublishedDirectory(source))
    assert result.problems == []
    # everything but the tensor that the class does not know, and the buffers, which are not trained
    assert result.changed >= result.tensors - 2 * (family == "deepseek_v3")


@pytest.mark.parametrize(
    ("bug", "family", "sentence"), BUGS, ids=[bug.__name__ for bug, _, _ in BUGS]
)
def test_a_wrong_conversion_is_found(
    bug: Callable[[Tensors], Tensors],
    family: str,
    sentence: str,
    trained: dict[str, tuple[Path, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the export, which then leaves nothing; and by `checkpoint verify --against`."""
    source, checkpoint = trained[family]
    out, right = tmp_path / "out", export.converted

    def wrong(layout: DiskFormat, *args: Any) -> Iterator[tuple[str, Tensor]]:
        yield from bug(dict(right(layout, *args))).items()

    monkeypatch.setattr(export, "converted", wrong)
    if bug is no_mtp:
        init = DiskFormat.__init__

        def forgets(self: DiskFormat, *args: Any) -> None:
            init(self, *args)
            self.unknown = []

        monkeypatch.setattr(DiskFormat, "__init__", forgets)
    with pytest.raises(CheckpointError, match=sentence):
        export.export_checkpoint(checkpoint, source, out)
    assert list(tmp_path.iterdir()) == []
    # the same without the export's own check
    monkeypatch.setattr(export, "compare_directories", lambda *_: Comparison())
    monkeypatch.setattr(export, "check_complete", lambda *_: None)
    export.export_checkpoint(checkpoint, source, out)
    found = compare_directories(PublishedDirectory(out), PublishedDirectory(source)).problems
    assert any(re.search(sentence, problem) for problem in found), found


def test_the_command_exports_and_verifies(
    trained: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    source, checkpoint = trained["mixtral"]
    out = tmp_path / "out"
    done = run_in_process("checkpoint", "export", str(checkpoint), "--to", str(out), cwd=tmp_path)
    assert done.returncode == 0, done
    assert "65 tensors in 1 file" in done.stdout
    again = run_in_process("checkpoint", "export", str(checkpoint), "--to", str(out), cwd=tmp_path)
    assert again.returncode == 2
    assert "exists and is not empty" in again.stderr
    fine = run_in_process("checkpoint", "verify", str(out), "--against", str(source), cwd=tmp_path)
    assert fine.returncode == 0
    assert "each at its place" in fine.stdout
    broken = weights(out)
    broken["model.norm.weight"][0] = float("nan")
    save_file(broken, out / "model.safetensors")
    bad = run_in_process(
        "checkpoint", "verify", str(out), "--against", str(source), "--json", cwd=tmp_path
    )
    assert bad.returncode == 3
    assert not json.loads(bad.stdout)["ok"]


PLANTED: list[tuple[str, Any, str]] = [
    ("rope_parameters.rope_theta", 5.0, "rope_parameters.rope_theta=5.0, and 10000.0 in the"),
    ("num_experts_per_tok", 1, "num_experts_per_tok=1, and 2 in the source"),
    ("norm_topk_prob", False, "norm_topk_prob=False, and True in the source"),
    ("tie_word_embeddings", True, "tie_word_embeddings=True, and False in the source"),
    ("routed_scaling_factor", None, "no routed_scaling_factor, which is 1.5 in the source"),
    ("dtype", "bfloat16", "dtype=bfloat16, and float32 in the source"),
    ("first_k_dense_replace", True, "first_k_dense_replace=True, and 1 in the source"),
    ("of_tomorrow", 1, "of_tomorrow=1, and the source has none"),
]


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A published directory, and a copy of it by another version of transformers."""
    folder = tmp_path_factory.mktemp("copied")
    source = make_source("deepseek_v3", folder / "source")
    (source / "generation_config.json").write_text('{"do_sample": false}')
    shutil.copytree(source, folder / "copy")
    config = json.loads((source / "config.json").read_text()) | {"transformers_version": "9.0"}
    (folder / "copy" / "config.json").write_text(json.dumps(config, sort_keys=True))
    (folder / "copy" / "README.md").write_text("of another hand")
    return source, folder / "copy"


@pytest.mark.parametrize(("key", "value", "sentence"), PLANTED, ids=[key for key, *_ in PLANTED])
def test_another_config_is_found(
    key: str, value: Any, sentence: str, copied: tuple[Path, Path]
) -> None:
    """One sentence, and no other: every key counts, those of a part too."""
    source, copy = copied
    file, *parts = copy / "config.json", *key.split(".")
    text = file.read_text()
    config = json.loads(text)
    owner = config[parts[0]] if len(parts) > 1 else config
    owner[parts[-1]] = value
    if value is None:
        del owner[parts[-1]]
    file.write_text(json.dumps(config))
    result = compare_directories(PublishedDirectory(copy), PublishedDirectory(source))
    file.write_text(text)
    assert [problem for problem in result.problems if sentence in problem] == result.problems
    assert len(result.problems) == 1
    assert compare_directories(PublishedDirectory(copy), PublishedDirectory(source)).problems == []


def test_another_tokenizer_and_generation_config_are_found(
    copied: tuple[Path, Path], tmp_path: Path
) -> None:
    source, copy = copied
    broken = shutil.copytree(copy, tmp_path / "broken")
    (broken / "generation_config.json").write_text('{"do_sample": true}')
    (broken / "tokenizer.json").unlink()
    (broken / "merges.txt").write_text("a b")
    bad = run_in_process(
        "checkpoint", "verify", str(broken), "--against", str(source), cwd=tmp_path
    )
    assert bad.returncode == 3
    assert bad.stdout.splitlines() == [
        "generation_config.json has other bytes than the source's",
        "merges.txt is new, and is not in the source",
        "tokenizer.json is missing, and is in the source",
    ]


def test_what_does_not_fit_is_refused_and_leaves_nothing(
    trained: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    (mixtral, checkpoint), (other, _) = trained["mixtral"], trained["gpt_oss"]
    with pytest.raises(CheckpointError, match="is it a run of this source"):
        export.export_checkpoint(checkpoint, other, tmp_path / "out")
    with pytest.raises(ConfigError, match="parent directory does not exist"):
        export.export_checkpoint(checkpoint, mixtral, tmp_path / "a" / "out")
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        export.export_checkpoint(checkpoint, tmp_path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_source_whose_config_has_changed_is_refused(
    trained: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """Another `num_experts_per_tok` in the source's config.json since the training.

    Resuming refused it; the export copied it, and computed something else than the run.
    """
    source, checkpoint = trained["mixtral"]
    reader = TensorReader(checkpoint)
    extra = {"config": {"model": {"source": str(source)}, "moe": {"top_k": 3}}}
    changed = save(tmp_path, 1, {name: reader.read(name) for name in reader.tensors}, extra)
    with pytest.raises(CheckpointError, match=r"moe\.top_k=2, and the run was trained with 3"):
        export.export_checkpoint(changed, source, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def quantize(source: Path, method: str) -> None:
    """Replace experts' weights by codes and scales as FP8 and MXFP4 files have them (of no use)."""
    tensors: Tensors = {}
    for name, value in weights(source).items():
        if method == "fp8" and ".experts." in name:
            tensors[name] = value.to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.ones(1, 1)
        elif method == "mxfp4" and name.endswith(("gate_up_proj", "down_proj")):
            tensors[f"{name}_blocks"] = torch.zeros(8, 4, 1, 16, dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.zeros(8, 4, 1, dtype=torch.uint8)
        else:
            tensors[name] = value
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    quantization = {"quant_method": method, "weight_block_size": [128, 128]}
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


@pytest.mark.parametrize(("method", "family"), [("fp8", "mixtral"), ("mxfp4", "gpt_oss")])
def test_a_quantized_source_is_exported_as_bfloat16(
    method: str, family: str, tmp_path: Path
) -> None:
    """All weights are there, none is quantized, the config agrees, and a note says so."""
    source = make_source(family, tmp_path / "source", dtype=torch.bfloat16)
    before = weights(source)
    checkpoint = make_checkpoint(source, tmp_path / "checkpoints")
    quantize(source, method)
    done = export.export_checkpoint(checkpoint, source, tmp_path / "out")
    assert "the source is quantized; the export is bfloat16" in done.notes
    ours = weights(tmp_path / "out")
    assert ours.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in ours.items())
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    del ours["model.layers.1.input_layernorm.weight"]
    lost = next(name for name in ours if ".experts." in name)
    del ours[lost]
    save_file(ours, tmp_path / "out" / "model.safetensors")
    found = compare_directories(PublishedDirectory(tmp_path / "out"), PublishedDirectory(source))
    assert "2 tensors are" in found.problems[0]


def test_a_source_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    source = make_source("mixtral", tmp_path / "source")
    checkpoint = make_checkpoint(source, tmp_path / "checkpoints")
    kept = {n: v for n, v in weights(source).items() if "w2" not in n}
    save_file(kept, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"experts\.down_proj: has no tensor for it"):
        export.export_checkpoint(checkpoint, source, tmp_path / "out")
