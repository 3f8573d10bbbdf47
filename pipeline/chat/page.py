"""The local page: a dialogue about an image, the model's visual states, and the redrawn image."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from model.errors import UserError
from pipeline.figures.maps import Pixels, highlight
from pipeline.inference.dialogue import Dialogue
from pipeline.inference.engine import InferenceEngine
from pipeline.visualization.states import default_layers, look_inside
from preprocess.images.codec import read_image_file
from preprocess.prompts import clean_text

FONTS = ["system-ui", "sans-serif"]  # gradio's default fonts are downloaded
Turn = dict[str, Any]


def serve(page: gr.Blocks, address: str, port: int) -> None:
    """Serve the page until Ctrl-C, and print its address."""
    page.launch(
        server_name=address,
        server_port=port,
        share=False,
        ssr_mode=False,
        prevent_thread_lock=True,
        quiet=True,
        footer_links=[],
        theme=gr.themes.Base(font=FONTS, font_mono=["monospace"]),
    )
    print(f"http://{address}:{port} shows the page; Ctrl-C ends it", flush=True)
    page.block_thread()


def build_page(engine: InferenceEngine, *, title: str, max_new_tokens: int) -> gr.Blocks:
    """Build the page. One request at a time uses the engine; every browser tab has its own dialogue."""

    def open_image(path: str | None) -> tuple[Dialogue | None, list[Turn], list[tuple[Pixels, str]]]:
        if path is None:
            return None, [], []
        try:
            pixels = read_image_file(Path(path), engine.model.config.vision.image_px)
        except UserError as error:
            raise gr.Error(str(error)) from None
        return engine.dialogue(pixels), [], look(engine, pixels)

    def answer(
        question: str, dialogue: Dialogue | None, turns: list[Turn]
    ) -> Iterator[tuple[str, Dialogue | None, list[Turn]]]:
        question = clean_text(question).strip()
        if not question:
            yield "", dialogue, turns
            return
        dialogue = dialogue or engine.dialogue()
        turns = [*turns, {"role": "user", "content": question}, {"role": "assistant", "content": ""}]
        with contextlib.closing(dialogue.ask(question, max_new_tokens=max_new_tokens)) as pieces:
            for piece in pieces:
                turns[-1]["content"] += piece
                yield "", dialogue, turns
        yield "", dialogue, turns

    with gr.Blocks(title=title, analytics_enabled=False) as page:
        gr.Markdown(f"# {title}")
        dialogue = gr.State()
        with gr.Row():
            with gr.Column():
                image = gr.Image(type="filepath", image_mode=None, sources=["upload", "clipboard"], label="Image")
                states = gr.Gallery(label="Visual states by depth", columns=3, object_fit="contain")
            with gr.Column():
                turns = gr.Chatbot(render_markdown=False, label="Dialogue", height=480)
                question = gr.Textbox(label="Question", placeholder="What is in the image?", submit_btn=True)
        # The same id keeps both events from using the engine at the same time.
        image.change(open_image, image, [dialogue, turns, states], concurrency_id="engine", concurrency_limit=1)
        question.submit(answer, [question, dialogue, turns], [question, dialogue, turns], concurrency_id="engine")
    return page


def look(engine: InferenceEngine, pixels: Pixels) -> list[tuple[Pixels, str]]:
    """Return the redrawn image, if the model has the decoder, and the image with bright patches at large states."""
    maps = look_inside(engine.model, pixels, default_layers(engine.model.config), tap="mixer", title="")
    redrawn = [(each.pixels, f"redrawn, error {each.error:.3f}") for each in maps.redrawn[-1:]]
    return redrawn + [(highlight(maps.image, values), depth) for depth, values in maps.depths.items()]
