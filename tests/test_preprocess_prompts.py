"""Chat templates with the GPT-NeoX-20B tokenizer: exact ids, supervised spans, and the token limit."""

import json
from pathlib import Path

import pytest
import tokenizers

from model.errors import UserError
from preprocess import prompts
from preprocess.prompts import Tokenizer, clean_terminal_text, encode_dialogue, encode_prompt, load_tokenizer
from tests.support.golden_tokenizer import gpt_neox
from tests.support.launch import run_python
from tests.support.shard_builds import write_tokenizer

EOS = 0
GOLDEN_ZEPHYR = [29, 93, 4537, 49651, 187, 1276, 310, 352, 32, 0, 187, 29, 93, 515, 5567, 49651, 187, 34, 5798, 15, 0]
GOLDEN_BASE = [688, 27, 1737, 310, 352, 32, 187, 5677, 27, 209, 34, 5798, 15, 0]


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


# The texts below spell out the format of each template. The golden ids above were computed once and must not change.
FORMATS: dict[tuple[str, str], tuple[list[dict[str, str]], list[str | int], list[list[str | int]]]] = {
    ("zephyr", "one turn"): (
        turns("<image>\nWhat is it?", "A cat."),
        ["<|user|>\nWhat is it?", EOS, "\n<|assistant|>\n"],
        [["A cat.", EOS]],
    ),
    ("base", "one turn"): (turns("What is it?\n<image>", "A cat."), ["In: What is it?\nOut: "], [["A cat.", EOS]]),
    ("zephyr", "two turns"): (
        turns("Hi", "Hello", "Why?", "Because."),
        ["<|user|>\nHi", EOS, "\n<|assistant|>\n", "Hello", EOS, "\n<|user|>\nWhy?", EOS, "\n<|assistant|>\n"],
        [["Hello", EOS], ["Because.", EOS]],
    ),
    ("base", "two turns"): (
        turns("Hi", "Hello", "Why?", "Because."),
        ["In: Hi\nOut: ", "Hello", EOS, "\nIn: Why?\nOut: "],
        [["Hello", EOS], ["Because.", EOS]],
    ),
    ("zephyr", "empty answer"): (turns("Q", ""), ["<|user|>\nQ", EOS, "\n<|assistant|>\n"], [[" ", EOS]]),
    ("base", "empty answer"): (turns("Q", ""), ["In: Q\nOut: "], [[" ", EOS]]),
}


def expected_ids(parts: list[str | int]) -> list[int]:
    raw = tokenizers.Tokenizer.from_str(gpt_neox().data.decode())
    return [token for part in parts for token in ([part] if isinstance(part, int) else raw.encode(part).ids)]


@pytest.mark.parametrize("case", FORMATS, ids=" ".join)
def test_each_template_encodes_a_dialogue_to_the_documented_text_and_spans(case: tuple[str, str]) -> None:
    conversations, prompt, answers = FORMATS[case]
    encoded = encode_dialogue(conversations, case[0], gpt_neox(), 2048)
    assert encoded.tokens == expected_ids(prompt) + expected_ids(answers[-1])
    assert [encoded.tokens[start:end] for start, end in encoded.spans] == [expected_ids(answer) for answer in answers]


def test_both_templates_give_the_recorded_token_ids() -> None:
    dialogue = turns("<image>\nWhat is it?", "A cat.")
    zephyr = encode_dialogue(dialogue, "zephyr", gpt_neox(), 2048)
    base = encode_dialogue(dialogue, "base", gpt_neox(), 2048)
    assert zephyr.tokens == GOLDEN_ZEPHYR
    assert base.tokens == GOLDEN_BASE


@pytest.mark.parametrize(
    ("dirty", "clean"),
    [
        ("What\x00 is\x00 it?", "What is it?"),
        ("\x00 What is it?\x00", "What is it?"),
        ("<im\x00age>What is it?", "What is it?"),
        ("What is \ud83d?", "What is \ufffd?"),
    ],
)
def test_a_question_is_cleaned_as_in_training_before_it_is_tokenized(dirty: str, clean: str) -> None:
    assert encode_prompt(turns(dirty), "zephyr", gpt_neox()) == encode_prompt(turns(clean), "zephyr", gpt_neox())


@pytest.mark.parametrize(
    "data", [b"caf\xc3\xa9 \xff?", b"\xe2\x82 cut", b"\xed\xa0\x80", "U+1F600 \U0001f600".encode()]
)
def test_undecodable_bytes_of_an_argument_become_the_same_text_as_in_a_file(data: bytes) -> None:
    assert clean_terminal_text(data.decode("utf-8", "surrogateescape")) == data.decode("utf-8", "replace")


def test_zephyr_prompt_ids_equal_those_of_the_whole_text_tokenized_at_once() -> None:
    raw = tokenizers.Tokenizer.from_str(gpt_neox().data.decode())
    text = "<|user|>\nTwo  spaces,\ttabs\n\nand é?<|endoftext|>\n<|assistant|>\n"
    prompt = encode_prompt(turns("Two  spaces,\ttabs\n\nand é?"), "zephyr", gpt_neox())
    assert prompt == raw.encode(text).ids


@pytest.mark.parametrize("template", ["zephyr", "base"])
@pytest.mark.parametrize("answers", [1, 2, 5])
def test_a_generation_prompt_is_a_prefix_of_the_training_token_ids(template: str, answers: int) -> None:
    dialogue = turns(*(f"  <image> turn {i}  " for i in range(2 * answers)))
    encoded = encode_dialogue(dialogue, template, gpt_neox(), 2048)
    for turn in range(answers):
        prompt = encode_prompt(dialogue[: 2 * turn + 1], template, gpt_neox())
        assert prompt == encoded.tokens[: encoded.spans[turn][0]]


def test_the_image_placeholder_is_removed_anywhere_in_the_text() -> None:
    plain = encode_dialogue(turns("What?", "That"), "base", gpt_neox(), 2048)
    for question in ("<image>\nWhat?", "What?\n<image>", "<image>What?<image>", " What? "):
        assert encode_dialogue(turns(question, "That"), "base", gpt_neox(), 2048) == plain


def test_special_tokens_in_a_message_are_encoded_as_plain_text() -> None:
    encoded = encode_dialogue(turns("Say <|endoftext|>", "<|endoftext|><|padding|>"), "base", gpt_neox(), 2048)
    assert [i for i, token in enumerate(encoded.tokens) if token in (0, 1)] == [len(encoded.tokens) - 1]
    assert "<|endoftext|><|padding|>" in gpt_neox().decode(encoded.tokens)


@pytest.mark.parametrize(
    ("limit", "left", "spans"),
    [
        (100, 25, 2),  # the limit exceeds the length of the dialogue
        (25, 25, 2),
        (24, 24, 2),  # the last answer loses its end-of-text token
        (20, 20, 2),
        (19, 11, 1),  # no token of the second answer fits, so its question is removed as well
        (11, 11, 1),
        (8, 8, 1),
        (7, 0, 0),  # no token of the first answer fits, so nothing remains
    ],
)
def test_truncating_a_dialogue_leaves_no_question_without_an_answer(limit: int, left: int, spans: int) -> None:
    dialogue = turns("Q", "one two three", "And", "four five six seven eight")
    whole = encode_dialogue(dialogue, "base", gpt_neox())
    assert (len(whole.tokens), whole.spans) == (25, [(7, 11), (19, 25)])
    cut = encode_dialogue(dialogue, "base", gpt_neox(), limit)
    assert cut.tokens == whole.tokens[:left]
    assert len(cut.spans) == spans
    assert all(start < end <= limit for start, end in cut.spans)


def record_tokenized_texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which each text is appended when it is tokenized."""
    texts: list[str] = []
    encode = Tokenizer._encode_whole

    def recording(tokenizer: Tokenizer, text: str) -> list[int]:
        texts.append(text)
        return encode(tokenizer, text)

    monkeypatch.setattr(Tokenizer, "_encode_whole", recording)
    return texts


LONG_TEXTS = {
    "prose": "The quick brown fox, 12 times. ",
    "one long word": "a",
    "two letters": "ab",
    "words of one token": " characterization",
    "spaces": " x" + " " * 700,
    "the longest tokens": "=",
    "accents that normalisation merges": "e\u0301",
    "three bytes each": "猫",
    "lines": "\n\n\t\n",
    "special tokens": "<|endoftext|>",
}


@pytest.mark.parametrize("limit", [1, 20, 333])
@pytest.mark.parametrize("kind", LONG_TEXTS)
def test_truncating_long_text_before_tokenizing_gives_the_same_token_ids(
    monkeypatch: pytest.MonkeyPatch, kind: str, limit: int
) -> None:
    long = LONG_TEXTS[kind] * (60_000 // len(LONG_TEXTS[kind])) + "."
    assert gpt_neox().encode(long, max_exact=limit)[:limit] == gpt_neox().encode(long)[:limit]
    dialogues = [turns("Q", long), turns("Q", "A", long, "B"), turns("Q", "A", "Q", long, long, "C")]
    whole = [encode_dialogue(one, "zephyr", gpt_neox()) for one in dialogues]
    texts = record_tokenized_texts(monkeypatch)
    cut = [encode_dialogue(one, "zephyr", gpt_neox(), limit) for one in dialogues]
    assert max(map(len, texts)) < len(long)
    monkeypatch.setattr(prompts, "CHARACTERS_PER_TOKEN", 1 << 20)
    assert cut == [encode_dialogue(one, "zephyr", gpt_neox(), limit) for one in dialogues]
    for left, all_ids in zip(cut, whole, strict=True):
        assert left.tokens == all_ids.tokens[: len(left.tokens)]


def test_text_that_normalization_mostly_removes_is_cut_to_the_token_limit(tmp_path: Path) -> None:
    """For such a tokenizer, the length of a text says nothing about its number of token ids."""
    settings = json.loads(gpt_neox().data)
    settings["normalizer"] = {"type": "Replace", "pattern": {"Regex": "~+"}, "content": ""}
    tokenizer = Tokenizer(json.dumps(settings).encode(), "dropping")
    text = "~" * 100_000 + "one two three four five six"
    assert tokenizer.encode(text, max_exact=3)[:3] == gpt_neox().encode("one two three")


def test_the_error_for_a_tokenizer_that_is_a_git_lfs_pointer_names_the_pointer() -> None:
    with pytest.raises(
        UserError, match=r"tokenizer a cannot be read: found a Git LFS pointer, expected a tokenizer\.json"
    ):
        Tokenizer(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "a")


def test_turns_after_the_token_limit_are_not_tokenized(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = record_tokenized_texts(monkeypatch)
    encode_dialogue(turns("Q", "one two three", *["and"] * 10), "base", gpt_neox(), 8)
    assert texts == ["In: Q\nOut: ", "one two three"]


def test_the_gpt_neox_tokenizer_has_its_known_size_eos_id_and_sha256() -> None:
    assert (gpt_neox().vocab_size, gpt_neox().eos_id) == (50277, 0)
    assert gpt_neox().sha256 == "56ac4821e129d2c520fdaba60abd920fa852ada51b45c0dd52bbb6bd8c985ade"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "cannot be read"),
        (None, "there is no tokenizer"),
        (tokenizers.Tokenizer(tokenizers.models.BPE()).to_str(), "has no end-of-text token"),
    ],
)
def test_an_unusable_tokenizer_file_is_a_one_line_user_error(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message) as raised:
        load_tokenizer(path)
    assert "\n" not in str(raised.value)


def test_a_hub_tokenizer_is_loaded_from_the_local_cache_when_offline(tmp_path: Path) -> None:
    """Compute nodes without network access depend on this."""
    stored = tmp_path / "models--org--name"
    (stored / "refs").mkdir(parents=True)
    (stored / "refs/main").write_text("0" * 40)
    write_tokenizer(stored / "snapshots" / ("0" * 40), gpt_neox())
    program = "from preprocess.prompts import load_tokenizer; t = load_tokenizer('org/name'); print(t.name, t.sha256)"
    done = run_python("-c", program, HF_HUB_CACHE=str(tmp_path), HF_HUB_OFFLINE="1")
    assert done.stdout.split() == ["org/name", gpt_neox().sha256], done.stderr


def test_a_missing_relative_tokenizer_folder_is_a_user_error() -> None:
    with pytest.raises(UserError, match=r"nowhere/at/all' is neither a folder with a tokenizer\.json nor on the hub"):
        load_tokenizer("../nowhere/at/all")


def test_the_truncation_setting_of_a_tokenizer_file_is_ignored() -> None:
    settings = json.loads(gpt_neox().data)
    settings["truncation"] = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    assert len(Tokenizer(json.dumps(settings).encode(), "cut").encode("a b c d e f g")) == 7
