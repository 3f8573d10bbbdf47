"""Shard builds: identical bytes for any number of workers, reruns after changes, and checks without a build."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from skimage import data as photographs

from model.errors import ExitCode
from preprocess import build_shards
from preprocess.builder import task
from preprocess.images.codec import codec_versions
from preprocess.shards.manifest import Manifest, load_index
from preprocess.shards.verify import verify
from tests.support.golden_tokenizer import gpt_neox
from tests.support.launch import REPOSITORY, run_python
from tests.support.ray_cluster import RayCluster, ray_cluster
from tests.support.shard_builds import (
    PHOTOGRAPHS,
    arguments,
    build_in_process,
    contents,
    dialogue_row,
    exit_code_of,
    write_mix,
)

SCRIPT = "preprocess/build_shards.py"
NUM_ROWS, SAMPLES_PER_SHARD = 240, 20
PROXY = dict.fromkeys(("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")
PROXY["NO_PROXY"] = "example.org"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a root of LLaVA rows about six photographs. One row in ten is text-only; the image of row 7 is missing."""
    root = tmp_path_factory.mktemp("root")
    (root / "photographs").mkdir()
    for name in PHOTOGRAPHS:
        Image.fromarray(getattr(photographs, name)()).convert("RGB").save(root / "photographs" / f"{name}.jpg")
    rows = [dialogue_row(i) for i in range(NUM_ROWS)]
    rows[7]["image"] = "lost.jpg"
    (root / "rows.json").write_text(json.dumps(rows))
    write_mix(root, [{"name": "photographs", "format": "llava", "annotations": "rows.json", "images": "photographs"}])
    return root


@pytest.fixture(scope="module")
def expected(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the shard set that an uninterrupted build without Ray writes."""
    return build_in_process(
        root, tmp_path_factory.mktemp("expected") / "set", gpt_neox(), samples_per_shard=SAMPLES_PER_SHARD
    )


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """Run a Ray cluster in an environment with a proxy that does not exist."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in PROXY.items():
            patch.setenv(name, value)
        with ray_cluster(tmp_path_factory.mktemp("ray")) as cluster:
            yield cluster


def command(root: Path, out: Path, **options: Any) -> list[str]:
    return arguments(root, out, gpt_neox(), samples_per_shard=SAMPLES_PER_SHARD, **options)


# -- The same bytes --------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a copy of the checkout in which a model lies that is larger than the largest upload of Ray."""
    for name in ("model", "preprocess"):
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".gitignore", ".rayignore"):
        shutil.copy(REPOSITORY / name, tmp_path)
    for folder in ("models/v2", "anything"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "model.safetensors").touch()
        os.truncate(tmp_path / folder / "model.safetensors", 600 << 20)
    return tmp_path


def test_ray_jobs_with_and_without_an_uploaded_checkout_build_the_same_set(
    cluster: RayCluster, root: Path, checkout: Path, expected: Path, tmp_path: Path
) -> None:
    words = ("--", "python", SCRIPT, *command(root, tmp_path / "a"))
    uploaded = cluster.submit("submit", "--working-dir", checkout, *words)
    assert uploaded.returncode == 0, uploaded.stdout + uploaded.stderr
    bare = cluster.submit("submit", "--", SCRIPT, *command(root, tmp_path / "b", workers=1))
    assert bare.returncode == 0, bare.stdout + bare.stderr
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(expected)
    assert "rejected       1  photographs: picture_missing" in uploaded.stdout
    assert cluster.statuses() == ["SUCCEEDED", "SUCCEEDED"]


def test_eight_ray_workers_build_the_same_set_as_one_process(root: Path, expected: Path, tmp_path: Path) -> None:
    """No file can be written into HOME, and sockets in TMPDIR would have too long a path."""
    long = tmp_path / ("long" * 20)
    long.mkdir()
    hostile = {"RAY_ADDRESS": "", "HOME": "/dev/null", "TMPDIR": str(long), **PROXY}
    done = run_python(SCRIPT, *command(root, tmp_path / "out", workers=8), timeout=120, **hostile)
    assert done.returncode == 0, done.stdout + done.stderr
    assert contents(tmp_path / "out") == contents(expected)


def test_a_build_with_too_many_rejects_fails_its_ray_job(cluster: RayCluster, root: Path, tmp_path: Path) -> None:
    done = cluster.submit("submit", "--", SCRIPT, *command(root, tmp_path / "out", max_reject_ratio=0.001))
    assert done.returncode == 1
    assert "more rows were rejected than --max-reject-ratio 0.001 allows: photographs 0.42% (1 of 240" in done.stdout
    assert "exit code 3" in done.stdout + done.stderr
    assert not (tmp_path / "out/manifest.json").exists()
    assert cluster.statuses().count("FAILED") == 1


# -- Accidents -------------------------------------------------------------------------------------------------------


def test_a_rerun_builds_only_missing_and_damaged_shards(root: Path, expected: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(expected, out)
    (out / "shard-00003.tar").unlink()
    (out / "shard-00005.json").write_text("{}")
    (out / "shard-00007.tar").write_bytes((out / "shard-00007.tar").read_bytes()[:-512])
    (out / "shard-00099.tar").write_text("of an earlier, larger mix")
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*")}
    assert build_shards.main(command(root, out, workers=0)) == 0
    assert contents(out) == contents(expected)
    changed = {path.name for path in out.glob("shard-*") if path.stat().st_mtime_ns != before.get(path.name)}
    assert changed == {f"shard-{number:05d}.{kind}" for number in (3, 5, 7) for kind in ("tar", "json")}


@pytest.mark.parametrize("name", ["index.parquet", "rejects.jsonl", "tokenizer.json", "manifest.json"])
def test_a_rerun_restores_a_deleted_index_reject_list_tokenizer_or_manifest(
    root: Path, expected: Path, tmp_path: Path, name: str
) -> None:
    shutil.copytree(expected, tmp_path / "out")
    (tmp_path / "out" / name).unlink()
    assert build_shards.main(command(root, tmp_path / "out", workers=0)) == 0
    assert contents(tmp_path / "out") == contents(expected)


def test_a_full_disk_is_reported_in_one_line_and_finished_shards_are_kept(
    root: Path, expected: Path, tmp_path: Path
) -> None:
    """Simulate the full disk with a limit on file sizes."""
    largest = max(path.stat().st_size for path in expected.glob("*.tar"))
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2); "
    program = limited + "from model.errors import run_cli; from preprocess.build_shards import main; run_cli(main)"
    words = [str(word) for word in command(root, tmp_path / "out", workers=0)]
    done = run_python("-c", program, str(largest - 1), *words)
    assert done.returncode == ExitCode.USER_ERROR, done.stderr
    assert done.stderr == (
        f"error: {tmp_path / 'out'}: File too large; raise the limit on file sizes, "
        "then run the same command again: finished shards are kept\n"
    )
    assert build_shards.main(command(root, tmp_path / "out", workers=0)) == 0
    assert contents(tmp_path / "out") == contents(expected)


def test_an_http_address_in_ray_address_is_a_user_error(root: Path, tmp_path: Path) -> None:
    done = run_python(SCRIPT, *command(root, tmp_path / "out"), RAY_ADDRESS="http://127.0.0.1:1")
    assert done.returncode == ExitCode.USER_ERROR
    assert "RAY_ADDRESS http://127.0.0.1:1 is a job server: use `ray job submit`" in done.stderr.splitlines()[-1]


def test_a_rerun_on_a_finished_set_writes_no_file(
    root: Path, expected: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in expected.iterdir() if path.is_file()}
    assert build_shards.main(command(root, expected, workers=0)) == 0
    assert "is up to date" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in expected.iterdir() if path.is_file()} == before


def test_a_rerun_includes_an_image_that_was_missing_before(root: Path, expected: Path, tmp_path: Path) -> None:
    lost = root / "photographs" / "lost.jpg"
    shutil.copytree(expected, tmp_path / "out")
    shutil.copy(root / "photographs" / "coffee.jpg", lost)
    try:
        assert build_shards.main(command(root, tmp_path / "out", workers=0)) == 0
    finally:
        lost.unlink()
    before, after = contents(expected), contents(tmp_path / "out")
    assert {name for name in before if name.startswith("shard") and before[name] != after[name]} == {
        "shard-00000.tar",
        "shard-00000.json",
    }
    assert Manifest.load(tmp_path / "out").counts["rejects"] == 0


def test_a_rerun_includes_a_repaired_image_of_the_same_file_size(root: Path, tmp_path: Path) -> None:
    other, out = tmp_path / "root", tmp_path / "out"
    shutil.copytree(root, other)
    image = other / "photographs/text.jpg"
    image.write_bytes(bytes(image.stat().st_size))  # on many file systems, an interrupted copy leaves a file of zeros
    build_in_process(other, out, gpt_neox(), samples_per_shard=SAMPLES_PER_SHARD, max_reject_ratio=1)
    assert Manifest.load(out).rejects_by_reason["picture_unknown_format"] > 1
    shutil.copy2(root / "photographs/text.jpg", image)
    assert build_shards.main(command(other, out, workers=0)) == 0
    assert Manifest.load(out).rejects_by_reason == {"picture_missing": 1}


def test_compare_images_rebuilds_shards_with_a_replaced_image(root: Path, expected: Path, tmp_path: Path) -> None:
    other = tmp_path / "root"
    shutil.copytree(root, other)
    shutil.copytree(expected, tmp_path / "out")
    assert build_shards.main([*command(other, tmp_path / "out", workers=0), "--compare-images"]) == 0
    assert contents(tmp_path / "out") == contents(expected), "the same images in another folder must not change the set"
    shutil.copy(root / "photographs/camera.jpg", other / "photographs/text.jpg")
    assert build_shards.main(command(other, tmp_path / "out", workers=0)) == 0
    assert contents(tmp_path / "out") == contents(expected)
    assert build_shards.main([*command(other, tmp_path / "out", workers=0), "--compare-images"]) == 0
    assert Manifest.load(tmp_path / "out").counts["pictures"] == len(PHOTOGRAPHS) - 1


def test_a_rerun_rebuilds_a_shard_whose_tar_is_newer_than_its_sidecar(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tars of raw images all have the same size, so the size cannot reveal that the tar and the sidecar disagree."""

    def interrupt(path: Path, data: bytes) -> None:
        raise KeyboardInterrupt

    other, out = tmp_path / "root", tmp_path / "out"
    shutil.copytree(root, other)
    source = {"name": "p", "format": "llava", "annotations": "rows.json", "images": "photographs", "limit": 6}
    write_mix(other, [source], '[images]\nencoding = "raw"')
    words = [*command(other, out, workers=0), "--compare-images"]
    assert build_shards.main(words) == 0
    shutil.copy(root / "photographs/camera.jpg", other / "photographs/text.jpg")
    with monkeypatch.context() as interrupted:
        interrupted.setattr(task, "publish", interrupt)
        assert exit_code_of(build_shards.main, words) == ExitCode.INTERRUPTED
    shutil.copy(root / "photographs/text.jpg", other / "photographs/text.jpg")
    assert build_shards.main(words) == 0
    assert list(verify(out)) == []


def test_appended_rows_rebuild_only_the_last_shards(root: Path, expected: Path, tmp_path: Path) -> None:
    longer = tmp_path / "root"
    shutil.copytree(root, longer)
    rows = json.loads((root / "rows.json").read_text())
    (longer / "rows.json").write_text(json.dumps([*rows, *(dialogue_row(i) for i in range(NUM_ROWS, NUM_ROWS + 5))]))
    shutil.copytree(expected, tmp_path / "out")
    assert build_shards.main(command(longer, tmp_path / "out", workers=0)) == 0
    before, after = contents(expected), contents(tmp_path / "out")
    assert all(before[name] == after[name] for name in before if name.startswith("shard"))
    assert load_index(tmp_path / "out").num_rows == NUM_ROWS + 5 - 1


def test_a_rerun_counts_an_appended_row_that_is_rejected(root: Path, expected: Path, tmp_path: Path) -> None:
    longer = tmp_path / "root"
    shutil.copytree(root, longer)
    rows = json.loads((root / "rows.json").read_text())
    (longer / "rows.json").write_text(json.dumps([*rows, {"id": "no conversations"}]))
    shutil.copytree(expected, tmp_path / "out")
    assert build_shards.main(command(longer, tmp_path / "out", workers=0)) == 0
    counts = Manifest.load(tmp_path / "out").counts
    assert (counts["rows"], counts["samples"], counts["rejects"]) == (NUM_ROWS + 1, NUM_ROWS - 1, 2)


def test_a_note_reports_shards_built_with_other_package_versions(
    root: Path, expected: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(expected, tmp_path / "out")
    sidecar = tmp_path / "out/shard-00003.json"
    sidecar.write_text(sidecar.read_text().replace('"made_with": "pillow ', '"made_with": "pillow 1.'))
    (tmp_path / "out/manifest.json").unlink()
    assert build_shards.main(command(root, tmp_path / "out", workers=0)) == 0
    assert sorted(Manifest.load(tmp_path / "out").made_with.values()) == [1, 11]
    output = capsys.readouterr().out
    assert "note: shards were built with different package versions: 1 with pillow 1." in output
    assert (
        f"; 11 with {codec_versions()}; images may differ slightly. To build all with the same versions, delete"
        in output
    )


# -- What is output ----------------------------------------------------------------------------------------------------


def test_a_build_for_another_model_has_another_spec_hash_and_template(
    root: Path, expected: Path, tmp_path: Path
) -> None:
    build_in_process(root, tmp_path / "out", gpt_neox(), model="emma_v1", samples_per_shard=SAMPLES_PER_SHARD)
    assert Manifest.load(tmp_path / "out").spec_sha256 != Manifest.load(expected).spec_sha256
    assert Manifest.load(tmp_path / "out").template == "zephyr"


def test_the_manifest_counts_distinct_images(expected: Path) -> None:
    counts = Manifest.load(expected).counts
    assert (counts["with_image"], counts["pictures"]) == (215, len(PHOTOGRAPHS))


def test_a_check_prints_the_plan_and_writes_no_file(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert build_shards.main([*command(root, tmp_path / "out"), "--check"]) == 0
    assert not (tmp_path / "out").exists()
    assert capsys.readouterr().out.splitlines() == [
        "photographs: 240 rows, 0 rejected before any image is read",
        "    photographs: images of 216 rows",
        "    54 images decoded, 0 of them bad",
        f"12 shards of 240 dialogues, 12 of them to be built in {tmp_path / 'out'}",
    ]


def test_a_check_lists_missing_folders_and_bad_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here/1.jpg").write_text("not an image")
    rows = [
        dialogue_row(i) | {"image": f"{folder}/1.jpg"} for i, folder in enumerate(["here", "here", "coco/train2017"])
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    write_mix(tmp_path, [{"name": "a", "format": "llava", "annotations": "rows.json", "expected_rows": 4}])
    words = arguments(tmp_path, tmp_path / "out", gpt_neox(), samples_per_shard=1)
    assert exit_code_of(build_shards.main, [*words, "--dry-run"]) == ExitCode.USER_ERROR
    output = capsys.readouterr()
    assert output.out.splitlines() == [
        "a: 3 rows, 0 rejected before any image is read",
        "    here: images of 2 rows",
        "    coco/train2017: images of 1 rows – MISSING",
        "    3 images decoded, 3 of them bad",
        "        picture_unknown_format: 2, for example here/1.jpg",
        "        picture_missing: 1, for example coco/train2017/1.jpg",
        "note: source 'a' has 3 rows, the mix expects 4",
    ]
    assert "image folders are missing" in output.err


def test_a_check_decodes_images_spread_over_each_source(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p").mkdir()
    shutil.copy(root / "photographs/text.jpg", tmp_path / "p/0.jpg")
    rows = [{key: value for key, value in dialogue_row(0).items() if key != "image"}]
    rows += [dialogue_row(0) | {"image": f"p/{number}.jpg"} for number in range(500)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    write_mix(tmp_path, [{"name": name, "format": "llava", "annotations": "rows.json"} for name in ("a", "b")])
    assert build_shards.main([*arguments(tmp_path, tmp_path / "out", gpt_neox()), "--check"]) == 0
    output = capsys.readouterr().out
    assert (
        output.count("    63 images decoded, 62 of them bad\n        picture_missing: 62, for example p/8.jpg\n") == 2
    )


def test_a_set_built_with_source_weights_has_correct_counts_and_passes_verify(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "root")
    source = {"format": "llava", "annotations": "rows.json", "images": "photographs", "expected_rows": NUM_ROWS}
    sources = [source | {"name": "thinned", "weight": 0.25}, source | {"name": "repeated", "weight": 2}]
    write_mix(tmp_path / "root", sources)
    out = build_in_process(tmp_path / "root", tmp_path / "out", gpt_neox(), max_reject_ratio=0.1)
    about = Manifest.load(out).sources
    assert about["thinned"] == {"rows": 60, "samples": 59, "rejects": 1}
    assert about["repeated"] == {"rows": 480, "samples": 478, "rejects": 2}
    assert list(verify(out)) == []
