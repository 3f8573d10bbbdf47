"""Check exported folders with transformers alone: `python check_published.py FOLDER…`.

The test that starts this program chooses the version of transformers by PYTHONPATH. The packages of this project cannot
be imported. Next to each folder NAME, NAME.pt has what this project computes; tests/support/published.py writes it.
The program prints a line for each folder: that its values are equal, or a traceback.
"""

import sys
import traceback
from pathlib import Path

TOLERANCE = 1e-4


class RefuseOurPackages:
    """Make imports of this project's packages fail, as on a machine where the project is not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("model", "preprocess", "pipeline", "tests"):
            raise ModuleNotFoundError(f"refused: {name}")


sys.meta_path.insert(0, RefuseOurPackages())

import torch  # noqa: E402
import transformers  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LogitsProcessor,
)

REMOTE = {"trust_remote_code": True}


class Force(LogitsProcessor):
    """Let `generate` choose the given tokens [b, steps], so that all steps are teacher-forced."""

    def __init__(self, tokens):
        self.tokens, self.step = tokens, 0

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -torch.inf).scatter_(1, self.tokens[:, self.step, None], 0.0)
        self.step += 1
        return forced


def chat(row):
    """Return a dialogue as messages of transformers. The image is part of the first message."""
    roles = {"human": "user", "gpt": "assistant"}
    contents = [[{"type": "text", "text": turn["value"]}] for turn in row["turns"]]
    if row["pixels"] is not None:
        contents[0].insert(0, {"type": "image", "image": Image.fromarray(row["pixels"])})
    return [
        {"role": roles[turn["from"]], "content": content} for turn, content in zip(row["turns"], contents, strict=True)
    ]


def encode(processor, chats):
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    return processor.apply_chat_template(chats, **options, processor_kwargs={"padding": True})


def forced_logits(model, inputs, tokens):
    """Return the logits [b, steps, vocab] that `generate` computes while it is forced to choose `tokens`."""
    steps = tokens.shape[1]
    output = model.generate(
        **inputs,
        max_new_tokens=steps,
        min_new_tokens=steps,
        logits_processor=[Force(tokens)],
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert output.sequences[:, -steps:].equal(tokens)
    return torch.stack(output.logits, 1)


def check_whole_model(folder, rows):
    processor = AutoProcessor.from_pretrained(folder, **REMOTE)
    model, loading = AutoModelForImageTextToText.from_pretrained(folder, **REMOTE, output_loading_info=True)
    assert not any(loading[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading
    patches = [model.config.image_token_id] * model.config.towers[0]["num_patches"]
    for row in rows:
        inputs = encode(processor, [chat(row)])
        expected = (patches if row["pixels"] is not None else []) + row["prompt"]
        assert inputs["input_ids"][0].tolist() == expected, row["turns"]
        found = forced_logits(model, inputs, row["forced"][None])[0]
        torch.testing.assert_close(found, row["logits"], rtol=TOLERANCE, atol=TOLERANCE)
    batch = encode(processor, [chat(row) for row in rows])
    assert not batch["attention_mask"].all(), "the batch needs padding"
    found = forced_logits(model, batch, torch.stack([row["forced"] for row in rows]))
    torch.testing.assert_close(found, torch.stack([row["logits"] for row in rows]), rtol=TOLERANCE, atol=TOLERANCE)
    check_pipeline(folder, model, processor, rows[0])
    check_gradients(model, encode(processor, [chat(rows[0])]))
    check_saving_again(folder, model, processor)


def check_pipeline(folder, model, processor, row):
    ask = transformers.pipeline("image-text-to-text", model=str(folder), **REMOTE)
    [answer] = ask(text=[chat(row)], return_full_text=False, max_new_tokens=8)
    inputs = encode(processor, [chat(row)])
    tokens = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
    text = processor.decode(tokens, skip_special_tokens=True)
    assert (answer[0] if isinstance(answer, list) else answer)["generated_text"] == text, (answer, text)


def check_gradients(model, inputs):
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
    model.train()
    model(**inputs, labels=labels).loss.backward()
    model.eval()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing, missing


def check_saving_again(folder, model, processor):
    again = folder / "again"
    model.save_pretrained(again)
    processor.save_pretrained(again)
    reloaded = AutoModelForImageTextToText.from_pretrained(again, **REMOTE).state_dict()
    assert reloaded.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, reloaded[name]) for name, tensor in model.state_dict().items())


def check_shapes(folder, shapes):
    """Check the name and shape of every tensor of a model without weights."""
    config = AutoConfig.from_pretrained(folder, **REMOTE)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, **REMOTE)
    found = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    found.pop("language_model.lm_head.weight")  # tied to the embedding
    assert found == shapes, found.items() ^ shapes.items()


def check_language_model(folder, expected):
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer.encode(expected["text"])
    assert ids == expected["ids"], ids
    found = model(input_ids=torch.tensor([ids]), use_cache=False).logits
    torch.testing.assert_close(found, expected["logits"], rtol=TOLERANCE, atol=TOLERANCE)
    for name in ("eos_token_id", "pad_token_id"):
        assert [getattr(part, name) for part in (tokenizer, model.config, model.generation_config)] == [
            expected[name]
        ] * 3
    end = expected["eos_token_id"]
    assert tokenizer.decode([end, ids[0]], skip_special_tokens=True) == tokenizer.decode(ids[:1])


CHECKS = {"whole": check_whole_model, "shapes": check_shapes, "language model": check_language_model}


def main():
    failed = False
    for folder in map(Path, sys.argv[1:]):
        kind, expected = torch.load(f"{folder}.pt", weights_only=False)
        try:
            CHECKS[kind](folder, expected)
            print(f"{folder.name}: equal in transformers {transformers.__version__}")
        except Exception:  # so that the other folders are checked too
            failed = True
            print(f"{folder.name}: {traceback.format_exc()}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
