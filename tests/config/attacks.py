"""Config files that try to run code, to fill the memory, or to end in a traceback.

Each with words of the one line that refuses it. Drivers: `test_refusals.py` (in process) and
`tests/drills/test_config_attacks.py` (the real command).
"""

from __future__ import annotations

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
ATTACKS: dict[str, tuple[str, list[str]]] = {
    "a call": (
        "data:\n  source: !!python/object/apply:os.system ['touch called']\n",
        ["!!python", "line 2", "data.source"],
    ),
    "a module": (
        "data: {source: !!python/module:antigravity ''}",
        ["!!python/module", "data.source"],
    ),
    "a new object": ("!!python/object/new:os.system ['touch called']", ["!!python/object/new"]),
    "a tag of its own": ("moe:\n  top_k: !two 2\n", ["!two", "line 2", "moe.top_k"]),
    "a tag on a section": ("moe: !!map {top_k: 1}", ["!!map", "moe"]),
    "an alias bomb": (BOMB, ["aliases are not allowed", "line 2"]),
    "one alias": (
        "moe: {top_k: &k 1, expert_dim: *k}",
        ["aliases are not allowed", "moe.expert_dim"],
    ),
    "an alias to itself": ("moe: &m {top_k: *m}", ["aliases are not allowed", "moe.top_k"]),
    "a key twice": ("moe:\n  top_k: 1\n  top_k: 2\n", ["duplicate key top_k", "line 3"]),
    "nested lists": ("a: " + "[" * 3000 + "]" * 3000, ["nested more than 16 deep"]),
    "nested lists without an end": ("[" * 3000, ["nested more than 16 deep"]),
    "nested mappings": (
        "\n".join(f"{' ' * depth}a:" for depth in range(300)),
        ["nested more than 16 deep", "line"],
    ),
    "an unknown key": ("moe: {top_q: 1}", ["moe.top_q", "no such field", "moe.top_k"]),
    "an unknown section": ("moo: {top_k: 1}", ["moo", "no such field", "moe"]),
    "a number as key": ("1: 2", ["1=2", "no such field"]),
    "null as key": ("null: 2", ["not valid YAML"]),
    "a list as key": ("[1, 2]: 2", ["a key must be a name"]),
    "a mapping as key": ("{a: 1}: 2", ["a key must be a name"]),
    "a wrong type": ("moe: {top_k: two}", ["moe.top_k=two", "must be int", "default is 2"]),
    "a section that is a list": ("moe: [1]", ["moe=[1]", "is a section"]),
    "a section that is null": ("moe: null", ["moe=None", "is a section"]),
    "a section without a value": ("moe:", ["an empty value", "moe", "null"]),
    "a text that is a number": (
        "data: {source: 123}",
        ["data.source=123", "must be text", "quote it"],
    ),
    "nan, the text": ("optim: {lr: nan}", ["optim.lr=nan", "finite"]),
    "nan, the number": ("optim: {lr: .nan}", ["optim.lr=nan", "finite"]),
    "infinity": ("optim: {lr: -.inf}", ["optim.lr=-inf", "finite"]),
    "more than 64 bits": (
        "train: {steps: 99999999999999999999}",
        ["train.steps=99999999999999999999", "64 bits"],
    ),
    "a number of 50000 digits": (
        f"train: {{steps: {'9' * 50000}}}",
        ["train.steps", "a number of 50000 digits"],
    ),
    "a number of 50000 hexadecimal digits": (
        f"train: {{steps: 0x{'f' * 50000}}}",
        ["train.steps", "digits"],
    ),
    "no number after 0b": ("train: {steps: 0b_}", ["train.steps=0b_", "decimal"]),
    "an environment variable": (
        "data:\n  source: ${oc.env:HOME}\n",
        ["${", "line 2", "data.source"],
    ),
    "an environment variable in a section": ("moe: ${oc.env:HOME}", ["${", "moe"]),
    "an environment variable as key": ("${oc.env:HOME}: 1", ["${"]),
    "a broken interpolation": ("optim: {lr: '${'}", ["${", "optim.lr"]),
    "a missing value": ("moe:\n  top_k: ???\n", ["moe.top_k=???", "missing"]),
    "a text": ("just words", ["must be a mapping of sections"]),
    "a number": ("12", ["must be a mapping of sections"]),
    "a list": ("- moe\n- data\n", ["must be a mapping of sections"]),
    "two documents": ("moe: {}\n---\nmoe: {}\n", ["another document", "line 2"]),
    "no YAML": ("moe: {top_k: [}", ["CONFIG=", "correct or quote it"]),
    "control characters": ("moe: \x07", ["not valid YAML"]),
    "too long": ("# " + "x" * (1 << 16), ["at most 65536 bytes"]),
}
