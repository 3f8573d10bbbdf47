"""Chat templates, tokenization and supervised spans, shared by preprocessing, training and generation.

Turns are tokenized one by one, so that the tokens of a prompt do not depend on the answer that follows. Message text
that spells a special token is encoded as ordinary text. The end-of-text tokens of a template are added by id.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import huggingface_hub
import tokenizers

from model.errors import UserError, hub_error_text
from preprocess.file_kinds import HEAD_BYTES, recognise

IMAGE_TOKEN = "<image>"
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")

PADDING = ("<|padding|>", "<|pad|>", "<pad>", "[PAD]")

Template = Literal["zephyr", "base"]
Conversation = Sequence[Mapping[str, str]]  # alternating {"from": "human" | "gpt", "value": text}

# Template of a question: text parts, and None for the end-of-text token. An answer always ends with this token.
TEMPLATES: dict[str, tuple[str | None, ...]] = {
    "zephyr": ("<|user|>\n{q}", None, "\n<|assistant|>\n"),
    "base": ("In: {q}\nOut: ",),
}
BETWEEN_TURNS = "\n"
EMPTY_ANSWER = " "
CHARACTERS_PER_TOKEN, MIN_SPARE_TOKENS = 16, 256

NUL_OR_SURROGATE = re.compile("[\x00\ud800-\udfff]")


def clean_text(text: str) -> str:
    """Drop NUL characters and replace lone surrogates, which UTF-8 cannot encode, by U+FFFD.

    Every text is cleaned before it is tokenized, both for training and for generation.
    """
    return NUL_OR_SURROGATE.sub(lambda match: "" if match[0] == "\x00" else "\ufffd", text)


def clean_terminal_text(text: str) -> str:
    """Clean a text from the command line, where Python represents undecodable bytes as lone surrogates.

    The result is the same as if the bytes came from an annotation file.
    """
    return clean_text(text.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))


class Tokenizer:
    """A `tokenizers.Tokenizer` that adds no special tokens, with the sha256 of its tokenizer.json.

    Args:
        data: Content of a tokenizer.json.
        name: Name for messages and the manifest.

    Raises:
        UserError: If the data is not a tokenizer, or the tokenizer has no end-of-text token.
    """

    def __init__(self, data: bytes, name: str) -> None:
        self.data, self.name = data, name
        self.sha256 = hashlib.sha256(data).hexdigest()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the package raises Exception itself
            kind = recognise(data[:HEAD_BYTES])
            found = f"found {kind.name}, expected a tokenizer.json: {kind.remedy}" if kind else error
            raise UserError(f"tokenizer {name} cannot be read: {found}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.eos_token = next((token for token in END_OF_TEXT if token in vocabulary), "")
        if not self.eos_token:
            raise UserError(
                f"tokenizer {name} has no end-of-text token (expected one of {', '.join(END_OF_TEXT)}). "
                "Use a tokenizer that has one"
            )
        self.pad_token = next((token for token in PADDING if token in vocabulary), self.eos_token)
        self.eos_id, self.pad_id = vocabulary[self.eos_token], vocabulary[self.pad_token]

    def encode(self, text: str, *, max_exact: int | None = None) -> list[int]:
        """Return the ids of a text.

        Args:
            max_exact: If given, only the beginning of a long text is tokenized, because tokenizing needs 100 times as
                much memory as the text. The first `max_exact` ids are the same as for the whole text; later ids may
                differ.
        """
        if max_exact is not None:
            # Cutting a text can change the last ids before the cut. Therefore more ids than wanted are computed.
            wanted = max_exact + max(max_exact, MIN_SPARE_TOKENS)
            length = CHARACTERS_PER_TOKEN * wanted
            while length < len(text):
                ids = self._encode_whole(text[:length])
                if len(ids) >= wanted:
                    return ids
                length *= 4
        return self._encode_whole(text)

    def _encode_whole(self, text: str) -> list[int]:
        # encode_batch_fast is faster than encode, because it does not compute the offsets of the tokens.
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens)


def load_tokenizer(name_or_folder: str | Path) -> Tokenizer:
    """Load a tokenizer from a tokenizer.json, a folder that holds one, or the Hugging Face hub. Raises: UserError."""
    path = Path(name_or_folder)
    path = path / "tokenizer.json" if path.is_dir() else path
    if path.is_file():
        return Tokenizer(path.read_bytes(), Path(name_or_folder).absolute().name)
    if path.name == "tokenizer.json" or path.is_absolute():
        raise UserError(f"there is no tokenizer {path}. Give a folder with a tokenizer.json, or a hub id")
    return Tokenizer(_download(str(name_or_folder)), str(name_or_folder))


def _download(hub_id: str) -> bytes:
    """Return the tokenizer.json from the local hub cache, or download it."""
    try:
        cached = huggingface_hub.try_to_load_from_cache(hub_id, "tokenizer.json")
        path = cached if isinstance(cached, str) else huggingface_hub.hf_hub_download(hub_id, "tokenizer.json")
        return Path(path).read_bytes()
    except Exception as error:  # being offline, an unknown id and a private repository raise unrelated classes
        raise UserError(
            f"tokenizer {hub_id!r} is neither a folder with a tokenizer.json nor on the hub ({hub_error_text(error)}). "
            "Without network access, download it on another machine and give its folder"
        ) from None


@dataclass(frozen=True, kw_only=True)
class EncodedDialogue:
    """Token ids of a dialogue.

    Attributes:
        spans: The [start, end) ranges of `tokens` that are supervised: each answer with its end-of-text token.
    """

    tokens: list[int]
    spans: list[tuple[int, int]]


def encode_dialogue(
    conversations: Conversation, template: str, tokenizer: Tokenizer, max_text_tokens: int | None = None
) -> EncodedDialogue:
    """Tokenize a dialogue, and truncate it to `max_text_tokens`.

    If the dialogue is truncated, tokens after the last supervised token are dropped too, because a question without its
    answer teaches nothing. The result is empty if no supervised token is left.
    """
    tokens: list[int] = []
    spans: list[tuple[int, int]] = []
    for speaker, turn in _encoded_turns(conversations, template, tokenizer, max_text_tokens):
        if speaker == "gpt":
            spans.append((len(tokens), len(tokens) + len(turn)))
        tokens += turn
        if max_text_tokens is not None and len(tokens) > max_text_tokens:
            break
    if max_text_tokens is not None and len(tokens) > max_text_tokens:
        spans = [(start, min(end, max_text_tokens)) for start, end in spans if start < max_text_tokens]
        tokens = tokens[: spans[-1][1]] if spans else []
    return EncodedDialogue(tokens=tokens, spans=spans)


def encode_prompt(conversations: Conversation, template: str, tokenizer: Tokenizer) -> list[int]:
    """Tokenize a dialogue that ends with a question. In training, the ids before the answer are the same."""
    assert conversations[-1]["from"] == "human", "a prompt ends with a question"
    return encode_dialogue(conversations, template, tokenizer).tokens


def _encoded_turns(
    conversations: Conversation, template: str, tokenizer: Tokenizer, max_tokens: int | None
) -> Iterator[tuple[str, list[int]]]:
    for number, turn in enumerate(conversations):
        text = clean_text(turn["value"]).replace(IMAGE_TOKEN, "").strip()
        if turn["from"] == "gpt":
            yield "gpt", [*tokenizer.encode(text or EMPTY_ANSWER, max_exact=max_tokens), tokenizer.eos_id]
        else:
            lead = BETWEEN_TURNS if number else ""
            yield "human", _encode_question(lead, text, TEMPLATES[template], tokenizer, max_tokens)


def _encode_question(
    lead: str, text: str, parts: tuple[str | None, ...], tokenizer: Tokenizer, max_tokens: int | None
) -> list[int]:
    tokens: list[int] = []
    for part in parts:
        if part is None:
            tokens.append(tokenizer.eos_id)
        else:
            tokens += tokenizer.encode(lead + part.replace("{q}", text), max_exact=max_tokens)
        lead = ""
    return tokens
