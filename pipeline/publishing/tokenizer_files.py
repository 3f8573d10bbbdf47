"""Tokenizer, chat template, processor and generation settings of an exported folder, as transformers reads them.

We tokenize a dialogue turn by turn, but transformers tokenizes the whole text that the chat template makes. To give the
same ids, the template puts an invisible character after each prompt, where the exported tokenizer splits the text. The
tokenizer then removes this character.
"""

from __future__ import annotations

import json
from typing import Any

from model.config import EmmaConfig
from model.transformers_layout import TokenIds
from preprocess.prompts import BETWEEN_TURNS, EMPTY_ANSWER, IMAGE_TOKEN, TEMPLATES, Tokenizer

BOUNDARY = "\u2063"  # the invisible separator
MAX_NEW_TOKENS = 256
CUBIC = 3  # Pillow's number of bicubic interpolation

TEXT_OF_MESSAGE = """\
{%- macro text(message) -%}
{%- if message.content is string -%}{{ message.content | replace('<image>', '') | trim }}
{%- else -%}
{%- set parts = namespace(text='') -%}
{%- for part in message.content if part.type == 'text' -%}{%- set parts.text = parts.text + part.text -%}{%- endfor -%}
{{ parts.text | replace('<image>', '') | trim }}
{%- endif -%}
{%- endmacro -%}
"""
# The image comes first, wherever it stands in the dialogue, as in training.
IMAGE = """\
{%- set found = namespace(images=0) -%}
{%- for message in messages if message.content is not string -%}
{%- for part in message.content if part.type == 'image' -%}{%- set found.images = found.images + 1 -%}{%- endfor -%}
{%- endfor -%}
{%- if found.images > 1 -%}{{ raise_exception('This model sees one image per dialogue.') }}{%- endif -%}
{%- if found.images -%}{{ '<image>' }}{%- endif -%}
"""


def token_ids(tokenizer: Tokenizer) -> TokenIds:
    """Return the ids of the tokenizer's special tokens, of which `<image>` may be a new one."""
    content = json.loads(tokenizer.data)
    known = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    image = known.get(IMAGE_TOKEN, tokenizer.vocab_size)
    return TokenIds(eos=tokenizer.eos_id, pad=tokenizer.pad_id, image=image)


def model_files(tokenizer: Tokenizer, config: EmmaConfig) -> dict[str, str]:
    """Return the contents of the files besides weights, configuration and code, by name."""
    ids = token_ids(tokenizer)
    image_px = config.vision.image_px
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE_TOKEN,
        "patch_size": config.vision.patch_px,
        "num_additional_image_tokens": 0,
        "vision_feature_select_strategy": "full",
        "image_processor": {
            "image_processor_type": "SiglipImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"height": image_px, "width": image_px},
            "resample": CUBIC,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": False,  # the model does, because each tower has its own mean
        },
    }
    max_tokens = config.vision.num_patches + config.max_text_tokens
    tokenizer_config = _tokenizer_config(tokenizer, max_tokens) | {
        "image_token": IMAGE_TOKEN,
        "processor_class": "LlavaProcessor",
    }
    return {
        "tokenizer.json": json.dumps(_split_at_boundaries(tokenizer, ids), ensure_ascii=False),
        "tokenizer_config.json": _json(tokenizer_config),
        "chat_template.jinja": chat_template(config.template),
        "processor_config.json": _json(processor),
        "generation_config.json": _generation_config(ids),
    }


def splits_turns_equally(tokenizer: Tokenizer) -> bool:
    """Return whether the exported tokenizer splits a text at `BOUNDARY` into the same ids as two separate texts.

    Some tokenizers do not, because they treat the beginning of a text in a special way.
    """
    exported = Tokenizer(json.dumps(_split_at_boundaries(tokenizer, token_ids(tokenizer))).encode(), tokenizer.name)
    prompt, answer = "What is it?\nOut: ", "Red."
    return exported.encode(prompt + BOUNDARY + answer) == tokenizer.encode(prompt) + tokenizer.encode(answer)


def language_model_files(tokenizer: Tokenizer, config: EmmaConfig) -> dict[str, str]:
    """Return the contents of the files besides weights and configuration for the language model alone, by name."""
    return {
        "tokenizer.json": tokenizer.data.decode("utf-8"),
        "tokenizer_config.json": _json(_tokenizer_config(tokenizer, config.max_text_tokens)),
        "generation_config.json": _generation_config(token_ids(tokenizer)),
    }


def chat_template(template: str) -> str:
    """Return the Jinja template that gives the same text as `encode_prompt`, with `BOUNDARY` after each prompt."""
    question = "".join(
        "{{ eos_token }}" if part is None else "".join(_expressions(part)) for part in TEMPLATES[template]
    )
    return (
        f"{TEXT_OF_MESSAGE}{IMAGE}"
        "{%- for message in messages -%}"
        "{%- if message.role == 'user' -%}"
        f"{{%- if not loop.first -%}}{{{{ {BETWEEN_TURNS!r} }}}}{{%- endif -%}}"
        f"{question}{{{{ '{BOUNDARY}' }}}}"
        "{%- elif message.role == 'assistant' -%}"
        f"{{{{ (text(message) or {EMPTY_ANSWER!r}) + eos_token }}}}"
        "{%- else -%}"
        "{{ raise_exception('This model knows the roles user and assistant only, not ' + message.role + '.') }}"
        "{%- endif -%}{%- endfor -%}"
    )


def _expressions(part: str) -> list[str]:
    before, question, after = part.partition("{q}")
    return [
        *([f"{{{{ {before!r} }}}}"] if before else []),
        *(["{{ text(message) }}"] if question else []),
        *([f"{{{{ {after!r} }}}}"] if after else []),
    ]


def _split_at_boundaries(tokenizer: Tokenizer, ids: TokenIds) -> dict[str, Any]:
    """Return the content of tokenizer.json with the token `<image>` and the split at `BOUNDARY`."""
    content = json.loads(tokenizer.data)
    added = content.setdefault("added_tokens", [])
    if IMAGE_TOKEN not in {token["content"] for token in added}:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added.append({"id": ids.image, "content": IMAGE_TOKEN, **flags, "special": True})
    split = {"type": "Split", "pattern": {"String": BOUNDARY}, "behavior": "Removed", "invert": False}
    own = content.get("pre_tokenizer")
    steps = own["pretokenizers"] if own and own["type"] == "Sequence" else [own] if own else []
    if split not in steps:
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, *steps]}
    content["post_processor"] = None  # in some tokenizers, it adds tokens that the model was trained without
    return content


def _tokenizer_config(tokenizer: Tokenizer, max_tokens: int) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.eos_token,
        "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.pad_token,
        "padding_side": "left",
        "model_max_length": max_tokens,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }


def _generation_config(ids: TokenIds) -> str:
    return _json(
        {
            "bos_token_id": ids.eos,
            "eos_token_id": ids.eos,
            "pad_token_id": ids.pad,
            "do_sample": False,
            "max_new_tokens": MAX_NEW_TOKENS,
        }
    )


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
