"""The image store: images in folders, zip archives and tar archives, and reject reasons."""

import bz2
import errno
import gzip
import io
import lzma
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Literal

import pyarrow as pa
import pytest

from model.errors import UserError
from preprocess.images import store as image_store
from preprocess.images.archive import Archive
from preprocess.images.store import ImageStore, sha256_hex
from preprocess.rejects import Rejected


def write_zip(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


LAYOUTS = {
    "zip beside, as COCO packs it": (write_zip, "coco/train2017.zip", "train2017/1.jpg", {}),
    "zip beside, without a folder inside": (write_zip, "coco/train2017.zip", "1.jpg", {}),
    "tar beside": (write_tar, "coco/train2017.tar", "train2017/1.jpg", {}),
    "tar made with a leading dot": (write_tar, "coco/train2017.tar", "./1.jpg", {}),
    "archive of the folder above": (write_zip, "coco.zip", "coco/train2017/1.jpg", {}),
    "named by the mix": (write_zip, "downloads/a.zip", "train2017/1.jpg", {"coco/train2017": "downloads/a.zip"}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_image_is_read_from_an_archive_in_place_of_its_folder(tmp_path: Path, layout: str) -> None:
    write, archive, member, archives = LAYOUTS[layout]
    write(tmp_path / archive, {"other.txt": b"no", member: b"image"})
    store = ImageStore(tmp_path, archives)
    assert store.has_folder("coco/train2017")
    assert store.read("coco/train2017/1.jpg") == b"image"
    with pytest.raises(Rejected, match="picture_missing: no such member of"):
        store.read("coco/train2017/2.jpg")
    assert (store.size("coco/train2017/1.jpg"), store.size("coco/train2017/2.jpg")) == (len(b"image"), None)
    fingerprints = [store.fingerprint(f"coco/train2017/{number}.jpg") for number in (1, 2)]
    assert fingerprints == [sha256_hex(b"image"), "picture_missing"]


def test_an_image_folder_takes_precedence_over_archives_of_the_same_name(tmp_path: Path) -> None:
    write_zip(tmp_path / "p.zip", {"p/1.jpg": b"packed"})
    write_zip(tmp_path / "named.zip", {"p/1.jpg": b"packed"})
    (tmp_path / "p").mkdir()
    (tmp_path / "p/1.jpg").write_bytes(b"unpacked")
    assert ImageStore(tmp_path, {"p": "named.zip"}).read("p/1.jpg") == b"unpacked"


def test_an_image_folder_may_be_a_symbolic_link_to_a_folder_outside_the_root(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared/1.jpg").write_bytes(b"image")
    (tmp_path / "root").mkdir()
    (tmp_path / "root/coco").symlink_to(tmp_path / "shared")
    assert ImageStore(tmp_path / "root", {}).read("coco/1.jpg") == b"image"


def test_a_damaged_image_archive_is_a_user_error(tmp_path: Path) -> None:
    write_zip(tmp_path / "p.zip", {"1.jpg": b"x" * 100})
    (tmp_path / "p.zip").write_bytes((tmp_path / "p.zip").read_bytes()[:-30])
    with pytest.raises(UserError, match=r"image archive .*p\.zip is damaged .*download it again"):
        ImageStore(tmp_path, {}).read("p/1.jpg")


def test_a_missing_image_archive_is_treated_as_a_missing_folder(tmp_path: Path) -> None:
    store = ImageStore(tmp_path, {"p": "gone.zip"})
    assert not store.has_folder("p")
    with pytest.raises(Rejected, match="picture_missing"):
        store.read("p/1.jpg")


def test_a_damaged_archive_member_does_not_affect_other_members(tmp_path: Path) -> None:
    write_zip(tmp_path / "p.zip", {"1.jpg": b"image one", "2.jpg": b"image two"})
    data = (tmp_path / "p.zip").read_bytes()
    (tmp_path / "p.zip").write_bytes(data.replace(b"image one", b"imaga one"))
    store = ImageStore(tmp_path, {})
    with pytest.raises(Rejected, match="picture_corrupt"):
        store.read("p/1.jpg")
    assert store.read("p/2.jpg") == b"image two"


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.EACCES, "picture_unreadable"),
        (errno.ENAMETOOLONG, "picture_path_invalid"),
        (errno.EIO, None),
        (errno.ESTALE, None),
    ],
)
def test_unreadable_images_are_rejected_but_disk_failures_raise_oserror(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, reason: str | None
) -> None:
    """The test patches `Path.open`, because root can read every file and a test cannot make a disk fail."""

    def fail(path: Path, mode: str) -> IO[bytes]:
        raise OSError(number, "simulated")

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(Rejected if reason else OSError, match=reason or "simulated"):
        ImageStore(tmp_path, {}).read("1.jpg")


def test_an_image_fingerprint_changes_when_the_file_is_added_or_replaced(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "root", {})
    (tmp_path / "root").mkdir()
    fingerprints = [store.fingerprint("1.jpg")]
    for data in (b"", b"four", b"five"):
        (tmp_path / "root/1.jpg").write_bytes(data)
        fingerprints.append(store.fingerprint("1.jpg"))
    (tmp_path / "root/1.jpg").unlink()
    (tmp_path / "root/1.jpg").symlink_to(tmp_path / "outside.jpg")
    (tmp_path / "outside.jpg").write_bytes(b"five")
    fingerprints.append(store.fingerprint("1.jpg"))
    assert len(set(fingerprints)) == len(fingerprints)


@pytest.mark.parametrize("packed", ["zip", "tar", "folder"])
@pytest.mark.parametrize("our_form", ["NFC", "NFD"])
def test_accented_image_names_are_found_in_either_unicode_normal_form(
    tmp_path: Path, our_form: Literal["NFC", "NFD"], packed: str
) -> None:
    stored_name = unicodedata.normalize("NFD" if our_form == "NFC" else "NFC", "Städte/é.jpg")
    image = unicodedata.normalize(our_form, "Städte/é.jpg")
    if packed == "folder":
        (tmp_path / stored_name).parent.mkdir()
        (tmp_path / stored_name).write_bytes(b"image")
    else:
        write = write_zip if packed == "zip" else write_tar
        write(tmp_path / f"{stored_name.partition('/')[0]}.{packed}", {stored_name: b"image"})
    store = ImageStore(tmp_path, {})
    assert store.has_folder(image.partition("/")[0])
    assert store.read(image) == b"image"
    assert store.size(image) == len(b"image")


@pytest.mark.parametrize("encoding", ["utf-8", "cp437"])
def test_accented_names_in_zip_files_without_the_utf_8_flag_are_found(tmp_path: Path, encoding: str) -> None:
    """zipfile always sets the flag for non-ASCII names, so the test writes an ASCII name and patches its bytes."""
    image = unicodedata.normalize("NFD" if encoding == "utf-8" else "NFC", "é.jpg")
    name = image.encode(encoding)
    write_zip(tmp_path / "p.zip", {"_" * len(name): b"image"})
    (tmp_path / "p.zip").write_bytes((tmp_path / "p.zip").read_bytes().replace(b"_" * len(name), name))
    assert ImageStore(tmp_path, {}).read("p/é.jpg") == b"image"


@pytest.mark.parametrize("write", [write_zip, write_tar])
@pytest.mark.parametrize("member", ["win\\sub\\a.jpg", ".\\win\\sub\\a.jpg", "/win/sub/a.jpg", "win//sub/./a.jpg"])
def test_member_names_with_backslashes_and_redundant_parts_are_found(
    tmp_path: Path, member: str, write: Callable[[Path, dict[str, bytes]], None]
) -> None:
    write(tmp_path / "win.bin", {member: b"image"})
    store = ImageStore(tmp_path, {".\\win": "win.bin"})
    assert store.has_folder("win\\sub")
    assert (store.read("win/sub/a.jpg"), store.size("win/sub/a.jpg")) == (b"image", 5)


def compress(codec: str, data: bytes) -> bytes:
    return bytes(pa.compress(data, codec=codec, asbytes=True)) if codec == "zstd" else COMPRESSORS[codec](data)


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress}
COMPRESSED = {
    "named by the mix": ("gzip", "a.tar.gz", {"p": "a.tar.gz"}),
    "named .tar by the mix": ("gzip", "a.tar", {"p": "a.tar"}),
    "gzip named .tar": ("gzip", "p.tar", {}),
    "gzip named .zip": ("gzip", "p.zip", {}),
    "tar.gz beside": ("gzip", "p.tar.gz", {}),
    "tgz beside": ("gzip", "p.tgz", {}),
    "tar.bz2 beside": ("bzip2", "p.tar.bz2", {}),
    "tar.xz beside": ("xz", "p.tar.xz", {}),
    "tar.zst beside": ("zstd", "p.tar.zst", {}),
}


@pytest.mark.parametrize("kind", COMPRESSED)
def test_the_error_for_a_compressed_tar_says_that_it_is_compressed(tmp_path: Path, kind: str) -> None:
    codec, name, archives = COMPRESSED[kind]
    write_tar(tmp_path / "plain", {"p/1.jpg": b"image"})
    (tmp_path / name).write_bytes(compress(codec, (tmp_path / "plain").read_bytes()))
    article = "an" if codec == "xz" else "a"
    expected = f"{name} is {article} {codec} file, expected a zip or an uncompressed tar: unpack it into the folder p"
    with pytest.raises(UserError, match=expected):
        ImageStore(tmp_path, archives).has_folder("p")


def test_the_error_for_an_archive_that_is_a_git_lfs_pointer_names_the_pointer(tmp_path: Path) -> None:
    (tmp_path / "p.tar").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(UserError, match=r"p\.tar is a Git LFS pointer, .*: fetch the file itself with `git lfs pull`"):
        ImageStore(tmp_path, {}).has_folder("p")


def test_each_part_of_a_path_may_have_its_own_unicode_normal_form(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    (tmp_path / composed).mkdir()
    (tmp_path / composed / f"{decomposed}.jpg").write_bytes(b"image")
    for folder in (composed, decomposed):
        for name in (composed, decomposed):
            assert ImageStore(tmp_path, {}).read(f"{folder}/{name}.jpg") == b"image"


def write_linked_tar(path: Path, links: dict[str, tuple[bytes, str]]) -> None:
    """Write a tar archive with the file a/1.jpg and the given links."""
    with tarfile.open(path, "w") as archive:
        file = tarfile.TarInfo("./a/1.jpg")
        file.size = len(b"image")
        archive.addfile(file, io.BytesIO(b"image"))
        for name, (kind, target) in links.items():
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, target
            archive.addfile(link)


LINKS = {
    "hard link": ("./a/2.jpg", (tarfile.LNKTYPE, "./a/1.jpg"), True),
    "link": ("a/2.jpg", (tarfile.SYMTYPE, "1.jpg"), True),
    "link from another folder": ("b/2.jpg", (tarfile.SYMTYPE, "../a/1.jpg"), True),
    "link to a link": ("b/2.jpg", (tarfile.SYMTYPE, "../a/again.jpg"), True),
    "link out of the archive": ("a/2.jpg", (tarfile.SYMTYPE, "../../a/1.jpg"), False),
    "absolute link": ("a/2.jpg", (tarfile.SYMTYPE, "/a/1.jpg"), False),
    "link to nothing": ("a/2.jpg", (tarfile.SYMTYPE, "none.jpg"), False),
    "link to itself": ("a/2.jpg", (tarfile.SYMTYPE, "2.jpg"), False),
}


@pytest.mark.parametrize("kind", LINKS)
def test_links_in_a_tar_are_followed_only_within_the_tar(tmp_path: Path, kind: str) -> None:
    name, link, found = LINKS[kind]
    write_linked_tar(tmp_path / "p.tar", {"a/again.jpg": (tarfile.SYMTYPE, "1.jpg"), name: link})
    store, image = ImageStore(tmp_path, {}), "p/" + name.removeprefix("./")
    if found:
        assert (store.read(image), store.size(image)) == (b"image", len(b"image"))
    else:
        with pytest.raises(Rejected, match="picture_missing"):
            store.read(image)


def test_the_last_of_several_tar_members_with_the_same_name_is_read(tmp_path: Path) -> None:
    write_linked_tar(tmp_path / "p.tar", {"a/2.jpg": (tarfile.SYMTYPE, "1.jpg")})
    with tarfile.open(tmp_path / "p.tar", "a") as archive:
        file = tarfile.TarInfo("a/2.jpg")
        file.size = len(b"newer")
        archive.addfile(file, io.BytesIO(b"newer"))
    assert ImageStore(tmp_path, {}).read("p/a/2.jpg") == b"newer"


@pytest.mark.parametrize("packed", ["zip", "tar", "folder"])
def test_a_huge_file_is_rejected_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: str
) -> None:
    monkeypatch.setattr(image_store, "MAX_FILE_BYTES", 10)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/1.jpg").write_bytes(bytes(11))
    (tmp_path / "folder/2.jpg").write_bytes(bytes(10))
    write_zip(tmp_path / "zip.zip", {"1.jpg": bytes(11), "2.jpg": bytes(10)})
    write_tar(tmp_path / "tar.tar", {"1.jpg": bytes(11), "2.jpg": bytes(10)})
    store = ImageStore(tmp_path, {})
    assert len(store.read(f"{packed}/2.jpg")) == 10
    monkeypatch.setattr(Archive, "read", None)
    with pytest.raises(Rejected, match="picture_too_large: 11 bytes, at most 10 are read"):
        store.read(f"{packed}/1.jpg")
    assert store.fingerprint(f"{packed}/1.jpg") == "picture_too_large"


def test_a_symbolic_link_loop_counts_as_a_missing_image(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").symlink_to("1.jpg")
    (tmp_path / "2.jpg").symlink_to("3.jpg")
    (tmp_path / "3.jpg").symlink_to("2.jpg")
    store = ImageStore(tmp_path, {})
    for name in ("1.jpg", "2.jpg"):
        with pytest.raises(Rejected, match="picture_missing"):
            store.read(name)
        assert (store.fingerprint(name), store.size(name)) == ("picture_missing", None)
