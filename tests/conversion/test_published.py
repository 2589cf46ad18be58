"""dmoe's transformer as Mixtral, Qwen3-MoE, Llama and Qwen3: exported, loaded, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from dmoe.checkpoint import save
from dmoe.config.errors import CheckpointError, ConfigError
from dmoe.config.load import load
from dmoe.config.schema import Config, DataConfig
from dmoe.conversion.own_config import family_of, published_config, read_published
from dmoe.conversion.own_export import export_own
from dmoe.conversion.own_import import import_own
from dmoe.conversion.own_names import pieces
from dmoe.data import open_tokenizer
from dmoe.distributed.mesh import ParallelMesh
from dmoe.distributed.state_dict import model_state
from dmoe.models.transformer import Transformer
from dmoe.runs.directory import RunDir
from dmoe.train.restore import restore_model
from tests.models.hugging_face import everything_in_float64
from tests.tiny import tiny
from tests.train.dense_run import weights

COMMON = ("model.kv_heads=1", "model.heads=4", "model.init_std=0.2", "model.norm_eps=1e-6")
COMMON += ("model.rope_base=500", "tracking.trackers=[]")
RUNS = {
    "mixtral": ("model.qk_norm=false", "model.tie_embeddings=false"),
    "mixtral tied": ("model.qk_norm=false", "moe.router.weights_from=chosen", "moe.top_k=3"),
    "qwen3_moe": ("model.head_dim=6",),
    "qwen3_moe as it is": ("moe.router.renormalize=false", "model.tie_embeddings=false"),
    "qwen3_moe with dense blocks": ("model.layers=5", "model.dense_first=1", "model.moe_every=2"),
    "llama": ("model.qk_norm=false", "model.moe_every=0", "model.dense_dim=40"),
    "qwen3": ("model.moe_every=0", "model.dense_dim=40", "moe.experts.kind=geglu"),
}


def run_of(path: Path, *overrides: str) -> RunDir:
    """Return a run with a checkpoint of step 5, without the training."""
    config, run = tiny(*COMMON, *overrides), RunDir(path)
    run.create(None)
    run.write_config(config, "")
    save(run.checkpoints, 5, model_state(weights(config), ParallelMesh()), {"step": 5})
    return run


def tokens(size: int = 256) -> Tensor:
    return torch.arange(3 * 16).view(3, 16) * 37 % size


def their_logits(folder: Path, *, exact: bool = False) -> Tensor:
    """Return the logits in transformers, `exact` in float64; no tensor is missing or left over."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, experts_implementation="eager"
    )
    assert not any(info.values()), info
    if exact:
        with everything_in_float64():
            wide = type(model)(model.config).double()
            wide.load_state_dict({key: value.double() for key, value in model.state_dict().items()})
            return logits_of(wide)
    return logits_of(model)


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(tokens()).logits
    return logits


def our_logits(run: RunDir, dtype: torch.dtype = torch.float32) -> Tensor:
    return logits_of(restore_model(run).model.to(dtype))


def text_file(folder: Path) -> str:
    """Return an override that names a text, which other tokenizers than bytes need."""
    (folder / "text.txt").write_text("the thing that they think\n" * 200)
    return f"data.source={folder / 'text.txt'}"


def target(path: Path, *overrides: str) -> Config:
    """Return the config of an imported run: the shape of the model comes from the directory."""
    given = ("data.source=synthetic:zipf", "data.seq_len=16", "train.device=cpu", *overrides)
    return load(None, [*given, f"train.run_dir={path}"])


@pytest.mark.parametrize("name", RUNS)
def test_logits_are_equal_in_transformers_and_after_the_way_back(name: str, tmp_path: Path) -> None:
    run, folder = run_of(tmp_path / "run", *RUNS[name]), tmp_path / "published"
    exported = export_own(run, folder, max_shard_bytes=20_000)
    assert exported.files > 1
    assert json.loads((folder / "config.json").read_text())["model_type"] == name.split()[0]
    ours = our_logits(run)
    assert ours.abs().max() > 1
    assert (their_logits(folder) - ours).abs().max() < 1e-5 * ours.abs().max()
    exact = our_logits(run, torch.float64)
    assert (their_logits(folder, exact=True) - exact).abs().max() < 1e-12 * exact.abs().max()
    back = import_own(folder, target(tmp_path / "back"))
    again = RunDir(Path(back.path))
    before, after = (restore_model(r).model.state_dict() for r in (run, again))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    export_own(again, tmp_path / "again", max_shard_bytes=20_000)
    for path in folder.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


@pytest.mark.parametrize("name", RUNS)
def test_the_pieces_cover_every_number_once(name: str) -> None:
    config = tiny(*COMMON, *RUNS[name])
    model = Transformer(config.model, config.moe, 256)
    count = {key: torch.zeros_like(value) for key, value in model.named_parameters()}
    for piece in pieces(model, family_of(config)):
        piece.view(count[piece.parameter]).add_(1)
    assert all((value == 1).all() for value in count.values())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ("moe.router.kind=noisy", "moe.router.kind=noisy: has no place in Mixtral or Qwen3-MoE"),
        ("moe.router.score=sigmoid", "moe.router.score=sigmoid: has no place"),
        ("moe.router.scale=2", "moe.router.scale=2.0: has no place"),
        ("moe.balance.bias=0.1", "moe.balance.bias=0.1: has no place"),
        ("moe.capacity.eval_factor=2", "moe.capacity.eval_factor=2.0: has no place"),
        ("moe.experts.shared=1", "moe.experts.shared=1: has no place"),
        ("moe.experts.zero=1", "moe.experts.zero=1: has no place"),
        ("moe.experts.kind=relu", "moe.experts.kind=relu: is not gated as in every family"),
        ("model.qk_norm=false model.moe_every=2", "model.moe_every=2: leaves dense blocks"),
        ("model.qk_norm=false model.dense_first=1", "model.dense_first=1: leaves dense blocks"),
        (
            "model.qk_norm=false moe.router.renormalize=false",
            "moe.router.renormalize=False: is not Mixtral's",
        ),
        ("modular.bank=adapter", "modular.bank=adapter: adds modules"),
    ],
)
def test_what_no_family_has_is_refused_by_name(overrides: str, words: str, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.create(None)
    run.write_config(tiny(*overrides.split()), "")
    with pytest.raises(ConfigError) as refusal:
        export_own(run, tmp_path / "out")
    assert words in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir() if "run" not in path.name] == ["latest"]


def published(folder: Path, *overrides: str) -> Path:
    export_own(run_of(folder / "run", *RUNS["mixtral"], *overrides), folder / "published")
    return folder / "published"


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "gpt2"}, "model_type=gpt2, which dmoe's own transformer is not"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"hidden_act": "relu"}, "hidden_act=relu"),
        ({"sliding_window": 8}, "sliding_window=8"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rotary positions of kind yarn"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config="),
        ({"num_attention_heads": "four"}, "num_attention_heads='four', which is no whole"),
        ({"rms_norm_eps": "small"}, "values of another type than that model's"),
    ],
)
def test_other_networks_are_refused(values: dict[str, Any], words: str, tmp_path: Path) -> None:
    """Each would load, and compute something else."""
    folder = published(tmp_path)
    edit_config(folder, **values)
    with pytest.raises(ConfigError) as refusal:
        import_own(folder, target(tmp_path / "new"))
    assert words in str(refusal.value)
    assert not (tmp_path / "new").exists()


def test_tensors_must_be_those_of_the_model(tmp_path: Path) -> None:
    folder = published(tmp_path)
    path, name = folder / "model.safetensors", "model.layers.0.self_attn.q_proj.weight"
    whole = load_file(path)
    gone = {key: value for key, value in whole.items() if key != name}
    cases = {
        "'model.layers.9.extra.weight' has no place": whole
        | {"model.layers.9.extra.weight": torch.ones(2)},
        f"{name!r} is missing": gone,
        f"{name!r} has shape [4, 32], not [32, 32]": whole | {name: whole[name][:4].clone()},
    }
    for words, tensors in cases.items():
        save_file(tensors, path)
        with pytest.raises(CheckpointError) as refusal:
            import_own(folder, target(tmp_path / "new"))
        assert words in str(refusal.value)
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["qwen3_moe as it is", "mixtral"])
def test_the_number_of_experts_has_two_names(name: str, tmp_path: Path) -> None:
    """transformers 5.23 saves a Qwen3-MoE with `num_local_experts`: import and upcycle refused it.

    Every Qwen3-MoE that its `save_pretrained` had written "has no num_experts".
    """
    export_own(run_of(tmp_path / "run", *RUNS[name]), tmp_path / "published")
    again = tmp_path / "again"
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "published").save_pretrained(again)
    import_own(again, target(tmp_path / "new"))
    content = json.loads((again / "config.json").read_text())
    for spelling in ("num_experts", "num_local_experts"):
        values = {k: v for k, v in content.items() if not k.endswith("_experts")}
        found = read_published(values | {spelling: 8}, "DIR", again)
        assert found.fields["moe.num_experts"] == 8
    (again / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="must hold a JSON object"):
        import_own(again, target(tmp_path / "other"))


def test_a_config_that_contradicts_the_directory_is_refused(tmp_path: Path) -> None:
    folder = published(tmp_path)
    with pytest.raises(ConfigError, match=r"moe\.num_experts=4: .*published has 8"):
        import_own(folder, target(tmp_path, "moe.num_experts=4"))
    with pytest.raises(ConfigError, match="is no directory of a published model"):
        import_own(tmp_path, target(tmp_path))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"holds no \*\.safetensors"):
        import_own(folder, target(tmp_path))


def test_the_byte_tokenizer_in_tokenizers(tmp_path: Path) -> None:
    folder, ours = published(tmp_path), open_tokenizer(DataConfig())
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "def f(x):\n\treturn 'na\u00efve \u4e2d\u6587 \U0001f600'\0  \r\n" + "".join(
        map(chr, range(1, 300))
    )
    ids = ours.encode(text.encode())
    assert np.array_equal(theirs.encode(text).ids, ids)
    assert theirs.decode(ids.tolist()) == ours.decode(ids.tolist()) == text.replace("\0", "")
    assert theirs.get_vocab_size() == 256
    auto = transformers.AutoTokenizer.from_pretrained(folder)
    assert auto(text)["input_ids"] == ids.tolist()
    assert (auto.eos_token_id, len(auto)) == (0, 256)
    again = open_tokenizer(DataConfig(tokenizer=str(folder / "tokenizer.json")))
    assert (again.vocab_size, again.separator) == (256, 0)
    assert np.array_equal(again.encode(text.encode()), ids)


def test_a_tokenizer_without_a_separator_gets_the_one_of_the_run(tmp_path: Path) -> None:
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet)
    bpe.train_from_iterator(["the thing that they think"] * 9, trainer)
    path = tmp_path / "bpe.json"
    bpe.save(str(path))
    given = open_tokenizer(DataConfig(tokenizer=str(path)))
    folder = tmp_path / "published"
    export_own(run_of(tmp_path / "run", f"data.tokenizer={path}"), folder)
    auto = transformers.AutoTokenizer.from_pretrained(folder)
    assert (auto.eos_token_id, len(auto)) == (given.separator, given.vocab_size)
    back = import_own(folder, target(tmp_path / "back", text_file(tmp_path)))
    config: Config = restore_model(RunDir(Path(back.path))).config
    assert config.data.tokenizer == str(folder / "tokenizer.json")
    assert back.notes == []


def test_rows_that_no_token_has_are_left_out_and_said(tmp_path: Path) -> None:
    """Published embeddings are often padded: Qwen's has 267 rows more than tokens."""
    folder = published(tmp_path)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], torch.ones(8, 32)])
    save_file(tensors, path)
    edit_config(folder, vocab_size=264)
    back = import_own(folder, target(tmp_path / "back", text_file(tmp_path)))
    assert back.notes == ["8 rows of the embedding that no token of the tokenizer has are left out"]
    ours = our_logits(RunDir(Path(back.path)))
    assert torch.allclose(their_logits(folder)[..., :256], ours, atol=1e-4)


def test_files_in_bfloat16(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run")
    export_own(run, tmp_path / "published", dtype="bfloat16")
    tensors = load_file(tmp_path / "published" / "model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.bfloat16}
    with pytest.raises(ConfigError, match="--dtype=int8: must be float32, bfloat16, float16"):
        export_own(run, tmp_path / "other", dtype="int8")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        export_own(run, tmp_path / "published")


def test_generation_in_transformers(tmp_path: Path) -> None:
    """The directory generates as it is, and stops nowhere but at the separator."""
    folder = published(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    out = model.generate(tokens()[:1], max_new_tokens=4, do_sample=False)
    assert out.shape[1] <= 20
    assert published_config(tiny(*COMMON), 256, 0)["eos_token_id"] == 0
