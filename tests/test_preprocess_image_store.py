"""Pictures are found in folders and in the archives that datasets are published as."""

import errno
import io
import tarfile
import unicodedata
import zipfile
from pathlib import Path
from typing import IO, Literal

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
def test_a_picture_is_read_from_an_archive_in_place_of_its_folder(tmp_path: Path, layout: str) -> None:
    write, archive, member, archives = LAYOUTS[layout]
    write(tmp_path / archive, {"other.txt": b"no", member: b"picture"})
    store = ImageStore(tmp_path, archives)
    assert store.has_folder("coco/train2017")
    assert store.read("coco/train2017/1.jpg") == b"picture"
    with pytest.raises(Rejected, match="picture_missing: no such member of"):
        store.read("coco/train2017/2.jpg")
    assert (store.size("coco/train2017/1.jpg"), store.size("coco/train2017/2.jpg")) == (len(b"picture"), None)
    stamps = [store.fingerprint(f"coco/train2017/{number}.jpg") for number in (1, 2)]
    assert stamps == [sha256_hex(b"picture"), "picture_missing"]


def test_a_folder_is_preferred_to_every_archive(tmp_path: Path) -> None:
    write_zip(tmp_path / "p.zip", {"p/1.jpg": b"packed"})
    write_zip(tmp_path / "named.zip", {"p/1.jpg": b"packed"})
    (tmp_path / "p").mkdir()
    (tmp_path / "p/1.jpg").write_bytes(b"unpacked")
    assert ImageStore(tmp_path, {"p": "named.zip"}).read("p/1.jpg") == b"unpacked"


def test_a_folder_may_be_a_link_to_anywhere(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared/1.jpg").write_bytes(b"picture")
    (tmp_path / "root").mkdir()
    (tmp_path / "root/coco").symlink_to(tmp_path / "shared")
    assert ImageStore(tmp_path / "root", {}).read("coco/1.jpg") == b"picture"


def test_a_damaged_archive_is_one_clear_line(tmp_path: Path) -> None:
    write_zip(tmp_path / "p.zip", {"1.jpg": b"x" * 100})
    (tmp_path / "p.zip").write_bytes((tmp_path / "p.zip").read_bytes()[:-30])
    with pytest.raises(UserError, match=r"image archive .*p\.zip is damaged .*download it again"):
        ImageStore(tmp_path, {}).read("p/1.jpg")


def test_an_archive_that_is_not_there_is_a_folder_that_is_not_there(tmp_path: Path) -> None:
    store = ImageStore(tmp_path, {"p": "gone.zip"})
    assert not store.has_folder("p")
    with pytest.raises(Rejected, match="picture_missing"):
        store.read("p/1.jpg")


def test_a_member_that_was_damaged_costs_its_row_only(tmp_path: Path) -> None:
    write_zip(tmp_path / "p.zip", {"1.jpg": b"picture one", "2.jpg": b"picture two"})
    data = (tmp_path / "p.zip").read_bytes()
    (tmp_path / "p.zip").write_bytes(data.replace(b"picture one", b"pictura one"))
    store = ImageStore(tmp_path, {})
    with pytest.raises(Rejected, match="picture_corrupt"):
        store.read("p/1.jpg")
    assert store.read("p/2.jpg") == b"picture two"


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.EACCES, "picture_unreadable"),
        (errno.ENAMETOOLONG, "picture_path_invalid"),
        (errno.EIO, None),
        (errno.ESTALE, None),
    ],
)
def test_what_the_disk_says_is_told_from_what_the_data_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, reason: str | None
) -> None:
    """Root may read everything, and disks rarely fail when asked to: the call that fails is replaced."""

    def fail(path: Path, mode: str) -> IO[bytes]:
        raise OSError(number, "as the disk says")

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(Rejected if reason else OSError, match=reason or "as the disk says"):
        ImageStore(tmp_path, {}).read("1.jpg")


def test_a_stamp_changes_when_the_picture_comes_or_is_mended(tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "root", {})
    (tmp_path / "root").mkdir()
    stamps = [store.fingerprint("1.jpg")]
    for data in (b"", b"four", b"five"):
        (tmp_path / "root/1.jpg").write_bytes(data)
        stamps.append(store.fingerprint("1.jpg"))
    (tmp_path / "root/1.jpg").unlink()
    (tmp_path / "root/1.jpg").symlink_to(tmp_path / "outside.jpg")
    (tmp_path / "outside.jpg").write_bytes(b"five")
    stamps.append(store.fingerprint("1.jpg"))
    assert len(set(stamps)) == len(stamps)


@pytest.mark.parametrize("packed", ["zip", "tar", "folder"])
@pytest.mark.parametrize("ours", ["NFC", "NFD"])
def test_accents_are_found_however_either_side_spells_them(
    tmp_path: Path, ours: Literal["NFC", "NFD"], packed: str
) -> None:
    theirs = unicodedata.normalize("NFD" if ours == "NFC" else "NFC", "Städte/é.jpg")
    picture = unicodedata.normalize(ours, "Städte/é.jpg")
    if packed == "folder":
        (tmp_path / theirs).parent.mkdir()
        (tmp_path / theirs).write_bytes(b"picture")
    else:
        write = write_zip if packed == "zip" else write_tar
        write(tmp_path / f"{theirs.partition('/')[0]}.{packed}", {theirs: b"picture"})
    store = ImageStore(tmp_path, {})
    assert store.has_folder(picture.partition("/")[0])
    assert store.read(picture) == b"picture"
    assert store.size(picture) == len(b"picture")


@pytest.mark.parametrize("coding", ["utf-8", "cp437"])
def test_names_in_a_zip_that_does_not_say_how_they_are_coded_are_found(tmp_path: Path, coding: str) -> None:
    """zipfile always says it: the name is put in afterwards."""
    picture = unicodedata.normalize("NFD" if coding == "utf-8" else "NFC", "é.jpg")
    name = picture.encode(coding)
    write_zip(tmp_path / "p.zip", {"_" * len(name): b"picture"})
    (tmp_path / "p.zip").write_bytes((tmp_path / "p.zip").read_bytes().replace(b"_" * len(name), name))
    assert ImageStore(tmp_path, {}).read("p/é.jpg") == b"picture"


def write_linked_tar(path: Path, links: dict[str, tuple[bytes, str]]) -> None:
    """A file a/1.jpg, and links of either type beside it."""
    with tarfile.open(path, "w") as archive:
        file = tarfile.TarInfo("./a/1.jpg")
        file.size = len(b"picture")
        archive.addfile(file, io.BytesIO(b"picture"))
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
def test_a_link_in_a_tar_leads_to_what_the_tar_holds(tmp_path: Path, kind: str) -> None:
    name, link, found = LINKS[kind]
    write_linked_tar(tmp_path / "p.tar", {"a/again.jpg": (tarfile.SYMTYPE, "1.jpg"), name: link})
    store, picture = ImageStore(tmp_path, {}), "p/" + name.removeprefix("./")
    if found:
        assert (store.read(picture), store.size(picture)) == (b"picture", len(b"picture"))
    else:
        with pytest.raises(Rejected, match="picture_missing"):
            store.read(picture)


def test_of_members_of_one_name_the_last_one_counts_link_or_file(tmp_path: Path) -> None:
    write_linked_tar(tmp_path / "p.tar", {"a/2.jpg": (tarfile.SYMTYPE, "1.jpg")})
    with tarfile.open(tmp_path / "p.tar", "a") as archive:
        file = tarfile.TarInfo("a/2.jpg")
        file.size = len(b"newer")
        archive.addfile(file, io.BytesIO(b"newer"))
    assert ImageStore(tmp_path, {}).read("p/a/2.jpg") == b"newer"


@pytest.mark.parametrize("packed", ["zip", "tar", "folder"])
def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: str) -> None:
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


def test_a_link_to_itself_is_a_picture_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").symlink_to("1.jpg")
    (tmp_path / "2.jpg").symlink_to("3.jpg")
    (tmp_path / "3.jpg").symlink_to("2.jpg")
    store = ImageStore(tmp_path, {})
    for name in ("1.jpg", "2.jpg"):
        with pytest.raises(Rejected, match="picture_missing"):
            store.read(name)
        assert (store.fingerprint(name), store.size(name)) == ("picture_missing", None)
