"""Rendered scenes whose answers are known exactly: coloured shapes on a 3×3 grid, or a printed word.

Pure: a scene is drawn from a random generator and determines its picture and every question with its answer.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw, ImageFont

RGB = tuple[int, int, int]
Cell = tuple[int, int]  # row, column

SCENE_PX = 200
CELL_PX = 56  # two patches of the tiny models, which see the scene at half its size
MARGIN_PX = (SCENE_PX - 3 * CELL_PX) // 2
JITTER_PX = 3
RADIUS_PX = (20, 24)  # with the jitter, no shape leaves its cell
COLOURS: dict[str, RGB] = {
    "red": (208, 30, 38),
    "orange": (246, 136, 20),
    "yellow": (250, 226, 40),
    "green": (30, 142, 50),
    "blue": (28, 72, 204),
    "purple": (134, 44, 158),
    "white": (250, 250, 250),
    "black": (16, 16, 16),
}
BACKGROUNDS: tuple[RGB, ...] = ((168, 168, 168), (160, 178, 188), (190, 172, 156), (164, 184, 164))
SHAPES = ("circle", "square", "triangle", "cross", "ring")
COUNTS = {2: "two", 3: "three", 4: "four", 5: "five"}
POSITIONS = (
    ("top left", "top", "top right"),
    ("left", "centre", "right"),
    ("bottom left", "bottom", "bottom right"),
)
WORDS = ("STOP", "TAXI", "OPEN", "MILK", "EXIT", "CAFE")


@dataclass(frozen=True)
class Question:
    """`kind` groups the questions that share a set of possible answers."""

    kind: str
    question: str
    answer: str


@dataclass(frozen=True)
class Scene:
    """Equal shapes of one colour in distinct cells, or (`word`) one word across the picture; `jitter` moves the whole.

    `paint` is the exact colour drawn: a shade of the named one. Jitter and radius are pixels.
    """

    background: RGB
    colour: str
    paint: RGB
    jitter: tuple[int, int]
    shape: str = ""
    radius: int = 0
    cells: tuple[Cell, ...] = ()
    word: str = ""


def draw_scenes(series: str) -> Iterator[Scene]:
    """A never-ending series of scenes, each from its own generator: the i-th is the same however many are taken."""
    return (draw_scene(random.Random(f"{series} {index}")) for index in itertools.count())


def draw_scene(rng: random.Random) -> Scene:
    colour = rng.choice(tuple(COLOURS))
    paint = _shade(COLOURS[colour], 14, rng)
    background = _shade(rng.choice(BACKGROUNDS), 8, rng)
    jitter = rng.randint(-JITTER_PX, JITTER_PX), rng.randint(-JITTER_PX, JITTER_PX)
    look = Scene(background, colour, paint, jitter)
    kind = rng.choices(("single", "group", "word"), (0.45, 0.35, 0.2))[0]
    if kind == "word":
        return replace(look, word=rng.choice(WORDS))
    count = rng.choice(tuple(COUNTS)) if kind == "group" else 1
    grid = [(row, column) for row in range(3) for column in range(3)]
    cells = tuple(sorted(rng.sample(grid, count)))
    return replace(look, shape=rng.choice(SHAPES), radius=rng.randint(*RADIUS_PX), cells=cells)


def _shade(colour: RGB, spread: int, rng: random.Random) -> RGB:
    red, green, blue = (min(255, max(0, value + rng.randint(-spread, spread))) for value in colour)
    return red, green, blue


def questions(scene: Scene) -> list[Question]:
    """What the scene answers without doubt: a single shape has a place, several have a number."""
    if scene.word:
        return [
            Question("word", "Which word is printed?", scene.word),
            Question("colour", "What colour is the word?", scene.colour),
        ]
    alone = len(scene.cells) == 1
    asked = [
        Question("colour", "What colour is it?" if alone else "What colour are they?", scene.colour),
        Question("shape", "Which shape is it?" if alone else "Which shape are they?", scene.shape),
    ]
    if alone:
        row, column = scene.cells[0]
        return [*asked, Question("position", "Where is it?", POSITIONS[row][column])]
    return [*asked, Question("count", "How many are there?", COUNTS[len(scene.cells)])]


def render(scene: Scene) -> Image.Image:
    """The scene's picture, `SCENE_PX` square."""
    image = Image.new("RGB", (SCENE_PX, SCENE_PX), scene.background)
    pen = ImageDraw.Draw(image)
    if scene.word:
        middle = SCENE_PX / 2
        font = ImageFont.load_default(64)
        pen.text(
            (middle + scene.jitter[0], middle + scene.jitter[1]),
            scene.word,
            scene.paint,
            font,
            anchor="mm",
            stroke_width=2,
        )
    for cell in scene.cells:
        _draw_shape(pen, scene, centre_of(scene, cell))
    return image


def centre_of(scene: Scene, cell: Cell) -> tuple[float, float]:
    """Where the shape in `cell` stands: x, y in pixels of the picture."""
    row, column = cell
    left, top = MARGIN_PX + scene.jitter[0], MARGIN_PX + scene.jitter[1]
    return left + (column + 0.5) * CELL_PX, top + (row + 0.5) * CELL_PX


def _draw_shape(pen: ImageDraw.ImageDraw, scene: Scene, centre: tuple[float, float]) -> None:
    (x, y), r, paint = centre, scene.radius, scene.paint
    box = (x - r, y - r, x + r, y + r)
    match scene.shape:
        case "circle":
            pen.ellipse(box, fill=paint)
        case "square":
            pen.rectangle(box, fill=paint)
        case "triangle":
            pen.regular_polygon((x, y + r / 4, r * math.sqrt(1.4)), 3, fill=paint)
        case "cross":
            pen.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill=paint)
            pen.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill=paint)
        case "ring":
            pen.ellipse(box, outline=paint, width=max(1, round(r / 2.5)))
