"""The chat page in a real browser that can reach this machine only, and the command's errors."""

import asyncio
import itertools
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from model.errors import UserError
from pipeline.chat import __main__ as command
from pipeline.inference.engine import InferenceEngine, load
from preprocess.images.codec import read_image_file
from tests.support.browser import Tab, find_chromium, open_tab
from tests.support.fork_server import ForkedProgram
from tests.support.launch import REPOSITORY, fork_python

MAX_NEW_TOKENS, START_S = 24, 90
ANSWERS = "[...document.querySelectorAll('.message.bot')].map(each => each.textContent)"
IMAGES = "[...document.querySelectorAll('.grid-wrap img')].filter(each => each.naturalWidth).length"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def accepts(host: str, port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex((host, port)) == 0


@pytest.fixture(scope="module")
def port(tiny_model: Path) -> Iterator[int]:
    """Serve the page in another process, where variables ask for a proxy, a share link and all network interfaces."""
    find_chromium()
    port = free_port()
    words = ["-m", "pipeline.chat", str(tiny_model), "--port", str(port), "--max-new-tokens", str(MAX_NEW_TOKENS)]
    variables = {"http_proxy": "http://127.0.0.1:9", "GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_SHARE": "True"}
    program = ForkedProgram(words, variables, cwd=REPOSITORY, ranks=0, merge_errors=True)
    deadline = time.monotonic() + START_S
    while not accepts("127.0.0.1", port):
        assert program.poll() is None, program.communicate()[0]
        assert time.monotonic() < deadline, "the page does not start"
        time.sleep(0.1)
    yield port
    program.kill()
    program.communicate()


def visible(text: str) -> str:
    """Drop white space, which a browser may show in another way."""
    return "".join(text.split())


def test_an_image_is_dropped_and_asked_about_in_a_browser_without_internet(
    port: int, tiny_model: Path, noise_images: Path, tmp_path: Path
) -> None:
    questions = ["Which colour?", "Sure?"]
    engine = InferenceEngine(*load(tiny_model, "cpu"), max_batch=1)
    dialogue = engine.dialogue(read_image_file(noise_images / "a.png", engine.model.config.vision.image_px))
    expected = [visible("".join(dialogue.ask(each, max_new_tokens=MAX_NEW_TOKENS))) for each in questions]

    async def use(tab: Tab) -> None:
        await tab.wait_for("document.querySelector('input[type=file]') !== null")
        await tab.choose_file("input[type=file]", noise_images / "a.png")
        assert await tab.wait_for(f"{IMAGES} >= 8 && {IMAGES}") == 8  # the redrawn image, six layers, the final state
        assert "redrawn, error" in await tab.evaluate("document.body.innerText")
        for number, question in enumerate(questions, 1):
            await tab.evaluate("document.querySelector('textarea').focus()")
            await tab.type_and_enter(question)
            await tab.wait_for(f"{ANSWERS}.length == {number}")
            last = f"{ANSWERS}.at(-1).split(/\\s+/).join('')"
            await tab.wait_for(f"{last} == {json.dumps(expected[number - 1])}")
        assert [
            url for url in tab.requested if not url.startswith((f"http://127.0.0.1:{port}/", "data:", "blob:"))
        ] == []

    async def run() -> None:
        async with open_tab(f"http://127.0.0.1:{port}", tmp_path / "profile") as tab:
            await use(tab)

    asyncio.run(run())


def test_other_machines_cannot_open_the_page(port: int) -> None:
    assert accepts("127.0.0.1", port)
    assert not accepts("127.0.0.2", port)  # an address of this machine at which a server for all interfaces answers


STREAM = """
import copy, json, sys
from pipeline.chat.page import build_page
from pipeline.inference.engine import InferenceEngine, load
page = build_page(InferenceEngine(*load(sys.argv[1], "cpu"), max_batch=1), title="m", max_new_tokens=24)
answer = next(each.fn for each in page.fns.values() if each.name == "answer")
print(json.dumps([copy.deepcopy(turns) for _, _, turns in answer("Which\\0?", None, [])]))
print(json.dumps(list(answer("\\0 ", None, []))))
"""


def test_an_answer_is_streamed_and_a_question_without_text_is_not_asked(tiny_model: Path) -> None:
    done = fork_python("-c", STREAM, tiny_model)
    assert done.returncode == 0, done.stderr
    streamed, not_asked = map(json.loads, done.stdout.splitlines())
    assert all(turns[0]["content"] == "Which?" for turns in streamed)
    texts = [turns[1]["content"] for turns in streamed]
    assert len(set(texts)) > 2
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert not_asked == [["", None, []]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--port", "0"], "--port: found 0, expected 1 to 65535"),
        (["--max-new-tokens", "0"], "--max-new-tokens: found 0"),
        (["--temperature", "-1"], "--temperature: found -1.0"),
    ],
)
def test_wrong_arguments_are_user_errors(words: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["chat", "no_model", *words])
    with pytest.raises(UserError, match=message):
        command.main()


def test_a_missing_extra_is_a_user_error_that_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["chat", "no_model"])
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"gradio, which is not installed. Install it: pip install -e '\.\[web\]'"):
        command.main()


def test_a_port_that_is_in_use_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr("sys.argv", ["chat", "no_model", "--port", str(port)])
        with pytest.raises(UserError, match=rf"--port: {port} cannot be opened \(Address already in use\)"):
            command.main()
