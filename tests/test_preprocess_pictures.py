"""Pictures are found in folders and in the archives that datasets are published as."""

import errno
import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from model.errors import UserError
from preprocess.pictures import PictureStore, digest
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
    store = PictureStore(tmp_path, archives)
    assert store.has_folder("coco/train2017")
    assert store.read("coco/train2017/1.jpg") == b"picture"
    with pytest.raises(Rejected, match="picture_missing: no such member of"):
        store.read("coco/train2017/2.jpg")
    assert (store.size("coco/train2017/1.jpg"), store.size("coco/train2017/2.jpg")) == (len(b"picture"), None)
    stamps = [store.stamp(f"coco/train2017/{number}.jpg") for number in (1, 2)]
    assert stamps == [digest(b"picture"), "picture_missing"]


def test_a_folder_is_preferred_to_every_archive(tmp_path: Path) -> None:
    write_zip(tmp_path / "p.zip", {"p/1.jpg": b"packed"})
    write_zip(tmp_path / "named.zip", {"p/1.jpg": b"packed"})
    (tmp_path / "p").mkdir()
    (tmp_path / "p/1.jpg").write_bytes(b"unpacked")
    assert PictureStore(tmp_path, {"p": "named.zip"}).read("p/1.jpg") == b"unpacked"


def test_a_folder_may_be_a_link_to_anywhere(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared/1.jpg").write_bytes(b"picture")
    (tmp_path / "root").mkdir()
    (tmp_path / "root/coco").symlink_to(tmp_path / "shared")
    assert PictureStore(tmp_path / "root", {}).read("coco/1.jpg") == b"picture"


def test_a_damaged_archive_is_one_clear_line(tmp_path: Path) -> None:
    write_zip(tmp_path / "p.zip", {"1.jpg": b"x" * 100})
    (tmp_path / "p.zip").write_bytes((tmp_path / "p.zip").read_bytes()[:-30])
    with pytest.raises(UserError, match=r"picture archive .*p\.zip is damaged .*fetch it again"):
        PictureStore(tmp_path, {}).read("p/1.jpg")


def test_an_archive_that_is_not_there_is_a_folder_that_is_not_there(tmp_path: Path) -> None:
    store = PictureStore(tmp_path, {"p": "gone.zip"})
    assert not store.has_folder("p")
    with pytest.raises(Rejected, match="picture_missing"):
        store.read("p/1.jpg")


def test_a_member_that_was_damaged_costs_its_row_only(tmp_path: Path) -> None:
    write_zip(tmp_path / "p.zip", {"1.jpg": b"picture one", "2.jpg": b"picture two"})
    data = (tmp_path / "p.zip").read_bytes()
    (tmp_path / "p.zip").write_bytes(data.replace(b"picture one", b"pictura one"))
    store = PictureStore(tmp_path, {})
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

    def fail(path: Path) -> bytes:
        raise OSError(number, "as the disk says")

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(Rejected if reason else OSError, match=reason or "as the disk says"):
        PictureStore(tmp_path, {}).read("1.jpg")


def test_a_stamp_changes_when_the_picture_comes_or_is_mended(tmp_path: Path) -> None:
    store = PictureStore(tmp_path / "root", {})
    (tmp_path / "root").mkdir()
    stamps = [store.stamp("1.jpg")]
    for data in (b"", b"four", b"five"):
        (tmp_path / "root/1.jpg").write_bytes(data)
        stamps.append(store.stamp("1.jpg"))
    (tmp_path / "root/1.jpg").unlink()
    (tmp_path / "root/1.jpg").symlink_to(tmp_path / "outside.jpg")
    (tmp_path / "outside.jpg").write_bytes(b"five")
    stamps.append(store.stamp("1.jpg"))
    assert len(set(stamps)) == len(stamps)
