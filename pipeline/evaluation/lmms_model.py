"""EMMA as a model of lmms-eval: `lmms-eval --model emma --model_args pretrained=FOLDER --tasks pope`."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from pipeline.inference.engine import InferenceEngine, load
from pipeline.inference.journal import Journal
from pipeline.inference.questions import AnswerProgress
from pipeline.inference.requests import Pixels, Request
from preprocess.images.codec import decode_rgb, encode_jpeg, resize_to_square
from preprocess.prompts import clean_text, encode_prompt

DEFAULT_MAX_NEW_TOKENS = 64  # for tasks that set no limit
NOT_IN_SHEETS = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f]"
)  # MMBench's tasks write answers to Excel files and would fail
PADDING = "__padding_only__"  # marks requests that lmms-eval adds to give all ranks the same number


def manifest() -> ModelManifest:
    """Return what lmms-eval needs to find the model; an entry point in pyproject.toml names this function."""
    return ModelManifest(model_id="emma", simple_class_path=f"{__name__}.EmmaModel")


class EmmaModel(lmms):
    """Answers the requests of lmms-eval with the inference engine.

    A task may set `choose_from` in its `generation_kwargs`: the answer is then the most likely of these strings.

    Attributes:
        journal: Keeps the answers; None: answers are not kept. Answers in the journal are not computed again.
        known: Answers that earlier calls computed, by the names that they have in journals.

    Args:
        pretrained: Folder written by pipeline.export.
        batch_size: Largest number of requests that are decoded together; lmms-eval passes a string.
        device: "auto", "cpu", "cuda" or a GPU such as "cuda:1". Without a number, the local rank selects the GPU.
    """

    is_simple = True

    def __init__(self, pretrained: str, batch_size: int | str = 64, device: str = "auto", **_: Any) -> None:
        super().__init__()
        kind, colon, number = device.partition(":")
        if kind != "cpu" and torch.cuda.is_available():
            torch.cuda.set_device(
                int(number if colon else os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
            )
        self.loaded, self.tokenizer = load(pretrained, kind)
        self.engine = InferenceEngine(self.loaded, self.tokenizer, max_batch=int(batch_size))
        self.journal: Journal | None = None
        self.known: dict[str, Any] = {}

    @property
    def device(self) -> torch.device:
        """The device of the tensors that lmms-eval exchanges between ranks."""
        on_cpu = dist.is_initialized() and dist.get_backend() == "gloo"
        return torch.device("cpu") if on_cpu else self.loaded.device

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Return the answer to each request, in order."""
        ids = [_request_id(request) for request in requests]
        answers = {i: answer for i, name in enumerate(ids) if (answer := self._known_answer(name)) is not None}
        answers |= {i: {"text": "", "tokens": 0} for i, request in enumerate(requests) if request.metadata.get(PADDING)}
        open_rows = [i for i in range(len(requests)) if i not in answers]
        progress = AnswerProgress(
            len(requests), reused=len(answers), quiet=self.rank > 0, name=f"{requests[0].task_name:<14}"
        )
        for i, answer in self._answers(requests, open_rows):
            answers[i] = answer
            if self.journal:
                self.journal.add(ids[i], answer)
            progress.update(len(answers))
        return [
            GenerationResult(
                text=NOT_IN_SHEETS.sub("", answers[i]["text"]),
                token_counts=TokenCounts(output_tokens=answers[i]["tokens"]),
            )
            for i in range(len(requests))
        ]

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Return the negative log-likelihood of each request's continuation, and whether it is the greedy one.

        lmms-eval takes the choice with the smallest value as the answer. It would convert a plain tuple to a string.
        """
        results = []
        for request in requests:
            context, target, to_images, number, task, split = request.args
            document = self.task_dict[task][split][number]
            continuation = self.tokenizer.encode(clean_text(target(document) if callable(target) else target))
            asked = self._request(context, to_images(document), max_new_tokens=len(continuation))
            [value] = self.engine.log_likelihoods(asked, [continuation])
            greedy = self.engine.complete([asked])[0].tokens == continuation
            results.append(GenerationResult(text=(-value, greedy)))
        return results

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("EMMA answers tasks of one round only")

    def clean(self) -> None:
        """Keep the model, because the next task needs it. lmms-eval calls this after each task to free memory."""

    def _known_answer(self, name: str) -> dict[str, Any] | None:
        return self.known.get(name) or (self.journal.get(name) if self.journal else None)

    def _answers(self, requests: list[Instance], rows: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the row and the answer of each request, as soon as it is known."""
        free = [i for i in rows if "choose_from" not in requests[i].args[1]]
        for i in rows:
            if choices := requests[i].args[1].get("choose_from"):
                asked = self._open(requests[i])
                values = self.engine.log_likelihoods(asked, [self.tokenizer.encode(choice) for choice in choices])
                yield i, {"text": choices[int(np.argmax(values))], "tokens": 1}
        free.sort(key=lambda i: len(requests[i].args[0]))  # similar lengths decode together
        for position, completion in self.engine.run(self._open(requests[i]) for i in free):
            yield free[position], {"text": completion.text, "tokens": len(completion.tokens)}

    def _open(self, request: Instance) -> Request:
        """Make the engine's request, and read its image, which happens when the engine has room for the request."""
        context, settings, to_images, number, task, split = request.args
        stop = settings.get("until") or ()
        return self._request(
            context,
            to_images(self.task_dict[task][split][number]),
            max_new_tokens=int(settings.get("max_new_tokens", DEFAULT_MAX_NEW_TOKENS)),
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
        )

    def _request(
        self, question: str, images: Sequence[Any] | None, *, max_new_tokens: int, stop: tuple[str, ...] = ()
    ) -> Request:
        if images and len(images) > 1:
            raise ValueError(f"{question!r} has {len(images)} images; EMMA takes one")
        prompt = encode_prompt([{"from": "human", "value": question}], self.loaded.config.template, self.tokenizer)
        image = self._pixels(images[0]) if images else None
        return Request(prompt=prompt, image=image, max_new_tokens=max_new_tokens, stop=stop)

    def _pixels(self, image: Any) -> Pixels:
        """Convert a Pillow image to the pixels that the model saw in training, with their JPEG artefacts."""
        pixels = resize_to_square(np.asarray(image.convert("RGB")), self.loaded.config.vision.image_px)
        return decode_rgb(encode_jpeg(pixels))


def _request_id(request: Instance) -> str:
    """Return the number of the document, and a hash of its prompt, which changes if the data set changes."""
    return f"{request.doc_id} {hashlib.sha256(clean_text(request.args[0]).encode()).hexdigest()[:12]}"
