"""Page-locked host memory into which a save copies the training state."""

import mmap

from pipeline.checkpoint.snapshot import allocate_pages, page_lock


def test_page_lock_returns_false_and_prints_one_warning_on_a_cuda_error(capsys):
    copy = allocate_pages(5)
    assert page_lock(copy, lambda address, size, flags: 0)
    assert capsys.readouterr().out == ""
    assert not page_lock(copy, lambda address, size, flags: 2)
    [line] = capsys.readouterr().out.splitlines()
    assert "CUDA error 2" in line


def test_allocated_host_buffers_are_zeroed_and_page_aligned():
    copies = [allocate_pages(count) for count in (0, 1, 5, mmap.PAGESIZE)]
    assert [copy.numel() for copy in copies] == [0, 1, 5, mmap.PAGESIZE]
    assert not any(copy.any() for copy in copies)
    assert {copy.data_ptr() % mmap.PAGESIZE for copy in copies[1:]} == {0}
