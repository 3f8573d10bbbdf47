"""The image codec: decoding and resizing compared with Pillow, stored encodings, and memory use."""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from PIL import Image
from skimage import data as photographs

from preprocess.images import codec
from preprocess.images.codec import decode_rgb, detect_format, encode_stored_image, resize_to_square
from preprocess.rejects import Rejected
from tests.support.dirty_rows import IMAGES, sampled_441
from tests.support.launch import run_python

PX = 384
BICUBIC = Image.Resampling.BICUBIC


def photograph(width: int, height: int) -> np.ndarray:
    return np.array(Image.fromarray(photographs.astronaut()).resize((width, height)))


def jpeg(pixels: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def as_pillow_decodes(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


JPEGS: dict[str, dict[str, Any]] = {
    "as cameras write it": {"quality": 90},
    "without subsampling": {"quality": 95, "subsampling": 0},
    "subsampled in one direction": {"quality": 75, "subsampling": 1},
    "progressive": {"quality": 85, "progressive": True},
    "with a profile and a comment": {"icc_profile": b"profile", "comment": b"text"},
    "with restart markers": {"quality": 80, "restart_marker_rows": 1},
    "kept as RGB": {"quality": 90, "keep_rgb": True},
}


@pytest.mark.parametrize("kind", JPEGS)
def test_simplejpeg_decodes_plain_jpegs_to_the_same_pixels_as_pillow(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = jpeg(photograph(203, 155), **JPEGS[kind])
    monkeypatch.setattr(codec, "_decode_with_pillow", None)
    assert np.array_equal(decode_rgb(data), as_pillow_decodes(data))


def test_decoding_without_simplejpeg_gives_the_same_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    data = jpeg(photograph(203, 155))
    fast = decode_rgb(data)
    monkeypatch.setattr(codec, "simplejpeg", None)
    assert np.array_equal(decode_rgb(data), fast)


def test_a_jpeg_that_makes_simplejpeg_warn_is_decoded_by_pillow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Decoders return different pixels for damaged data, so Pillow must always decode such images."""
    data = jpeg(photograph(203, 155))
    data = data[:-2] + b"extraneous" + data[-2:]  # libjpeg only warns about these bytes
    assert np.array_equal(decode_rgb(data), as_pillow_decodes(data))
    monkeypatch.setattr(codec, "_decode_unusual_jpeg", lambda *_: np.zeros((1, 1, 3), np.uint8))
    assert decode_rgb(data).shape == (1, 1, 3)


def test_a_jpeg_that_makes_simplejpeg_fail_is_decoded_by_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyError):
        codec.simplejpeg.decode_jpeg_header(sampled_441())
    assert np.array_equal(decode_rgb(sampled_441()), as_pillow_decodes(sampled_441()))
    data = jpeg(photograph(203, 155))
    for error in (RuntimeError(), SystemError(), OverflowError()):
        monkeypatch.setattr(codec.simplejpeg, "decode_jpeg", _raiser(error))
        assert np.array_equal(decode_rgb(data), as_pillow_decodes(data))
    monkeypatch.setattr(codec.simplejpeg, "decode_jpeg", _raiser(MemoryError()))
    with pytest.raises(MemoryError):
        decode_rgb(data)


def _raiser(error: Exception) -> Callable[..., Any]:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize("name", IMAGES)
def test_decoding_in_strips_gives_the_same_pixels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of 64×48 pixels are decoded in strips of seven rows, and the last strip has six rows."""
    monkeypatch.setattr(codec, "simplejpeg", None)
    try:
        whole = decode_rgb(IMAGES[name]())
    except Rejected:
        return
    monkeypatch.setattr(codec, "STRIP_PIXELS", 450)
    assert np.array_equal(decode_rgb(IMAGES[name]()), whole)


def _largest(name: str, folder: Path) -> Path:
    """Write a single-coloured image with the largest number of pixels that is decoded, and with an EXIF rotation."""
    exif = Image.Exif()
    exif[0x0112] = 6
    modes: dict[str, tuple[str, dict[str, Any]]] = {
        "largest.png": ("RGBA", {"compress_level": 1}),
        "progressive.jpg": ("CMYK", {"progressive": True, "subsampling": 0}),
        "largest.webp": ("RGBA", {"quality": 1, "method": 0}),
    }
    mode, options = modes[name]
    most = int(codec.MAX_WORKER_PIXELS / (codec.FORMATS["webp"].memory_per_pixel if name.endswith("webp") else 1))
    Image.new(mode, (8000, most // 8000), (9, 9, 9, 9)).save(folder / name, exif=exif, **options)
    return folder / name


@pytest.mark.parametrize("name", ["largest.png", "progressive.jpg", "largest.webp"])
def test_decoding_the_largest_allowed_images_needs_less_than_1_gib_of_memory(tmp_path: Path, name: str) -> None:
    """The test allows only 860 MiB, because Ray, the tokenizer and cached images need memory as well."""
    program = (
        "import sys, pathlib, torch, preprocess.builder.task; from preprocess.images.codec import encode_stored_image; "
        "encode_stored_image(pathlib.Path(sys.argv[1]).read_bytes(), 384, 'jpeg'); "
        "print(pathlib.Path('/proc/self/status').read_text())"
    )
    done = run_python("-c", program, _largest(name, tmp_path), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    peak = next(line for line in done.stdout.splitlines() if line.startswith("VmHWM"))
    assert int(peak.split()[1]) < 860 << 10


SHAPES = [
    (640, 480),
    (480, 640),
    (500, 375),
    (375, 500),
    (427, 640),
    (200, 150),
    (150, 200),
    (400, 2000),
    (900, 30),
    (1, 1),
]


def resized_as_by_pillow_13(pixels: np.ndarray) -> np.ndarray:
    """Resize with the installed Pillow. Pillow 12 always filters rows first, so columns are resized by a first call."""
    image, (height, width, _) = Image.fromarray(pixels), pixels.shape
    if int(PIL.__version__.split(".")[0]) < 13 and height > PX and height - PX > 2 * (width - PX):
        image = image.resize((width, PX), BICUBIC)
    return np.asarray(image.resize((PX, PX), BICUBIC))


@pytest.mark.parametrize(("width", "height"), SHAPES)
def test_resized_images_differ_from_pillows_only_by_rounding(width: int, height: int) -> None:
    """Noise reveals any difference in the filter or in the order of the two resizing passes."""
    noise = np.random.Generator(np.random.Philox(key=1)).integers(0, 2, (height, width, 3)).astype(np.uint8) * 255
    for pixels in (photograph(width, height), noise):
        off = np.abs(resize_to_square(pixels, PX) - resized_as_by_pillow_13(pixels).astype(int))
        assert off.max() <= 2
        assert (off > 1).mean() < 2e-5
        assert (off > 0).mean() < 0.02


def test_an_image_of_the_right_size_is_not_resized() -> None:
    pixels = photograph(PX, PX)
    assert np.array_equal(resize_to_square(pixels, PX), pixels)


def test_raw_encoding_stores_the_exact_resized_pixels() -> None:
    data = jpeg(photograph(640, 480))
    raw, form = encode_stored_image(data, PX, "raw")
    assert (form, detect_format(encode_stored_image(data, PX, "jpeg")[0])) == ("pixels.npy", "jpg")
    assert np.array_equal(np.load(io.BytesIO(raw)), resize_to_square(as_pillow_decodes(data), PX))


def test_resizing_gives_the_same_bytes_with_every_instruction_set() -> None:
    program = (
        "import hashlib, numpy; from preprocess.images.codec import resize_to_square; "
        "noise = numpy.random.Generator(numpy.random.Philox(key=1)).integers(0, 256, (479, 641, 3), numpy.uint8); "
        "print(hashlib.sha256(resize_to_square(noise, 384)).hexdigest())"
    )
    capabilities = [{"ATEN_CPU_CAPABILITY": "default"}, {}]
    started = [
        subprocess.Popen([sys.executable, "-c", program], env=os.environ | one, stdout=subprocess.PIPE, text=True)
        for one in capabilities
    ]
    digests = [process.communicate(timeout=60)[0] for process in started]
    assert len(digests[0]) == 65
    assert digests[0] == digests[1]


def test_importing_build_shards_does_not_import_torch_or_ray() -> None:
    program = "import sys, preprocess.build_shards; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
