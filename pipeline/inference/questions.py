"""Question files: reading their rows, and answering all questions with a journal, streamed images and progress."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from model.errors import UserError
from pipeline.inference.engine import InferenceEngine
from pipeline.inference.journal import Journal
from pipeline.inference.requests import FinishReason, Pixels, Request
from preprocess.annotations.other_media import find_reference
from preprocess.annotations.reader import rows_with_place
from preprocess.images.codec import read_image_file
from preprocess.images.store import ImageStore
from preprocess.progress import format_duration
from preprocess.prompts import IMAGE_TOKEN, clean_text, encode_prompt
from preprocess.rejects import REASONS, Rejected
from preprocess.remote_path import find_file, with_slashes

DECODING_THREADS, IMAGES_AHEAD = 4, 64
REPORT_EVERY_S = 5.0
DRAW_DIGITS = 15  # hex digits of a question's sha256 that select its random draw


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question, and the name of its image relative to the image folder; None: it is asked without an image."""

    question: str
    image: str | None = None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A model's answer to a question. See `Completion` for the meaning of `finish_reason`."""

    text: str
    finish_reason: FinishReason


@dataclass(frozen=True, kw_only=True)
class ImageFile:
    """An image file, and a text that changes if the file changes: its size, and its time unless it is in an archive."""

    path: Path
    version: str


# -- Reading -----------------------------------------------------------------------------------------------------------


def read_rows(path: Path, required: Sequence[str]) -> list[dict[str, Any]]:
    """Read the rows of a question file, with the same reader as annotation files.

    The `required` strings and `image` of each row are cleaned as in training. `image` is None in a row without image.

    Raises: UserError that names the line, if a required string is missing.
    """
    rows = [_checked_row(row, f"{path}, {place}", required) for place, row in rows_with_place(path)]
    if not rows:
        raise UserError(f"{path}: found no questions, expected one JSON object per line")
    return rows


def _checked_row(row: Any, where: str, required: Sequence[str]) -> dict[str, Any]:
    if isinstance(row, Rejected):
        raise UserError(f"{where}: not JSON ({row.detail}). Correct the row.")
    if not isinstance(row, dict) or any(not isinstance(row.get(key), str) for key in required):
        found = json.dumps(row, default=str)[:80]
        raise UserError(f"{where}: found {found}, expected an object with the strings {', '.join(required)}")
    image = row.get("image") or None
    if isinstance(image, list) and len(image) == 1:  # as in annotation files
        [image] = image
    if not isinstance(image, str | None):
        raise UserError(f"{where}: `image` is {json.dumps(image, default=str)[:80]}, expected a file name or null")
    if image is None and IMAGE_TOKEN in row["question"]:
        raise UserError(f"{where}: the question contains {IMAGE_TOKEN}, but the row has no `image`. Add one.")
    if image is None and (reference := find_reference(row, [row["question"]])):
        raise UserError(f"{where}: the row has no `image`, but {reference}. Name its image under `image`.")
    return {**row, "image": image, **{key: clean_text(row[key]) for key in required}}


def find_images(questions: Iterable[Question], folder: Path | None) -> dict[str, ImageFile]:
    """Find the image files of questions, as a build of shards would find them.

    Raises: UserError if an image does not exist, or if there are images but no folder.
    """
    names = {question.image: None for question in questions if question.image is not None}
    if not names:
        return {}
    if folder is None:
        raise UserError(f"--images: not given, although the questions name {len(names)} images. Name their folder.")
    store = ImageStore(folder, {})
    return {name: _find_image(store, folder, name) for name in names}


def _find_image(store: ImageStore, folder: Path, name: str) -> ImageFile:
    path = Path(str(find_file(folder, name)))
    with contextlib.suppress(OSError, ValueError):  # raised if there is no such file, or if the name is invalid
        status = path.stat()
        return ImageFile(path=path, version=f"{status.st_size} {status.st_mtime_ns}")
    size = store.size(with_slashes(name))
    if size is None:
        raise UserError(f"image {clean_text(str(path))} cannot be used: {REASONS['picture_missing']}. Check its path.")
    return ImageFile(path=path, version=str(size))


def check_output(option: str, path: Path | None, questions: Path | None) -> None:
    """Check, before answers are computed, that a file can be written and does not replace the question file.

    Raises: UserError.
    """
    if path is None:
        return
    if not path.absolute().parent.is_dir():
        raise UserError(f"{option} {path}: the folder {path.parent} does not exist. Create it, or choose another.")
    if path.is_dir():
        raise UserError(f"{option} {path}: found a folder, expected a file. Choose another name.")
    if questions is not None and path.resolve() == questions.resolve():
        raise UserError(f"{option} {path}: is the file of questions, which would be lost. Choose another name.")


# -- Answering ---------------------------------------------------------------------------------------------------------


def answer_questions(
    engine: InferenceEngine,
    questions: Sequence[Question],
    images: Mapping[str, ImageFile],
    *,
    max_new_tokens: int,
    stop: tuple[str, ...] = (),
    journal: Journal | None = None,
    quiet: bool = False,
) -> list[Answer]:
    """Return the model's answers in the order of the questions, and print progress.

    Args:
        images: Result of `find_images`. Images are decoded shortly before they are needed.
        journal: Journal from which known answers are taken, and to which new answers are added.
        quiet: Print nothing.
    """
    ids = _question_ids(questions, images)
    answers = {} if journal is None else {key: Answer(**journal.answers[key]) for key in ids if key in journal.answers}
    missing = [i for i, key in enumerate(ids) if key not in answers]
    progress = AnswerProgress(len(ids), reused=len(answers), quiet=quiet)
    image_px = engine.model.config.vision.image_px
    pixels = _stream_images(
        [questions[i].image for i in missing], lambda name: read_image_file(images[name].path, image_px)
    )
    requests = (
        Request(
            prompt=encode_prompt(
                [{"from": "human", "value": questions[i].question}], engine.model.config.template, engine.tokenizer
            ),
            image=image,
            max_new_tokens=max_new_tokens,
            stop=stop,
            draw=int(ids[i][:DRAW_DIGITS], 16),
        )
        for i, image in zip(missing, pixels, strict=True)
    )
    for position, completion in engine.run(requests):
        key = ids[missing[position]]
        answers[key] = Answer(text=completion.text, finish_reason=completion.finish_reason)
        if journal is not None:
            journal.add(key, asdict(answers[key]))
        progress.update(len(answers))
    return [answers[key] for key in ids]


def _question_ids(questions: Sequence[Question], images: Mapping[str, ImageFile]) -> list[str]:
    """Return an id of each question: the sha256 of its text and image name, and the version of its image file.

    Repeated questions have different ids, so that each of them can get another sampled answer. The random draw depends
    on the sha256 only, so that a copied image folder gives the same sampled answers.
    """
    seen: Counter[str] = Counter()
    ids = []
    for question in questions:
        text = json.dumps([question.question, question.image])
        version = "" if question.image is None else images[question.image].version
        ids.append(f"{hashlib.sha256(f'{seen[text]} {text}'.encode()).hexdigest()} {version}")
        seen[text] += 1
    return ids


def _stream_images(names: Iterable[str | None], load: Callable[[str], Pixels]) -> Iterator[Pixels | None]:
    """Yield the image of each name, or None. Threads decode the next images meanwhile.

    An image that several questions in a row share is decoded once.
    """
    with ThreadPoolExecutor(DECODING_THREADS) as pool:
        futures: deque[Future[Pixels] | None] = deque()
        previous: str | None = None
        future: Future[Pixels] | None = None
        for name in names:
            if name != previous:
                previous, future = name, None if name is None else pool.submit(load, name)
            futures.append(future)
            if len(futures) > IMAGES_AHEAD:
                yield _result(futures.popleft())
        while futures:
            yield _result(futures.popleft())


def _result(future: Future[Pixels] | None) -> Pixels | None:
    return None if future is None else future.result()


class AnswerProgress:
    """Progress line with rate and time left, printed at the start, every few seconds, and at the end.

    Args:
        total: Number of questions.
        reused: Number of answers that were known at the start. They count as done, but not towards the rate.
        quiet: Print nothing.
        name: What is printed before the numbers, such as the name of a benchmark.
    """

    def __init__(self, total: int, *, reused: int = 0, quiet: bool = False, name: str = "") -> None:
        self.total, self.reused, self.quiet, self.name = total, reused, quiet, name
        self.started = self.last_print = time.monotonic()
        if not quiet:
            known = f", {reused} of them answered by an earlier call" if reused else ""
            print(f"{name}  {total} questions{known}", flush=True)

    def update(self, done: int) -> None:
        now = time.monotonic()
        if self.quiet or (now - self.last_print < REPORT_EVERY_S and done < self.total):
            return
        self.last_print = now
        rate = (done - self.reused) / max(now - self.started, 1e-9)
        left = format_duration((self.total - done) / rate)
        print(f"{self.name}  {done}/{self.total} questions  {rate:.1f}/s  {left} left", flush=True)
