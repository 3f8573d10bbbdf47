"""The published tokenizer of GPT-NeoX-20B, loaded from tests/golden."""

import functools
import gzip
from pathlib import Path

from preprocess.prompts import Tokenizer

PACKED = Path(__file__).parents[1] / "golden" / "20B_tokenizer.json.gz"


@functools.cache
def gpt_neox() -> Tokenizer:
    return Tokenizer(gzip.decompress(PACKED.read_bytes()), "gpt-neox-20b")
