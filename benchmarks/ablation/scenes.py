"""Generated scenes full of fine detail, with exact questions: many objects, small signs, tables and bar plots.

A scene is drawn at random. It determines the image, the questions with their answers, and which marks (shapes and
characters) each patch contains. Two kinds of questions ask for what may not be there: "exists" is answered yes or no,
and "absent" asks for a property of something that the image does not contain, so that the answer is "none".
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from preprocess.demo.scenes import BACKGROUNDS, COLOURS, SHAPES, Colour, Question, draw_shape, shade

SCENE_PX = 196
LETTERS, DIGITS = "ABCDEFGHJKLMNPRSTUVWXYZ", "0123456789"  # no I, O and Q, which look like other characters
LABELS = (*SHAPES, *LETTERS, *DIGITS, *COLOURS)  # what a patch can contain
INK: Colour = (20, 20, 24)
NONE = "none"
ORDINARY = ("text", "colour", "count", "position", "relation", "table", "plot")
KINDS = (*ORDINARY, "exists", "absent")
QUESTIONS_PER_SCENE = 4  # at most: two ordinary ones, one of kind "exists" and one of kind "absent"


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A shape or a character, centred at (x, y). `radius` is half its height, or half the size of its font."""

    name: str
    colour: str  # a key of COLOURS, or "" for ink
    paint: Colour
    x: float
    y: float
    radius: float


@dataclass(frozen=True, kw_only=True)
class Box:
    """A filled rectangle, for bars and lines. `edges` are left, top, right and bottom."""

    paint: Colour
    edges: tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True)
class DetailScene:
    """What is drawn, and the questions about it."""

    background: Colour
    marks: Sequence[Mark]
    boxes: Sequence[Box]
    questions: Sequence[Question]


def draw_scene(rng: random.Random) -> DetailScene:
    """Draw a random scene of a random family."""
    return rng.choice((_objects, _signs, _table, _plot))(rng)


def render(scene: DetailScene, image_px: int) -> npt.NDArray[np.uint8]:  # [image_px, image_px, 3]
    """Render a scene, and resize it if `image_px` differs from `SCENE_PX`."""
    image = Image.new("RGB", (SCENE_PX, SCENE_PX), scene.background)
    pen = ImageDraw.Draw(image)
    for box in scene.boxes:
        pen.rectangle(box.edges, fill=box.paint)
    for mark in scene.marks:
        if mark.name in SHAPES:
            draw_shape(pen, mark.name, (mark.x, mark.y), mark.radius, mark.paint)
        else:
            pen.text((mark.x, mark.y), mark.name, mark.paint, _font(round(2 * mark.radius)), anchor="mm")
    return np.asarray(image if image_px == SCENE_PX else image.resize((image_px, image_px), Image.Resampling.BICUBIC))


def patch_labels(scene: DetailScene, grid: int) -> npt.NDArray[np.bool_]:  # [grid * grid, LABELS]
    """Return which shapes, characters and colours each patch contains. A mark belongs to the patch of its centre."""
    labels = np.zeros((grid, grid, len(LABELS)), np.bool_)
    for mark in scene.marks:
        row, column = (min(grid - 1, int(at * grid / SCENE_PX)) for at in (mark.y, mark.x))
        for name in filter(None, (mark.name, mark.colour)):
            labels[row, column, LABELS.index(name)] = True
    return labels.reshape(grid * grid, -1)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


# -- Families of scenes ------------------------------------------------------------------------------------------------


def _objects(rng: random.Random) -> DetailScene:
    """Draw six to ten small objects on a grid of five rows and columns, of four colours and three shapes."""
    background, cell_px = _background(rng), 38
    colours, shapes = rng.sample(tuple(COLOURS), 4), rng.sample(SHAPES, 3)
    cells = sorted(rng.sample([(row, column) for row in range(5) for column in range(5)], rng.randint(6, 10)))
    names = {cell: (rng.choice(colours), rng.choice(shapes)) for cell in cells}
    marks = [
        Mark(
            name=shape,
            colour=colour,
            paint=shade(COLOURS[colour], 14, rng),
            x=3 + (column + 0.5) * cell_px + rng.uniform(-4, 4),
            y=3 + (row + 0.5) * cell_px + rng.uniform(-4, 4),
            radius=rng.uniform(8, 12),
        )
        for (row, column), (colour, shape) in names.items()
    ]
    ordinary, absent = _questions_about_objects(names, rng)
    missing = [(colour, shape) for colour in colours for shape in shapes if (colour, shape) not in names.values()]
    absent.append(_ask("absent", f"Where is the {' '.join(rng.choice(missing))}?", NONE))
    present = rng.choice(list(names.values()))
    exists = _exists("Is there a {}?", " ".join(present), " ".join(rng.choice(missing)), rng)
    return _scene(background, marks, [], _select(ordinary, exists, absent, rng))


def _questions_about_objects(
    names: dict[tuple[int, int], tuple[str, str]], rng: random.Random
) -> tuple[list[Question], list[Question]]:
    """Return the ordinary questions, and those about an object to the right of the last one in its row."""
    ordinary, absent = [], []
    for colour, count in Counter(colour for colour, _ in names.values()).items():
        ordinary.append(_ask("count", f"How many {colour} objects are there?", str(count)))
    for shape, count in Counter(shape for _, shape in names.values()).items():
        ordinary.append(_ask("count", f"How many {shape} shapes are there?", str(count)))
        if count == 1:
            [colour] = (colour for colour, other in names.values() if other == shape)
            ordinary.append(_ask("colour", f"What colour is the {shape}?", colour))
    unique = {name for name, count in Counter(names.values()).items() if count == 1}
    for (row, column), name in names.items():
        if name not in unique:
            continue
        described = " ".join(name)
        ordinary.append(_ask("position", f"Where is the {described}?", f"row {row + 1} column {column + 1}"))
        side, step = rng.choice((("right", 1), ("left", -1)))
        others = sorted((c for r, c in names if r == row and (c - column) * step > 0), key=lambda c: c * step)
        question = f"What is {side} of the {described}?"
        if others:
            ordinary.append(_ask("relation", question, " ".join(names[row, others[0]])))
        else:
            absent.append(_ask("absent", question, NONE))
    return ordinary, absent


def _signs(rng: random.Random) -> DetailScene:
    """Draw four to seven signs of three characters, each in another colour, in two columns and five rows."""
    background, size, advance = _background(rng), 17, 12
    slots = sorted(rng.sample([(row, column) for row in range(5) for column in range(2)], rng.randint(4, 7)))
    colours = rng.sample(tuple(COLOURS), len(COLOURS))
    codes = ["".join(rng.choices(LETTERS + DIGITS, k=3)) for _ in slots]
    marks: list[Mark] = []
    ordinary = []
    for (row, column), code, colour in zip(slots, codes, colours, strict=False):
        x, y = 98 * column + rng.uniform(22, 50), 39 * row + rng.uniform(14, 25)
        marks += _characters(code, colour, x, y, size=size, advance=advance, rng=rng)
        ordinary += [
            _ask("text", f"What does the {colour} sign say?", code),
            _ask("colour", f"What colour is the sign {code}?", colour),
            _ask("position", f"Where is the {colour} sign?", f"row {row + 1} column {column + 1}"),
        ]
    wrong = _change_one(rng.choice(codes), LETTERS + DIGITS, codes, rng)
    absent = [
        _ask("absent", f"What does the {colours[-1]} sign say?", NONE),
        _ask("absent", f"What colour is the sign {wrong}?", NONE),
    ]
    exists = _exists("Is there a sign {}?", rng.choice(codes), wrong, rng)
    return _scene(background, marks, [], _select(ordinary, exists, absent, rng))


def _table(rng: random.Random) -> DetailScene:
    """Draw a table of two-digit numbers, with three columns and three or four rows that are named by letters."""
    num_rows, width, height, size = rng.randint(3, 4), 44, 36, 16
    left, top = rng.uniform(4, 16), rng.uniform(4, 12)
    letters = rng.sample(LETTERS, num_rows + 4)
    rows, columns, missing = letters[:num_rows], letters[num_rows:-1], letters[-1]
    numbers = [str(number) for number in rng.sample(range(10, 100), num_rows * 3)]
    marks: list[Mark] = []
    boxes, ordinary = [], []
    for i, name in enumerate(["", *columns]):
        marks += _characters(name, "", left + (i + 0.5) * width, top + height / 2, size=size, advance=10, rng=rng)
    for j, row in enumerate(rows):
        y = top + (j + 1.5) * height
        boxes.append(Box(paint=INK, edges=(left, y - height / 2, left + 4 * width, y - height / 2)))
        marks += _characters(row, "", left + width / 2, y, size=size, advance=10, rng=rng)
        for i, column in enumerate(columns):
            number = numbers[3 * j + i]
            marks += _characters(number, "", left + (i + 1.4) * width, y, size=size, advance=10, rng=rng)
            ordinary.append(_ask("table", f"What is in row {row} column {column}?", number))
            ordinary.append(_ask("table", f"Which row has {number}?", row))
    boxes.append(Box(paint=INK, edges=(left + width, top, left + width, top + (num_rows + 1) * height)))
    wrong = _change_one(rng.choice(numbers), DIGITS[1:], numbers, rng)
    absent = [
        _ask("absent", f"What is in row {missing} column {rng.choice(columns)}?", NONE),
        _ask("absent", f"Which row has {wrong}?", NONE),
    ]
    exists = _exists("Is there the number {}?", rng.choice(numbers), wrong, rng)
    return _scene((238, 238, 232), marks, boxes, _select(ordinary, exists, absent, rng))


def _plot(rng: random.Random) -> DetailScene:
    """Draw a plot of three to six bars in different colours, with heights from one to nine."""
    colours = rng.sample(tuple(COLOURS), len(COLOURS))
    bars = {colour: rng.randint(1, 9) for colour in colours[: rng.randint(3, 6)]}
    unit, bottom, width = 18, 184, rng.randint(16, 22)
    boxes = [Box(paint=(150, 150, 150), edges=(24, bottom - unit * i, 192, bottom - unit * i)) for i in range(10)]
    marks: list[Mark] = []
    for i in range(10):
        marks += _characters(str(i), "", 12, bottom - unit * i, size=14, advance=9, rng=rng)
    ordinary = [_ask("count", "How many bars are there?", str(len(bars)))]
    names = list(bars)
    for i, (colour, height) in enumerate(bars.items()):
        x = 30 + 27 * i
        edges = (x, bottom - unit * height, x + width, bottom)
        boxes.append(Box(paint=shade(COLOURS[colour], 14, rng), edges=edges))
        ordinary.append(_ask("plot", f"How high is the {colour} bar?", str(height)))
        if i:
            ordinary.append(_ask("relation", f"Which bar is right of the {names[i - 1]} bar?", colour))
    highest = max(bars.values())
    if list(bars.values()).count(highest) == 1:
        ordinary.append(_ask("plot", "Which bar is the highest?", max(bars, key=bars.__getitem__)))
    absent = [
        _ask("absent", f"How high is the {colours[-1]} bar?", NONE),
        _ask("absent", f"Which bar is right of the {names[-1]} bar?", NONE),
    ]
    exists = _exists("Is there a {} bar?", rng.choice(names), rng.choice(colours[len(bars) :]), rng)
    return _scene((214, 216, 220), marks, boxes, _select(ordinary, exists, absent, rng))


# -- Parts of a scene --------------------------------------------------------------------------------------------------


def _background(rng: random.Random) -> Colour:
    return shade(rng.choice(BACKGROUNDS), 8, rng)


def _scene(
    background: Colour, marks: Sequence[Mark], boxes: Sequence[Box], questions: Sequence[Question]
) -> DetailScene:
    return DetailScene(background=background, marks=marks, boxes=boxes, questions=questions)


def _characters(
    text: str, colour: str, x: float, y: float, *, size: int, advance: int, rng: random.Random
) -> Iterator[Mark]:
    """Yield the characters of a text whose first character is centred at (x, y)."""
    paint = shade(COLOURS[colour], 14, rng) if colour else INK
    for i, character in enumerate(text):
        yield Mark(name=character, colour=colour, paint=paint, x=x + advance * i, y=y, radius=size / 2)


def _change_one(text: str, alphabet: str, taken: Sequence[str], rng: random.Random) -> str:
    """Change one character of a text, so that the result is not in `taken`."""
    while text in taken:
        at = rng.randrange(len(text))
        text = text[:at] + rng.choice(alphabet) + text[at + 1 :]
    return text


# -- Questions ---------------------------------------------------------------------------------------------------------


def _ask(kind: str, question: str, answer: str) -> Question:
    return Question(kind=kind, question=question, answer=answer)


def _exists(question: str, present: str, missing: str, rng: random.Random) -> Question:
    """Ask for something that is there or for something similar that is not, with equal probability."""
    is_there = rng.random() < 0.5
    return _ask("exists", question.format(present if is_there else missing), "yes" if is_there else "no")


def _select(
    ordinary: list[Question], exists: Question, absent: list[Question], rng: random.Random
) -> tuple[Question, ...]:
    """Select random questions: ordinary ones of different kinds if possible, and one of each other kind."""
    by_kind: dict[str, list[Question]] = {}
    for question in ordinary:
        by_kind.setdefault(question.kind, []).append(question)
    kinds = rng.sample(sorted(by_kind), len(by_kind))
    picked = [rng.choice(by_kind[kinds[i % len(kinds)]]) for i in range(QUESTIONS_PER_SCENE - 2)]
    return tuple(rng.sample([*dict.fromkeys(picked), exists, rng.choice(absent)], len({*picked}) + 2))
