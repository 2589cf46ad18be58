#!/usr/bin/env bash
# Ten books in JSON Lines to a report, in five commands. Usage: own_data.sh [DIRECTORY]
# The "books" are packages of Python's standard library: any records with a text do.
set -euo pipefail
directory=${1:-$(mktemp -d)}
mkdir -p "$directory"
cd "$directory"
python - <<'END'
import json
import pathlib
import sysconfig

library = pathlib.Path(sysconfig.get_paths()["stdlib"])
names = "asyncio collections email encodings html http importlib json logging xml"
with open("books.jsonl", "w", encoding="utf-8") as books:
    for name in names.split():
        files = sorted((library / name).rglob("*.py"))
        text = "".join(path.read_text("utf-8", "replace") for path in files)[:60_000]
        books.write(json.dumps({"title": name, "text": text}) + "\n")
END

dmoe data inspect books.jsonl --samples 1
dmoe data prepare books.jsonl --label-field title --out shards
dmoe data inspect shards --verify --samples 1
dmoe train data.source=shards train.run_dir=run train.steps="${STEPS:-200}" ${MORE:-}
dmoe report run
