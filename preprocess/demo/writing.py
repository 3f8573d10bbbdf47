"""Written by hand for the demo: dialogues about scikit-image's photographs, and small talk without pictures."""

from __future__ import annotations

import random

Turns = tuple[tuple[str, str], ...]  # question, answer, in the order asked

PHOTOGRAPHS: dict[str, Turns] = {
    "astronaut.png": (
        ("Who is in this photograph?", "A smiling astronaut in an orange space suit."),
        ("What stands behind her?", "A flag on the left and a model of a space shuttle on the right."),
        ("Where is her helmet?", "In front of her, at the bottom right of the picture."),
    ),
    "brick.png": (
        ("What is this surface?", "A wall of bricks, seen in grey."),
        ("How are the bricks laid?", "In rows that are shifted by half a brick, with light mortar between them."),
    ),
    "camera.png": (
        ("What is the man doing?", "He looks through a camera on a tripod."),
        ("What does he wear?", "A dark coat and gloves."),
        ("Is this a colour photograph?", "No, it is black and white."),
        ("What is behind him?", "A wide lawn, and tall buildings far away."),
    ),
    "cell.png": (
        ("What does this image show?", "A single bright cell on a grey background, as a microscope sees it."),
        ("Where is the bright spot?", "To the right of the middle, a little below it."),
    ),
    "chelsea.png": (
        ("Which animal is this?", "A cat."),
        ("What colour is its fur?", "Ginger, with darker stripes."),
        ("Is it awake?", "Yes, its eyes are open and look past the camera."),
    ),
    "chessboard_RGB.png": (
        ("What pattern is this?", "A chessboard."),
        ("Which colours does it have?", "Black and white, in turn."),
        ("How many squares are on each side?", "Eight."),
    ),
    "clock_motion.png": (
        ("Can you read the time on this clock?", "No, the picture is blurred by motion."),
        ("Which way did it move?", "From side to side: the blur is horizontal."),
    ),
    "coffee.png": (
        ("What is in the cup?", "Coffee, an espresso with a light brown foam."),
        ("What colour is the saucer?", "Red, like the cup on its outside."),
        ("What lies beside the cup?", "A small spoon of metal."),
        ("What is it standing on?", "A table of wood."),
    ),
    "coins.png": (
        ("What is shown here?", "Old coins on a dark background."),
        ("How are they arranged?", "In four rows of six."),
        ("Are they all of one size?", "No, a few are larger than the rest."),
    ),
    "color.png": (
        ("What is this?", "A colour wheel on black."),
        ("What is in its centre?", "White, which fades into every colour around it."),
    ),
    "grass.png": (
        ("What covers the ground?", "Short, dry grass."),
        ("Is anything else to be seen?", "No, it fills the whole picture."),
    ),
    "gravel.png": (
        ("What is this a picture of?", "Gravel: many small stones, close together."),
        ("Is it a colour picture?", "No, it is grey."),
    ),
    "horse.png": (
        ("Which animal is this?", "A horse."),
        ("Is it a photograph?", "No, it is a black silhouette."),
        ("Which way does it face?", "To the right."),
    ),
    "hubble_deep_field.jpg": (
        ("What are the bright spots?", "Galaxies, thousands of them, and a few stars."),
        ("Who took this picture?", "The Hubble Space Telescope."),
    ),
    "ihc.png": (
        ("What kind of image is this?", "Tissue under a microscope, stained brown and blue."),
        ("What are the blue dots?", "The nuclei of cells."),
    ),
    "moon.png": (
        ("What surface is this?", "The surface of the Moon."),
        ("What are the round marks?", "Craters."),
    ),
    "motorcycle_left.png": (
        ("Which vehicle is this?", "A motorcycle."),
        ("What colour is its tank?", "Red."),
        ("Where is it parked?", "In a garage, in front of shelves with boxes."),
    ),
    "page.png": (
        ("What is the heading on this page?", "Region-based segmentation."),
        ("What does the text speak of?", "How to find markers of the coins and the background."),
        ("Is the page evenly lit?", "No, it is darker towards the lower left."),
    ),
    "retina.jpg": (
        ("What part of the body is this?", "The retina, at the back of an eye."),
        ("What are the dark red lines?", "Blood vessels."),
        ("Where is the bright spot?", "On the left: it is where the nerve leaves the eye."),
    ),
    "rocket.jpg": (
        ("What stands in the middle?", "A white rocket on its launch pad."),
        ("What time of day is it?", "Dusk: the sky is dark blue and the lamps are on."),
        ("How many towers stand around it?", "Four towers of steel."),
    ),
    "text.png": (
        ("What is on this paper?", "Handwritten formulas."),
        ("Is the paper blank or ruled?", "Ruled, with thin lines."),
    ),
}

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
FACTS: Turns = (
    ("What day comes after Monday?", "Tuesday"),
    ("What day comes after Friday?", "Saturday"),
    ("What month comes after May?", "June"),
    ("What is the opposite of hot?", "cold"),
    ("What is the opposite of up?", "down"),
    ("What is the opposite of large?", "small"),
    ("What is the opposite of open?", "closed"),
    ("How many legs has a cat?", "four"),
    ("How many legs has a spider?", "eight"),
    ("How many sides has a triangle?", "three"),
    ("How many sides has a square?", "four"),
    ("What colour is grass?", "green"),
    ("What colour is snow?", "white"),
    ("What colour is a ripe lemon?", "yellow"),
    ("What colour is coal?", "black"),
    ("Which planet do we live on?", "Earth"),
    ("What is ice made of?", "water"),
    ("Can fish breathe in water?", "Yes, with their gills."),
    ("Why is the sky dark at night?", "Because the Sun is on the other side of the Earth."),
    ("Please say hello.", "Hello! How can I help you?"),
    ("Thank you.", "You are welcome."),
)


def text_dialogue(rng: random.Random) -> Turns:
    """Two to four turns: some facts, some sums."""
    turns = [rng.choice(FACTS) if rng.random() < 0.5 else _sum(rng) for _ in range(rng.randint(2, 4))]
    return tuple(turns)


def _sum(rng: random.Random) -> tuple[str, str]:
    total = rng.randrange(len(NUMBERS))
    part = rng.randint(0, total)
    return f"What is {NUMBERS[part]} plus {NUMBERS[total - part]}?", NUMBERS[total]
