"""How it is trained: ranks, data, steps, optimizer.

Letters: W world size, EP expert-parallel degree.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Optional, Union

# OmegaConf reads these annotations at run time and knows Optional and Union, not the `X | Y` of strings: hence typing's names.


@dataclass(frozen=True)
class ParallelConfig:
    ep: Union[int, str] = "auto"
    """Ranks that share one copy of the experts; must divide the world and num_experts (experts of different shape: at most so many
    ranks). auto: the largest number that does."""
    mode: Literal["ddp", "fsdp"] = "ddp"
    """ddp keeps a copy of everything but the experts on every rank; fsdp (FSDP2) shards it over all ranks, and the experts over
    their copies."""
    virtual_ranks: int = 1
    """Routing groups inside each process: W processes with V virtual ranks train exactly as W*V processes with one."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """Communication library; auto is nccl on CUDA and gloo on CPU."""
    start_timeout: float = 600.0
    """Seconds a rank waits for the others until the first step is done."""
    timeout: float = 120.0
    """Seconds a rank waits for the others afterwards."""


@dataclass(frozen=True)
class DataConfig:
    source: str = "stdlib"
    """stdlib (Python's own source), guide:LANG (Debian's installation guide in one language), text files or globs, separated by
    commas; upper:ENTRY is one of these in capitals. Or a directory of shards, or synthetic:KIND. For
    train.task=classification: sklearn:digits, sklearn:wine, sklearn:breast_cancer or synthetic:clusters."""
    streams: list[str] = field(default_factory=list)
    """classification: streams of the source that are read, in this order, e.g. [pixels, strokes]. Default: its first one."""
    seq_len: int = 128
    """Tokens a sequence; each token predicts the next one."""
    tokenizer: str = "bytes"
    """bytes, a tokenizers .json file, or a tiktoken rank file (.tiktoken, or Mistral's tekken.json)."""
    tokenizer_vocab: Optional[int] = None
    """Keep only the first n entries of a tiktoken vocabulary (any n >= 256 is a valid byte-pair encoding)."""
    holdout: float = 0.05
    """Share of the files (samples, of a table), chosen by a hash of their content, that training never sees."""
    temperature: Optional[float] = None
    """Draw each sample's domain with p ~ n^(1/t), n its sequences: 1 in proportion to size, larger flatter. Default: every sequence
    is read once an epoch."""
    eval_source: Optional[str] = None
    """Further entries, as in source, whose text is only evaluated, never trained on."""


@dataclass(frozen=True)
class TrainConfig:
    task: Literal["language_modelling", "classification"] = "language_modelling"
    """What is learned: to predict the next token, or the class of a sample (data.source=sklearn:digits, synthetic:clusters)."""
    steps: int = 600
    """Optimizer steps."""
    global_batch: int = 24
    """Sequences an optimizer step, over all ranks and accumulation steps; never depends on the world size."""
    micro_batch: Optional[int] = None
    """Sequences a (virtual) rank takes at once. Default: all of its share; smaller ones are accumulated."""
    seed: int = 0
    """Seed of initialisation, data order and noise."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto is bf16 where the hardware has it and it pays (CUDA; avx512_bf16 or amx on CPUs from model.dim=512 on), fp32 elsewhere."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is cuda where a GPU is visible."""
    run_dir: Optional[str] = None
    """Where the run is kept. Default: a new directory under runs/. A directory with a checkpoint is resumed."""
    recompute: bool = False
    """Recompute each block in backward instead of keeping its activations."""
    log_every: int = 10
    """Steps between two metric lines."""
    eval_every: int = 300
    """Steps between two evaluations; one more at the end. 0: only at the end."""
    eval_first: bool = False
    """Evaluate before the first step too: what a frozen core knew without its modules, for one."""
    eval_sequences: int = 512
    """Held-out sequences an evaluation reads."""
    sample_prompt: str = "def "
    """Text the sample at the end of a run starts with."""
    sample_tokens: int = 160
    """Tokens of that sample; 0 for none."""
    profile_steps: list[int] = field(default_factory=list)
    """Steps, counted from 1, of which a torch profiler trace is written into logs/, e.g. [20]."""
    profile_ranks: list[int] = field(default_factory=list)
    """Ranks that write one. Default: all."""


@dataclass(frozen=True)
class OptimConfig:
    lr: float = 0.004
    """Peak learning rate of AdamW."""
    beta1: float = 0.9
    """Decay of AdamW's first moment."""
    beta2: float = 0.95
    """Decay of AdamW's second moment."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.1
    """Decoupled weight decay on matrices; norms, routers and embeddings have none."""
    clip: Optional[float] = 1.0
    """Largest global gradient norm; null for no clipping."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Learning rate after the warm-up; wsd stays at the peak and decays over the last decay_fraction of the steps."""
    warmup: int = 50
    """Steps of linear warm-up."""
    min_lr_ratio: float = 0.05
    """The learning rate ends at this share of its peak."""
    decay_fraction: float = 0.2
    """Share of the steps in which wsd decays."""
