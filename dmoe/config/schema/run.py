"""The run: parallelism, data, steps, optimizer.

Letters: W world size, V virtual ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Optional, Union

from dmoe.config.schema.constraints import (
    above,
    at_least,
    at_most,
    below,
    fraction,
    one_of,
    only_for,
)

# OmegaConf evaluates these annotations and accepts Optional and Union, not `X | Y`.

YEAR = 365 * 24 * 3600
"""In seconds: torch takes timeouts as 64-bit nanoseconds."""


@dataclass(frozen=True)
class PlacementConfig:
    """The ranks of an EP group that hold an expert; docs/balance.md."""

    kind: Literal["fixed", "periodic"] = "fixed"
    """fixed: every rank keeps its run of experts. periodic: experts move between the ranks of an
    EP group so that their expected load is even; the model that is trained is the same."""
    every: Annotated[int, only_for("parallel.placement.kind", "periodic"), at_least(1)] = 100
    """periodic: optimizer steps between two moves."""
    from_: Annotated[Literal["ema", "last"], only_for("parallel.placement.kind", "periodic")] = (
        "ema"
    )
    """periodic: the load that is expected: the running mean of the rows of each expert, over about
    `every` steps (ema), or those of the last step."""
    copies: Annotated[Union[int, str], at_least(0), at_most(64)] = 0
    """Spare slots per rank: in every forward of a layer, hot experts are copied to the slots of
    other ranks, which share their rows, until all ranks have equally many; the copies' gradients
    are added to the expert's. Same choices and drops, same numbers within rounding. auto: only
    copies that save more time than they take. Needs moe.exchange=packed."""
    break_even: Annotated[
        Optional[int], only_for("parallel.placement.copies", "auto"), at_least(1)
    ] = None
    """copies=auto: rows that a copy has to take over so that it pays. Default: measured when the
    run starts; set it to repeat a run bit for bit."""


@dataclass(frozen=True)
class ExchangeConfig:
    """Options of the exchange of tokens between ranks; docs/parallel.md."""

    overlap: bool = False
    """Compute while rows are under way: the shared experts, in forward and backward, and in the
    backward the experts' weight gradients. Same numbers, 3 expert_dim more of them per row in the
    backward of a layer."""
    chunks: Annotated[int, at_least(1), at_most(1 << 16)] = 1
    """Send rows in this many chunks of local experts, which compute one chunk while others are
    under way, in forward and backward. Same numbers and bytes, chunks times as many all-to-alls of
    rows. Must divide the experts of a rank."""
    levels: Annotated[int, at_least(1), at_most(2)] = 1
    """2: rows go inside their node first, to the rank with the place of the destination, and then
    between nodes: one message per other node in place of one per rank there, as many times larger.
    Same numbers, twice the all-to-alls. For EP groups of several whole nodes."""
    once_per_rank: bool = False
    """Send a token once to each rank that has one of its experts, not once per choice, and return
    one sum per such rank: a quarter of the bytes at top_k=8 and ep=2, two thirds at ep=8. Same
    choices and drops, same numbers within rounding. Needs moe.exchange=packed."""
    library: Literal["torch", "deep_ep"] = "torch"
    """deep_ep: the package DeepEP moves the tokens, with kernels of its own between GPUs; rows and
    numbers are those of once_per_rank, in bfloat16. Needs moe.exchange=packed and
    train.precision=bf16."""
    wire: Literal["full", "bf16"] = "full"
    """bf16: rows, and their gradients on the way back, are rounded to bfloat16 when they are sent
    between ranks, half the bytes of float32. Only for train.precision=fp32."""


@dataclass(frozen=True)
class ParallelConfig:
    ep: Annotated[Union[int, str], at_most(1 << 20)] = "auto"
    """Expert-parallel size: ranks that share one copy of the experts. Must divide the world size
    and num_experts (experts of different shapes: at most num_experts). auto: the largest such
    number."""
    mode: Literal["ddp", "fsdp"] = "ddp"
    """ddp replicates everything but the experts on every rank; fsdp (FSDP2) shards it over all
    ranks, and the experts over their replicas."""
    virtual_ranks: Annotated[int, at_least(1), at_most(1 << 16)] = 1
    """Routing groups per process: W processes with V virtual ranks train exactly as W*V processes
    with one."""
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    exchange: ExchangeConfig = field(default_factory=ExchangeConfig)
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """Communication library; auto is nccl on CUDA and gloo on CPU."""
    start_timeout: Annotated[float, at_most(YEAR, " seconds, a year", "use 600"), above(0)] = 600.0
    """Seconds that a rank waits for the others until the first step is done."""
    timeout: Annotated[float, at_most(YEAR, " seconds, a year", "use 600"), above(0)] = 120.0
    """Seconds that a rank waits for the others after the first step."""


@dataclass(frozen=True)
class DataConfig:
    source: str = "stdlib"
    """stdlib (the source of Python's standard library), guide:LANG (Debian's installation guide in
    one language), files, directories or globs of text or of records (JSON Lines, CSV, Parquet,
    Arrow, also compressed), hf:NAME (a Hugging Face dataset), separated by commas; upper:ENTRY is
    one of these in upper case. Or a directory of shards, synthetic:KIND, or a class of your own
    (docs/plugins.md). For train.task=classification: a table of your own (CSV, Parquet, ...),
    sklearn:digits, sklearn:wine, sklearn:breast_cancer or synthetic:clusters."""
    text_field: Annotated[Optional[str], only_for("train.task", "language_modelling")] = None
    """Field or column of records that is the text. Default: text; of a table without that column
    its only column of strings."""
    label_field: Optional[str] = None
    """Field or column of records that is the label: the class for train.task=classification, else
    the domain of the document. Default: the file is the domain."""
    validation_source: Optional[str] = None
    """Entries, as in source, that are the held-out split; data.holdout is then not used. A document
    that source has too is left out of training."""
    format: Annotated[Literal["text", "instruct"], only_for("train.task", "language_modelling")] = (
        "text"
    )
    """text; or instruct: conversations (messages, or prompt and completion), of which only the
    answers are predicted (docs/instruct.md)."""
    chat_template: Annotated[Optional[str], only_for("data.format", "instruct")] = None
    """instruct: a file with a Jinja template, or chatml. Default: that of the tokenizer."""
    streams: Annotated[list[str], only_for("train.task", "classification")] = field(
        default_factory=list
    )
    """classification: streams of the source to read, in this order, e.g. [pixels, strokes].
    Default: its first one."""
    columns: Annotated[list[str], only_for("train.task", "classification")] = field(
        default_factory=list
    )
    """classification: columns of numbers of a table of your own that are the features. Default: all
    but data.label_field. Filled in when the run starts."""
    classes: Annotated[list[str], only_for("train.task", "classification")] = field(
        default_factory=list
    )
    """classification: the values of data.label_field, in the order of the logits. Default: those
    that the file has, sorted. Filled in when the run starts."""
    seq_len: Annotated[int, at_least(1), at_most(1 << 27)] = 128
    """Tokens per sequence; each token predicts the next one."""
    tokenizer: Annotated[str, only_for("train.task", "language_modelling")] = "bytes"
    """bytes, a tokenizers .json file, or a tiktoken rank file (.tiktoken, or Mistral's
    tekken.json), or a class of your own."""
    tokenizer_vocab: Annotated[
        Optional[int], only_for("train.task", "language_modelling"), above(0), at_most(1 << 24)
    ] = None
    """Keep only the first n entries of a tiktoken vocabulary (any n >= 256 is a valid byte-pair
    encoding)."""
    holdout: Annotated[float, fraction("()", fix="use 0.05")] = 0.05
    """Share of the documents (of a table: samples) that is held out from training, chosen by a hash
    of their content. Of fewer than 50 documents: share of each, its end."""
    document_mask: Annotated[Optional[bool], only_for("train.task", "language_modelling")] = None
    """Documents that share a sequence do not see each other: attention and positions end at their
    boundaries. Default: on for shards that hold the boundaries and for instruct, off for text.
    instruct: off gives each conversation a sequence of its own."""
    temperature: Annotated[
        Optional[float], only_for("train.task", "language_modelling"), above(0)
    ] = None
    """Draw each sample's domain with p ~ n^(1/t), where n is its number of sequences: 1 is
    proportional to size, larger is flatter. Default: every sequence is read once per epoch."""
    weights: Annotated[dict[str, float], only_for("train.task", "language_modelling")] = field(
        default_factory=dict
    )
    """Share of each domain in the samples, in proportion, e.g. {code: 3, books: 1}; every domain of
    source has one. Default: in proportion to their size, or as temperature says."""
    eval_source: Annotated[Optional[str], only_for("train.task", "language_modelling")] = None
    """Further entries, as in source, used only for evaluation."""
    source_options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of a source of your own."""
    tokenizer_options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of a tokenizer of your own."""


@dataclass(frozen=True)
class TrainConfig:
    task: Literal["language_modelling", "classification"] = "language_modelling"
    """The task: predict the next token, or the class of a sample (data.source=sklearn:digits,
    synthetic:clusters)."""
    steps: Annotated[int, at_least(1)] = 600
    """Optimizer steps. A run with more of them than before has the schedule of its new length."""
    global_batch: Annotated[int, at_least(1), at_most(1 << 30)] = 24
    """Sequences per optimizer step, over all ranks and accumulation steps; independent of the world
    size."""
    micro_batch: Annotated[Optional[int], above(0), at_most(1 << 30)] = None
    """Sequences per forward pass of a (virtual) rank. Default: all of its share; with fewer,
    gradients are accumulated."""
    seed: Annotated[int, at_least(0), at_most((1 << 63) - 1)] = 0
    """Seed of initialization, data order and noise."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto is bf16 where the hardware has it and it is faster (CUDA; CPUs with avx512_bf16 or amx
    from model.dim=512 on), else fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is cuda if a GPU is visible."""
    run_dir: Optional[str] = None
    """Directory of the run. Default: a new directory under runs/. A run in a directory with a
    checkpoint is resumed."""
    deterministic: bool = False
    """Use only deterministic kernels on GPUs, which are slower: then a run there can be repeated,
    and resumed, bit for bit. On a CPU it always can."""
    recompute: Literal["none", "activation", "experts", "block"] = "none"
    """Compute again in the backward what the forward then does not keep: activation (the activated
    rows of the experts, always so on a CPU), experts (their hidden rows too) or block (all but each
    block's input). true and false are old spellings of block and none."""
    offload: Literal["none", "activations"] = "none"
    """activations: keep what the blocks save for the backward in pinned main memory, not on the
    GPU."""
    log_every: Annotated[int, at_least(1)] = 10
    """Steps between two metric lines."""
    eval_every: Annotated[int, at_least(0)] = 300
    """Steps between two evaluations; one more at the end. 0: only at the end."""
    eval_first: bool = False
    """Evaluate before the first step too, e.g. a frozen base model without trained modules."""
    eval_sequences: Annotated[int, at_least(1), at_most(1 << 30)] = 512
    """Held-out sequences per evaluation."""
    sample_prompt: Annotated[str, only_for("train.task", "language_modelling")] = "def "
    """Prompt of the text that is generated at the end of a run."""
    sample_tokens: Annotated[int, at_least(0), at_most(1 << 20)] = 160
    """Tokens of that text; 0: none."""
    profile_steps: list[int] = field(default_factory=list)
    """Steps, counted from 1, of which a torch profiler trace is written to logs/, e.g. [20]."""
    profile_ranks: list[int] = field(default_factory=list)
    """Ranks that write a trace. Default: all."""

    def __post_init__(self) -> None:
        if isinstance(self.recompute, bool):
            object.__setattr__(self, "recompute", "block" if self.recompute else "none")


@dataclass(frozen=True)
class OptimConfig:
    lr: Annotated[float, above(0)] = 0.004
    """Peak learning rate."""
    beta1: Annotated[float, fraction(), below(1)] = 0.9
    """Decay of AdamW's first moment."""
    beta2: Annotated[float, fraction(), below(1)] = 0.95
    """Decay of AdamW's second moment."""
    eps: Annotated[float, above(0)] = 1e-8
    """AdamW's epsilon."""
    weight_decay: Annotated[float, at_least(0)] = 0.1
    """Decoupled weight decay of matrices; norms, routers and embeddings have none."""
    clip: Annotated[Optional[float], above(0)] = 1.0
    """Maximum global gradient norm; null: no clipping."""
    schedule: Annotated[str, one_of("cosine", "linear", "wsd", "constant", "inverse_sqrt")] = (
        "cosine"
    )
    """Learning rate after the warmup; wsd stays at the peak and decays over the last decay_fraction
    of the steps; inverse_sqrt falls with sqrt(warmup / step), whatever the number of steps."""
    warmup: Annotated[int, at_least(0)] = 50
    """Steps of linear warmup."""
    min_lr_ratio: Annotated[float, fraction()] = 0.05
    """Final (inverse_sqrt: lowest) learning rate, as a share of the peak."""
    decay_fraction: Annotated[float, fraction()] = 0.2
    """Share of the steps in which wsd decays."""
    schedule_options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of a schedule of your own."""
    kind: Annotated[str, one_of("adamw", "muon")] = "adamw"
    """adamw; or muon, which orthogonalises the update of each matrix, every expert's alone, and
    updates embeddings, norms, routers, the output and vectors by AdamW."""
    moments: Annotated[Literal["fp32", "bf16"], only_for("optim.kind", "adamw")] = "fp32"
    """bf16: AdamW's two moments are kept in bfloat16, rounded up or down at random so that their
    expectation is exact; the same bits on any number of ranks. 4 bytes less per weight."""
    offload: Annotated[bool, only_for("optim.kind", "adamw")] = False
    """AdamW's moments are in the main memory of the host, and a step copies them to the GPU and
    back, in buckets. The same bits, 8 bytes less per weight on the GPU, which it needs."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of an optimizer of your own."""
    momentum: Annotated[float, only_for("optim.kind", "muon"), fraction("[)")] = 0.95
    """muon: decay of the momentum."""
    groups: dict[str, dict[str, float]] = field(default_factory=dict)
    """Own lr (the peak) and weight_decay of the parameters whose name a pattern matches, the first
    of several, e.g. {"*.router.*": {lr: 0.001}, "*.experts.*": {weight_decay: 0}}."""
    trainable: Annotated[list[str], only_for("modular.bank", "none")] = field(default_factory=list)
    """Patterns of the names of the parameters that are trained, e.g. ["*.experts.*"]; all others
    keep their values. Empty: all are trained."""
