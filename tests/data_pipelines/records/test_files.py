"""Tests of byte ranges of files."""

from data_pipelines.records import files


def test_a_file_that_is_not_in_the_cache_stays_open_while_it_is_read(tmp_path):
    """As if another thread had opened it at the same moment, or it had been evicted."""
    (tmp_path / "a").write_bytes(b"0123456789")
    some = files.Files()
    some._open = files._LocalFile
    assert some.read(str(tmp_path / "a"), 3, 4) == b"3456"
