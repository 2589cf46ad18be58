"""The loss is on the answers alone: equal to a mask written by hand, for five templates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dmoe.config.errors import ConfigError
from dmoe.config.load import load
from dmoe.config.schema import DataConfig, ModelConfig, MoEConfig
from dmoe.data import open_data, open_tokenizer
from dmoe.data.instruct import ChatTemplate, open_chat_template, prompt_ids
from dmoe.data.instruct.conversations import Conversation
from dmoe.data.instruct.encode import encode_conversation
from dmoe.models.transformer import Transformer
from dmoe.train.tasks import LanguageModelling
from tests.data.instruct.conftest import ROWS, messages_of
from tests.data.instruct.templates import TEMPLATES

SEQ_LEN = 160


def naive(
    tokenizer_file: Path, name: str, messages: list[dict[str, str]]
) -> tuple[list[int], list[bool]]:
    """Encode each part with the package tokenizers, which knows the special tokens by name."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    ids, answers = list[int](), list[bool]()
    for text, is_answer in TEMPLATES[name].parts(messages):
        found = tokenizer.encode(text, add_special_tokens=False).ids
        ids += found
        answers += [is_answer] * len(found)
    return ids, answers


def config(tokenizer_file: Path, rows_file: Path, name: str, **fields: object) -> DataConfig:
    template = rows_file.with_name(f"{name}.jinja")
    template.write_text(TEMPLATES[name].source, encoding="utf-8")
    given = {
        "source": str(rows_file),
        "tokenizer": str(tokenizer_file),
        "chat_template": str(template),
        "format": "instruct",
        "seq_len": SEQ_LEN,
        "holdout": 0.3,
    }
    return DataConfig(**given | fields)


@pytest.mark.parametrize("name", TEMPLATES)
def test_tokens_and_answers_equal_those_written_by_hand(
    name: str, tokenizer_file: Path, rows_file: Path
) -> None:
    options = config(tokenizer_file, rows_file, name)
    template, tokenizer = open_chat_template(options), open_tokenizer(options)
    for row in ROWS:
        messages = messages_of(row)
        found = encode_conversation(Conversation(tuple(messages), "line", ""), template, tokenizer)
        ids, answers = naive(tokenizer_file, name, messages)
        assert found.token_N.tolist() == ids
        assert found.answer_N.tolist() == answers
        assert 0 < found.answer_N.mean() < 1
        asked = prompt_ids(messages[:1], template, tokenizer)
        first = answers.index(True)
        assert asked == ids[:first], "an answer is generated after what it was trained after"


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_that_of_transformers(name: str) -> None:
    """And so are the marks, where a template has them."""
    from transformers.utils.chat_template_utils import render_jinja_template

    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    template = ChatTemplate(name, TEMPLATES[name].source, tokens)
    for row in ROWS:
        messages = messages_of(row)
        for ask in (False, True):
            (expected,), _ = render_jinja_template(
                [messages], chat_template=template.source, add_generation_prompt=ask, **tokens
            )
            text = template.render(messages, "line", add_generation_prompt=ask)
            assert text.replace("\ufdd0", "").replace("\ufdd1", "") == expected


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_loss_equals_a_naive_mask(
    name: str, mask: bool, tokenizer_file: Path, rows_file: Path
) -> None:
    """Each conversation alone through the model, its answers' loss summed token by token."""
    options = config(tokenizer_file, rows_file, name, document_mask=mask)
    data = open_data(options, 0)
    vocab = data.tokenizer.vocab_size
    model = Transformer(ModelConfig(dim=16, layers=2, heads=2), MoEConfig(4, 2, 8), vocab).double()
    total, targets = 0.0, 0
    for row in ROWS:
        ids, answers = naive(tokenizer_file, name, messages_of(row))
        with torch.no_grad():
            log_p = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
        for position in range(1, len(ids)):
            if answers[position]:
                total -= float(log_p[position - 1, ids[position]])
                targets += 1
    task = LanguageModelling(load(None, ["data.format=instruct"]), vocab)
    found, count = 0.0, 0
    for dataset in (data.train, data.held_out):
        samples = task.samples(dataset, 0, dataset.num_sequences)
        with torch.no_grad():
            out = model(samples.input, samples.target, samples.context())
        assert out.loss_sum is not None
        found += float(out.loss_sum)
        count += int((samples.target != -100).sum())
        assert (samples.position_BS is not None) is mask
    assert count == targets
    assert found == pytest.approx(total, rel=1e-12)
    sequences = sum(dataset.num_sequences or 0 for dataset in (data.train, data.held_out))
    assert (sequences < len(ROWS)) is mask, "several conversations share a sequence"


def test_padding_is_routed_nowhere(tokenizer_file: Path, rows_file: Path) -> None:
    data = open_data(config(tokenizer_file, rows_file, "qwen"), 0)
    model = Transformer(
        ModelConfig(dim=16, layers=1, heads=2), MoEConfig(4, 2, 8), data.tokenizer.vocab_size
    )
    task = LanguageModelling(load(None, ["data.format=instruct"]), data.tokenizer.vocab_size)
    samples = task.samples(data.train, 0, data.train.num_sequences)
    assert samples.valid_BS is not None
    assert not samples.valid_BS.all()
    out = model(samples.input, samples.target, samples.context())
    assert int(out.stats[0].choice_E.sum()) == 2 * int(samples.valid_BS.sum())
    assert int((samples.input != data.tokenizer.separator).sum()) == int(samples.valid_BS.sum())


def test_a_template_that_rewrites_earlier_turns_is_refused(
    tokenizer_file: Path, rows_file: Path
) -> None:
    """As one that drops the reasoning of all turns but the last does: no all-ones mask."""
    options = config(tokenizer_file, rows_file, "qwen")
    Path(str(options.chat_template)).write_text(
        "{% for m in messages %}{{ m.role }}:{{ m.content if loop.last else 'cut' }};{% endfor %}"
    )
    with pytest.raises(ConfigError, match=r"data\.chat_template=.*chat\.jsonl line \d+ in another"):
        open_data(options, 0)


def test_the_template_of_the_tokenizer_is_found(tokenizer_file: Path, tmp_path: Path) -> None:
    """Beside the tokenizer: chat_template.jinja, or tokenizer_config.json, in either form."""
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    options = DataConfig(tokenizer=str(tmp_path / "tokenizer.json"), format="instruct")
    with pytest.raises(ConfigError, match=r"data\.chat_template=None: must be given.*use chatml"):
        open_chat_template(options)
    settings = tmp_path / "tokenizer_config.json"
    for content in (
        '{"chat_template": "A", "bos_token": "<s>"}',
        '{"chat_template": [{"name": "tool_use", "template": "B"},'
        '{"name": "default", "template": "A"}], "bos_token": {"content": "<s>"}}',
    ):
        settings.write_text(content)
        found = open_chat_template(options)
        assert (found.source, found.tokens) == ("A", {"bos_token": "<s>"})
    (tmp_path / "chat_template.jinja").write_text("C")
    assert open_chat_template(options).source == "C"


def test_special_tokens_swallow_white_space_as_the_file_says(
    tmp_path: Path, tokenizer_file: Path
) -> None:
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.add_special_tokens([AddedToken("<|both|>", lstrip=True, rstrip=True, special=True)])
    tokenizer.save(str(tmp_path / "t.json"))
    ours = open_tokenizer(DataConfig(tokenizer=str(tmp_path / "t.json")))
    from dmoe.data.instruct.encode import encode_text, special_tokens

    for text in ("a  <|both|>  b<s> c", "<|both|>", " <|both|><s> <|both|> x ", "plain  text "):
        expected = tokenizer.encode(text, add_special_tokens=False).ids
        assert encode_text(text, ours, special_tokens(ours)).tolist() == expected
