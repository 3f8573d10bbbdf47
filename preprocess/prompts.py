"""Chat templates, and which tokens of them are supervised. Training and generation share this one code path.

Turns are tokenised one by one, so the boundary between a prompt and its answer never moves. Message text that spells a
special token is encoded as the ordinary text it is; the templates' own end of text is put in by id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import huggingface_hub
import tokenizers

from model.errors import UserError, first_line

IMAGE_TOKEN = "<image>"
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")

Template = Literal["zephyr", "base"]
Conversation = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class _Template:
    """What stands around a question; an answer is followed by the end of text in both. None marks the end of text."""

    question: tuple[str | None, ...]


TEMPLATES = {
    "zephyr": _Template(("<|user|>\n{q}", None, "\n<|assistant|>\n")),
    "base": _Template(("In: {q}\nOut: ",)),
}
BETWEEN_TURNS = "\n"
EMPTY_ANSWER = " "
CHARACTERS_PER_TOKEN, LEAST_SPARE_TOKENS = 16, 256


class Tokenizer:
    """A `tokenizers.Tokenizer` that adds nothing by itself. The bytes of its tokenizer.json identify it."""

    def __init__(self, data: bytes, name: str) -> None:
        """Raises: UserError if the bytes are no tokenizer, or it has no token that ends a text."""
        self.data, self.name = data, name
        self.sha256 = hashlib.sha256(data).hexdigest()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the package raises the bare class
            raise UserError(f"tokenizer {name} cannot be read: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        found = [vocabulary[token] for token in END_OF_TEXT if token in vocabulary]
        if not found:
            raise UserError(f"tokenizer {name} has none of {', '.join(END_OF_TEXT)}: an answer could not end")
        self.eos_id = found[0]

    def encode(self, text: str, at_least: int | None = None) -> list[int]:
        """All ids, or only the first ones of a long text: `at_least` of them, and some more, the last of them inexact.

        Tokenising takes a hundred times a text's memory. Spare ids, as many again, lie between those that are asked for
        and the cut, so it does not show; a text that has fewer, since its tokens are long, is cut further on.
        """
        if at_least is not None:
            wanted = at_least + max(at_least, LEAST_SPARE_TOKENS)
            reach = CHARACTERS_PER_TOKEN * wanted
            while reach < len(text):
                ids = self._ids(text[:reach])
                if len(ids) >= wanted:
                    return ids
                reach *= 4
        return self._ids(text)

    def _ids(self, text: str) -> list[int]:
        # "Fast" leaves out the offsets of the tokens, which nobody asks for.
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens)


def load_tokenizer(name_or_folder: str | Path) -> Tokenizer:
    """From a folder with a tokenizer.json, such a file, or the hub. Raises: UserError."""
    path = Path(name_or_folder)
    path = path / "tokenizer.json" if path.is_dir() else path
    if path.is_file():
        return Tokenizer(path.read_bytes(), Path(name_or_folder).absolute().name)
    if path.name == "tokenizer.json" or path.is_absolute():
        raise UserError(f"there is no tokenizer {path}; give a folder with a tokenizer.json, or a hub id")
    return Tokenizer(_download(str(name_or_folder)), str(name_or_folder))


def _download(hub_id: str) -> bytes:
    """From the hub's cache on this machine, else over the network."""
    try:
        cached = huggingface_hub.try_to_load_from_cache(hub_id, "tokenizer.json")
        path = cached if isinstance(cached, str) else huggingface_hub.hf_hub_download(hub_id, "tokenizer.json")
        return Path(path).read_bytes()
    except Exception as error:  # offline, unknown, private: the packages below raise a dozen classes
        raise UserError(
            f"tokenizer {hub_id!r} is neither a folder with a tokenizer.json nor on the hub ({first_line(error)}); "
            "on a machine without network, download it elsewhere and give its folder"
        ) from None


@dataclass(frozen=True)
class EncodedDialogue:
    """Token ids, and the [start, end) ranges of them that are supervised: the answers with their end of text."""

    tokens: list[int]
    spans: list[tuple[int, int]]


def encode_dialogue(
    conversations: Conversation, template: str, tokenizer: Tokenizer, max_text_tokens: int | None = None
) -> EncodedDialogue:
    """A dialogue of alternating {from: human|gpt, value} turns, cut at the limit.

    What is left after the last supervised token is dropped: a question whose answer was cut off teaches nothing.
    Without any supervised token the result is empty.
    """
    tokens: list[int] = []
    spans: list[tuple[int, int]] = []
    for speaker, turn in _encoded_turns(conversations, template, tokenizer, max_text_tokens):
        if speaker == "gpt":
            spans.append((len(tokens), len(tokens) + len(turn)))
        tokens += turn
        if max_text_tokens is not None and len(tokens) > max_text_tokens:
            break
    if max_text_tokens is None or len(tokens) <= max_text_tokens:
        return EncodedDialogue(tokens, spans)
    spans = [(start, min(end, max_text_tokens)) for start, end in spans if start < max_text_tokens]
    return EncodedDialogue(tokens[: spans[-1][1]] if spans else [], spans)


def encode_prompt(conversations: Conversation, template: str, tokenizer: Tokenizer) -> list[int]:
    """The prefix of the training ids that ends where the model must answer; the last turn is the human's."""
    assert conversations[-1]["from"] == "human", "a prompt ends with a question"
    return encode_dialogue(conversations, template, tokenizer).tokens


def _encoded_turns(
    conversations: Conversation, template: str, tokenizer: Tokenizer, at_least: int | None
) -> Iterator[tuple[str, list[int]]]:
    for number, turn in enumerate(conversations):
        text = turn["value"].replace(IMAGE_TOKEN, "").strip()
        if turn["from"] == "gpt":
            yield "gpt", [*tokenizer.encode(text or EMPTY_ANSWER, at_least), tokenizer.eos_id]
        else:
            yield "human", _question(text, number, TEMPLATES[template], tokenizer, at_least)


def _question(text: str, number: int, template: _Template, tokenizer: Tokenizer, at_least: int | None) -> list[int]:
    tokens: list[int] = []
    lead = BETWEEN_TURNS if number else ""
    for part in template.question:
        tokens += [tokenizer.eos_id] if part is None else tokenizer.encode(lead + part.replace("{q}", text), at_least)
        lead = ""
    return tokens
