"""Go on training a published mixture on your own text, and hand it on as a published model.

python examples/continue_pretraining.py MODEL TEXT RUN_DIRECTORY OUT

MODEL is a directory or a name on the hub with its tokenizer, TEXT a file. On the command line:

    dmoe train model.source=MODEL data.source=TEXT train.run_dir=RUN_DIRECTORY
    dmoe checkpoint export RUN_DIRECTORY --to OUT
"""

import sys
from pathlib import Path

import dmoe
from dmoe.hf.export import export_checkpoint


def main(source: str, text: str, run_directory: str, out: str) -> None:
    """Train a few steps from the text and export the last checkpoint."""
    config = dmoe.load_config(
        None,
        [
            *(f"model.source={source}", f"data.source={text}", f"train.run_dir={run_directory}"),
            *("data.seq_len=32", "train.global_batch=8", "train.steps=8", "train.eval_every=4"),
            *("moe.balance.switch=0.01", "moe.balance.switch_level=global", "optim.lr=0.003"),
            *("optim.warmup=0", "checkpoint.every=8", "tracking.trackers=[]"),
        ],
    )
    run = dmoe.train(config, quiet=True)
    losses = [line["loss"] for line in run.metrics.of("train")]
    print(f"loss of the first step {losses[0]:.2f}, of the last {losses[-1]:.2f}")
    done = export_checkpoint(run.checkpoint(), source, Path(out))
    print(f"{done.tensors} tensors in {done.path}", *done.notes, sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:5])
