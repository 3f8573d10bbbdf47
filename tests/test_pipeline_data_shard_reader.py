"""The shard reader: errors for changed, missing and unreadable shards, and warnings about slow reads."""

import errno
import os
import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from queue import Queue

import pytest

from pipeline.data.shard_reader import DamagedShardError, ShardReader
from pipeline.distributed.stall_warning import StallWarning
from pipeline.errors import RetryableError

ROW = 3  # row in the first shard


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "shards"))


def flip(path: Path) -> None:
    """Flip a bit in the last image of the shard. No test here reads that image, so only the hash reveals the change."""
    data = bytearray(path.read_bytes())
    data[-4000] ^= 1
    path.write_bytes(data)


def replace_by_another(shard: Path) -> None:
    flip(Path(shutil.copy(shard, shard.with_name("new"))))
    shard.with_name("new").replace(shard)


@pytest.mark.parametrize("opened_before", [False, True])
@pytest.mark.parametrize("change", [flip, replace_by_another])
def test_reading_a_shard_that_changed_after_the_run_began_is_an_error(copy, change, opened_before):
    reader, shard = ShardReader(copy), copy / "shard-00000.tar"
    if opened_before:
        reader.read(ROW)
    change(shard)
    with pytest.raises(DamagedShardError, match="replaced after the run began") as error:
        reader.read(ROW)
    assert f"{shard}: sample 000000003 cannot be read" in str(error.value)
    assert f"preprocess.shardset verify {copy}" in str(error.value)


def replace_by_a_copy(shard: Path) -> None:
    Path(shutil.copy(shard, shard.with_name("new"))).replace(shard)


@pytest.mark.parametrize("change", [Path.touch, replace_by_a_copy])
def test_a_shard_with_a_new_time_or_inode_but_the_same_bytes_is_accepted(copy, change):
    reader, shard = ShardReader(copy), copy / "shard-00000.tar"
    before, _ = reader.read(ROW)
    change(shard)
    after, _ = reader.read(ROW)
    assert after.id == before.id
    assert reader.fingerprints[0] == ShardReader(copy).fingerprints[0]


def test_the_error_for_a_deleted_shard_says_to_build_the_shards_again(copy):
    reader, shard = ShardReader(copy), copy / "shard-00000.tar"
    reader.read(ROW)
    shard.unlink()
    with pytest.raises(DamagedShardError, match=r"No such file.*build the shards again"):
        reader.read(ROW)


def test_an_io_error_in_a_shard_is_retryable_and_not_reported_as_damage(copy):
    """Simulate a broken disk with a link to /proc/self/mem, because reading address 0 is an I/O error."""
    shard = copy / "shard-00000.tar"
    shard.unlink()
    shard.symlink_to("/proc/self/mem")
    with pytest.raises(RetryableError, match=f"file system of {socket.gethostname()} fails .*Input/output error"):
        ShardReader(copy).read(ROW)


def test_an_io_error_in_the_index_is_retryable(copy, monkeypatch):
    def fails(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("preprocess.shards.manifest.pq.read_table", fails)
    with pytest.raises(
        RetryableError, match=rf"index.parquet: the file system of {socket.gethostname()} fails .*Input/output error"
    ):
        _ = ShardReader(copy).index


def test_a_slow_read_prints_a_warning_while_it_lasts_and_a_note_when_it_ends(copy):
    """Simulate a hanging disk with a FIFO, because opening a FIFO blocks until its other end is opened."""
    shard, warnings = copy / "shard-00000.tar", Queue[str]()
    shard.unlink()
    os.mkfifo(shard)
    reader = ShardReader(copy)
    reader.stall_warning = StallWarning(warnings.put, limit_s=0.01)
    reading = threading.Thread(target=fails, args=(lambda: reader.read(ROW),), daemon=True)
    reading.start()
    assert warnings.get(timeout=60) == f"{shard}: reading sample 000000003 takes longer than 0.01 s; still waiting"
    os.close(os.open(shard, os.O_WRONLY))
    reading.join()
    assert warnings.get(timeout=60).startswith(f"{shard}: reading sample 000000003 took ")


def test_a_slow_read_is_recorded_with_its_shard_and_key(copy):
    reader = ShardReader(copy)
    reader.stall_warning = StallWarning(lambda line: None, limit_s=0.0)
    reader.read(ROW)
    [(shard, key, seconds)] = reader.slow_reads
    assert (shard, key) == (str(copy / "shard-00000.tar"), "000000003")
    assert seconds > 0


def fails(action: Callable[[], object]) -> None:
    with pytest.raises((RetryableError, DamagedShardError)):
        action()
