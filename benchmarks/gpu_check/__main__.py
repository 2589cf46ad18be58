"""The command: `benchmarks/gpu_check.sh`."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import gpu_check
from benchmarks.gpu_check.checks import Machine
from benchmarks.gpu_check.table import CHECKS, DEADLINE, run_checks
from dmoe.distributed.init import set_cuda_environment


def main() -> None:
    parser = argparse.ArgumentParser(
        description=gpu_check.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("half", choices=["first", "second", "all"], nargs="?", default="all")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, smaller")
    parser.add_argument("--only", help="one check by name")
    parser.add_argument("--json", default="gpu_check.json", help="file for all rows")
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        sys.exit("gpu_check: no GPU is visible; --dry-run runs what a CPU can")
    set_cuda_environment()
    if args.dry_run:
        torch.set_num_threads(1)
    names = [
        name
        for name, listed in CHECKS.items()
        if args.half in (listed.half, "all") and args.only in (name, None)
    ]
    rows, start = [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        machine = Machine("cpu" if args.dry_run else "cuda", args.dry_run, Path(folder))
        halves = 2 if args.half == "all" else 1
        for row in run_checks(machine, names, start + halves * DEADLINE):
            rows.append(row)
            mark = {True: "ok", False: "FAILED", None: "-"}[row.ok]
            print(
                f"{mark:7}{row.check + ': ' + row.name:70} {row.got:>24}   {row.wanted}", flush=True
            )
    failed = [row for row in rows if row.ok is False]
    report = {
        "half": args.half,
        "dry_run": args.dry_run,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    report |= {
        "seconds": round(time.monotonic() - start, 1),
        "failed": len(failed),
        "rows": [asdict(row) for row in rows],
    }
    Path(args.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(
        f"{len(failed)} of {sum(row.ok is not None for row in rows)} checks failed;"
        f" all of them in {args.json}"
    )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
