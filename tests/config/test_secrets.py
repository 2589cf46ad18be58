"""Secrets are found and removed; ordinary text survives."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmoe.config.errors import ConfigError
from dmoe.config.fields import list_fields
from dmoe.config.load import load, to_yaml
from dmoe.config.schema import Config, TrackingConfig, TrainConfig
from dmoe.config.secrets import (
    REDACTED,
    find_secret,
    is_secret_name,
    redact,
    redact_json,
    refuse_secrets,
)

ROOT = Path(__file__).parents[2]
HEX_40 = "0123456789abcdef0123456789abcdef01234567"
FORMATS = {
    "hugging face": "hf_" + "aB3" * 12,
    "github": "ghp_" + "aB3" * 12,
    "github, fine-grained": "github_pat_" + "aB3_" * 10,
    "gitlab": "glpat-" + "aB3-" * 6,
    "sk": "sk-" + "aB3d" * 8,
    "sk, project": "sk-proj-" + "aB3d" * 8,
    "aws": "AKIA" + "ABCD" * 4,
    "wandb": "wandb_v1_" + "aB3d" * 8,
    "json web token": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0."
    "dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P",
    "private key": "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAABG5v\n"
    "-----END OPENSSH PRIVATE KEY-----",
}
NAMES = """WANDB_API_KEY HF_TOKEN AWS_SECRET_ACCESS_KEY GITHUB_TOKEN
    DB_PASSWORD PG_PASSWD MY_CREDENTIAL APIKEY openaiApiKey KEY
    x-auth-token GROUP_TOKEN AUTH_TOKEN SPLIT_API_KEY"""
PLAIN_NAMES = """KEYBOARD MASTER_PORT TOKENIZERS_PARALLELISM PWD OLDPWD
    AWS_SHARED_CREDENTIALS_FILE SSH_KEY_PATH PATH HOME
    XKB_KEYMAP tokens tokens_per_second data.tokenizer MONKEY"""
SURVIVES = [
    f"commit {HEX_40}",
    f"revision: {HEX_40}",
    f"data fingerprint {'0123456789abcdef' * 4}",
    f'{{"sha256": "{"0123456789abcdef" * 4}"}}',
    "step 3: validation loss 5.123, 7.4 bits/byte over 1,234 tokens",
    "moe.top_q=1: there is no such field; did you mean moe.top_k?",
    "key: value, token=on",
    "see the risk-averse-and-disk-bound-1-list-of-tasks",
    "https://example.org/path?q=1",
    "password: $DB_PASSWORD",
    "KeyError: 'nearest'",
    "UnknownTokenError: 'nearest'",
    "AuthError: 'denied'",
    "context = TokenContext(noise_key=noise, label_T=label)",
    "sorted(found, sort_key=by_name), split_key: bytes",
    "the eos_token: '<|endoftext|>', pad_token='<pad>'",
    "unexpected_key: model.head, missing.key=model.head",
    "duplicate_key: 'moe.top_k'",
    "num_tokens: 12345, token_count=12345",
]


@pytest.mark.parametrize("name", NAMES.split())
def test_the_value_of_a_variable_that_names_a_secret(name: str) -> None:
    environment = {name: "correct-horse", "EDITOR": "vim-is-no-secret"}
    assert (
        redact("a correct-horse, vim-is-no-secret", environment)
        == f"a {REDACTED}, vim-is-no-secret"
    )


@pytest.mark.parametrize("name", PLAIN_NAMES.split())
def test_variable_with_a_similar_name_is_no_secret(name: str) -> None:
    assert not is_secret_name(name)
    assert redact("a /some/long/value", {name: "/some/long/value"}) == "a /some/long/value"


def test_short_and_empty_values_are_ignored() -> None:
    assert (
        redact("turned on for 1234567", {"MY_TOKEN": "on", "HF_TOKEN": "", "KEY": "1234567"})
        == "turned on for 1234567"
    )


def test_a_secret_that_is_part_of_another_leaves_no_tail() -> None:
    assert (
        redact("x 12345678-tail y", {"A_KEY": "12345678", "B_KEY": "12345678-tail"})
        == f"x {REDACTED} y"
    )


def test_each_line_of_a_secret_with_several() -> None:
    body = "MIIEvQIBADANBgkqhkiG9w0BAQEFAASC"
    assert redact(
        f"in one log line: {body}", {"DEPLOY_KEY": f"first line of the deploy key\n{body}\nend"}
    ).endswith(REDACTED)


@pytest.mark.parametrize("name", FORMATS)
def test_well_known_formats_need_no_variable(name: str) -> None:
    assert redact(f"before {FORMATS[name]} after", {}) == f"before {REDACTED} after"
    assert find_secret(f"/path/{FORMATS[name]}", {}) is not None


def test_value_behind_a_secret_name() -> None:
    for text in (
        "# api_key: {}",
        "override: tracking.api_key={}",
        '{{"apiKey": "{}"}}',
        "export WANDB_API_KEY={}",
        "GROUP_TOKEN={}",
        "auth_token: {}",
        "password = '{}'",
    ):
        for value in ("hunter2", HEX_40):
            cleaned = redact(text.format(value), {})
            assert value not in cleaned
            assert REDACTED in cleaned
    assert redact('password: "correct horse battery"', {}) == f'password: "{REDACTED}"'
    assert redact(f"my wandb key is {HEX_40}", {}) == f"my wandb key is {REDACTED}"
    assert (
        redact("https://me:hunter2@example.org/x.git", {})
        == f"https://{REDACTED}@example.org/x.git"
    )


@pytest.mark.parametrize("text", SURVIVES)
def test_ordinary_text_survives(text: str) -> None:
    """`KeyError: 'nearest'` was printed as [redacted], so every traceback of a KeyError lost its one
    useful word; names of code and of tokenizers lost theirs too."""
    assert redact(text, {}) == text


def test_no_field_and_no_file_of_the_project_looks_like_a_secret() -> None:
    """A field whose name looked like one would be redacted in every resolved.yaml."""
    assert [field.name for field in list_fields() if is_secret_name(field.name)] == []
    for text in [
        to_yaml(Config()),
        *(path.read_text(encoding="utf-8") for path in (ROOT / "configs").rglob("*.yaml")),
    ]:
        assert redact(text, {}) == text


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(),
        lambda below: st.lists(below) | st.dictionaries(st.text(), below),
    )
)
def test_redact_json_is_idempotent_and_keeps_the_shape(value: object) -> None:
    once = redact_json(value, {"MY_TOKEN": "12345678"})
    assert redact_json(once, {"MY_TOKEN": "12345678"}) == once
    assert type(once) is type(value)


def test_redact_json_reaches_texts_lists_and_keys_and_leaves_numbers() -> None:
    secret = "correct-horse"
    value = {
        "text": f"a {secret}",
        secret: [1, 2.5, None, True, {"deep": secret}],
        "api_key": "abc",
        "token": 5,
    }
    cleaned = redact_json(value, {"MY_TOKEN": secret})
    assert cleaned == {
        "text": f"a {REDACTED}",
        REDACTED: [1, 2.5, None, True, {"deep": REDACTED}],
        "api_key": REDACTED,
        "token": 5,
    }
    assert secret in json.dumps(value), "the value given must not be changed"


def test_a_config_value_is_refused_by_field_and_variable_without_the_value() -> None:
    environment = {"WANDB_API_KEY": HEX_40}
    config = load(None, [f"data.source=/path/{HEX_40}"])
    with pytest.raises(ConfigError) as refused:
        refuse_secrets(config, environment)
    assert "data.source=[redacted]" in str(refused.value)
    assert "WANDB_API_KEY" in str(refused.value)
    assert HEX_40 not in str(refused.value)


@pytest.mark.parametrize(
    "config",
    [
        replace(Config(), tracking=TrackingConfig(project=FORMATS["hugging face"])),
        replace(Config(), tracking=TrackingConfig(project=HEX_40)),
        replace(Config(), tracking=TrackingConfig(trackers=["wandb", "correct-horse"])),
        replace(Config(), train=TrainConfig(seed=1234567890)),
        replace(Config(), train=TrainConfig(sample_prompt="password: hunter2")),
    ],
)
def test_a_secret_in_any_kind_of_field(config: Config) -> None:
    with pytest.raises(ConfigError, match=r"\[redacted\]"):
        refuse_secrets(config, {"MY_TOKEN": "correct-horse", "MY_PASSWORD": "1234567890"})


def test_hashes_in_paths_are_accepted() -> None:
    refuse_secrets(Config(), {"WANDB_API_KEY": HEX_40})
    refuse_secrets(
        load(None, [f"train.run_dir=runs/{HEX_40}", f"data.source=/data/{'0f' * 32}"]), {}
    )
