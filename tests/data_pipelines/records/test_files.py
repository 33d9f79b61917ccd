"""Tests of byte ranges of files."""

import gc
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from data_pipelines.records import files


def test_a_file_that_is_not_in_the_cache_stays_open_while_it_is_read(tmp_path):
    """As if another thread had opened it at the same moment, or it had been evicted."""
    (tmp_path / "a").write_bytes(b"0123456789")
    some = files.Files()
    some._open = files._LocalFile
    assert some.read(str(tmp_path / "a"), 3, 4) == b"3456"


def test_threads_may_open_arrays_at_the_same_moment(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(17))

    def let_others_run(phase, info):
        time.sleep(0)

    # A garbage collection within numpy's parser lets another thread parse.
    before = gc.get_threshold(), sys.getswitchinterval()
    gc.callbacks.append(let_others_run)
    gc.set_threshold(5)
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as threads:
            path = str(tmp_path / "a.npy")
            found = list(threads.map(lambda _: files.load_array(path).sum(), range(2000)))
    finally:
        gc.callbacks.remove(let_others_run)
        gc.set_threshold(*before[0])
        sys.setswitchinterval(before[1])
    assert set(found) == {np.arange(17).sum()}
