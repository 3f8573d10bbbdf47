"""Tokenizer and chat template of an exported folder, for tokenizers other than GPT-NeoX."""

import json

import pytest
from tokenizers import Tokenizer as HubTokenizer
from tokenizers import decoders, models, pre_tokenizers

from model.presets import preset
from pipeline.publishing.tokenizer_files import BOUNDARY, model_files, splits_turns_equally, token_ids
from preprocess.prompts import Tokenizer, load_tokenizer
from tests.support.golden_tokenizer import gpt_neox
from tests.support.tiny_data import write_byte_tokenizer


def exported(tokenizer: Tokenizer) -> Tokenizer:
    return Tokenizer(model_files(tokenizer, preset("tiny_v2"))["tokenizer.json"].encode(), "exported")


def test_the_ids_of_eos_and_pad_come_from_the_tokenizer_in_every_file(tmp_path):
    tokenizer = load_tokenizer(write_byte_tokenizer(tmp_path, specials=("<unk>", "<s>", "</s>", "<pad>")))
    files = model_files(tokenizer, preset("tiny_v2"))
    ids = token_ids(tokenizer)
    assert (ids.eos, ids.pad, ids.image) == (2, 3, tokenizer.vocab_size)
    generation = json.loads(files["generation_config.json"])
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (2, 3)
    config = json.loads(files["tokenizer_config.json"])
    assert (config["eos_token"], config["pad_token"]) == ("</s>", "<pad>")


def test_a_tokenizer_without_padding_token_pads_with_the_end_of_text(tmp_path):
    ids = token_ids(load_tokenizer(write_byte_tokenizer(tmp_path, specials=("<unk>", "<|end_of_text|>"))))
    assert (ids.eos, ids.pad) == (1, 1)


def test_exporting_an_exported_tokenizer_again_changes_nothing():
    once = exported(gpt_neox())
    assert exported(once).data == once.data
    assert token_ids(once) == token_ids(gpt_neox())


@pytest.mark.parametrize(
    "text", ["In: Is it red?\nOut: Red", "  two  spaces ", "<image> and <|endoftext|> as text", ""]
)
def test_the_exported_tokenizer_gives_this_project_the_ids_of_training(text):
    assert exported(gpt_neox()).encode(text) == gpt_neox().encode(text)


def test_a_boundary_keeps_an_answer_from_being_merged_with_its_prompt():
    prompt, answer = "In: Which colour?\nOut: ", "Red"
    apart = gpt_neox().encode(prompt) + gpt_neox().encode(answer)
    assert gpt_neox().encode(prompt + answer) != apart
    assert exported(gpt_neox()).encode(prompt + BOUNDARY + answer) == apart
    assert splits_turns_equally(gpt_neox())


def test_a_tokenizer_that_marks_the_beginning_of_a_text_is_noticed():
    vocabulary = {token: i for i, token in enumerate(["<unk>", "</s>", *"▁What isOutRed.:?\n"])}
    tokenizer = HubTokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    assert not splits_turns_equally(Tokenizer(tokenizer.to_str().encode(), "metaspace"))
