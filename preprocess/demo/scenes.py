"""Rendered scenes with exact answers: coloured shapes on a 3×3 grid, or a printed word.

A `Scene` is drawn at random. It determines the image, the questions about the image, and their answers.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
Cell = tuple[int, int]  # row, column

SCENE_PX = 200
CELL_PX = 56  # two patches of the tiny models, which resize the scene to half its size
MARGIN_PX = (SCENE_PX - 3 * CELL_PX) // 2
JITTER_PX = 3
RADIUS_PX = (20, 24)  # small enough that no shape leaves its cell
COLOURS: dict[str, Colour] = {
    "red": (208, 30, 38),
    "orange": (246, 136, 20),
    "yellow": (250, 226, 40),
    "green": (30, 142, 50),
    "blue": (28, 72, 204),
    "purple": (134, 44, 158),
    "white": (250, 250, 250),
    "black": (16, 16, 16),
}
BACKGROUNDS: tuple[Colour, ...] = ((168, 168, 168), (160, 178, 188), (190, 172, 156), (164, 184, 164))
SHAPES = ("circle", "square", "triangle", "cross", "ring")
COUNTS = {2: "two", 3: "three", 4: "four", 5: "five"}
POSITIONS = (
    ("top left", "top", "top right"),
    ("left", "centre", "right"),
    ("bottom left", "bottom", "bottom right"),
)
WORDS = ("STOP", "TAXI", "OPEN", "MILK", "EXIT", "CAFE")


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question with its answer. All questions of the same `kind` have the same set of possible answers."""

    kind: str
    question: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A scene with equal shapes of one colour in distinct cells of the grid, or with one word.

    Attributes:
        colour: Name of the colour.
        paint: The colour that is drawn, which is a random shade of the named colour.
        jitter: Shift of all shapes to the right and down, in pixels.
        radius: Half the size of a shape, in pixels.
        cells: Cells that hold a shape, in reading order.
        word: The printed word, or "" for a scene of shapes.
    """

    background: Colour
    colour: str
    paint: Colour
    jitter: tuple[int, int]
    shape: str = ""
    radius: int = 0
    cells: tuple[Cell, ...] = ()
    word: str = ""


def draw_scenes(series: str) -> Iterator[Scene]:
    """Return an endless iterator of random scenes. The i-th scene depends only on `series` and i."""
    return (draw_scene(random.Random(f"{series} {index}")) for index in itertools.count())


def draw_scene(rng: random.Random) -> Scene:
    colour = rng.choice(tuple(COLOURS))
    paint = shade(COLOURS[colour], 14, rng)
    background = shade(rng.choice(BACKGROUNDS), 8, rng)
    jitter = rng.randint(-JITTER_PX, JITTER_PX), rng.randint(-JITTER_PX, JITTER_PX)
    scene = Scene(background=background, colour=colour, paint=paint, jitter=jitter)
    kind = rng.choices(("single", "group", "word"), (0.45, 0.35, 0.2))[0]
    if kind == "word":
        return replace(scene, word=rng.choice(WORDS))
    count = rng.choice(tuple(COUNTS)) if kind == "group" else 1
    grid = [(row, column) for row in range(3) for column in range(3)]
    cells = tuple(sorted(rng.sample(grid, count)))
    return replace(scene, shape=rng.choice(SHAPES), radius=rng.randint(*RADIUS_PX), cells=cells)


def shade(colour: Colour, spread: int, rng: random.Random) -> Colour:
    """Return a random colour whose channels differ from those of `colour` by at most `spread`."""
    red, green, blue = (min(255, max(0, value + rng.randint(-spread, spread))) for value in colour)
    return red, green, blue


def questions(scene: Scene) -> list[Question]:
    """Return the questions about a scene. They depend on whether it has a word, a single shape or several shapes."""
    if scene.word:
        return [
            Question(kind="word", question="Which word is printed?", answer=scene.word),
            Question(kind="colour", question="What colour is the word?", answer=scene.colour),
        ]
    if len(scene.cells) == 1:
        row, column = scene.cells[0]
        return [
            Question(kind="colour", question="What colour is it?", answer=scene.colour),
            Question(kind="shape", question="Which shape is it?", answer=scene.shape),
            Question(kind="position", question="Where is it?", answer=POSITIONS[row][column]),
        ]
    return [
        Question(kind="colour", question="What colour are they?", answer=scene.colour),
        Question(kind="shape", question="Which shape are they?", answer=scene.shape),
        Question(kind="count", question="How many are there?", answer=COUNTS[len(scene.cells)]),
    ]


def render(scene: Scene) -> Image.Image:
    """Render the scene to an image of `SCENE_PX` × `SCENE_PX` pixels."""
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
        draw_shape(pen, scene.shape, cell_centre(scene, cell), scene.radius, scene.paint)
    return image


def cell_centre(scene: Scene, cell: Cell) -> tuple[float, float]:
    """Return the centre (x, y) of the shape in `cell`, in pixels of the image."""
    row, column = cell
    left, top = MARGIN_PX + scene.jitter[0], MARGIN_PX + scene.jitter[1]
    return left + (column + 0.5) * CELL_PX, top + (row + 0.5) * CELL_PX


def draw_shape(pen: ImageDraw.ImageDraw, shape: str, centre: tuple[float, float], r: float, paint: Colour) -> None:
    """Draw one of `SHAPES`, which is at most 2 · `r` pixels wide and high."""
    x, y = centre
    box = (x - r, y - r, x + r, y + r)
    match shape:
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
