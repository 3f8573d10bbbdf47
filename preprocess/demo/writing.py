"""Hand-written dialogues of the demo: dialogues about scikit-image's photographs, and text-only dialogues.

The dialogues about photographs are in photographs.json.
"""

from __future__ import annotations

import importlib.resources
import json
import random

Turns = tuple[tuple[str, str], ...]  # (question, answer), in the order of the dialogue


def photograph_dialogues() -> dict[str, Turns]:
    """Load the dialogues about photographs. The keys are the photographs' file names in `skimage.data`."""
    text = (importlib.resources.files("preprocess.demo") / "photographs.json").read_text(encoding="utf-8")
    return {
        name: tuple((turn["question"], turn["answer"]) for turn in turns) for name, turns in json.loads(text).items()
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
    """Return a random dialogue of two to four questions about facts and sums."""
    return tuple(rng.choice(FACTS) if rng.random() < 0.5 else _sum(rng) for _ in range(rng.randint(2, 4)))


def _sum(rng: random.Random) -> tuple[str, str]:
    total = rng.randrange(len(NUMBERS))
    part = rng.randint(0, total)
    return f"What is {NUMBERS[part]} plus {NUMBERS[total - part]}?", NUMBERS[total]
