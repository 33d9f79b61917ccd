"""The Beam pipeline writes the same dataset as one machine. Skipped if Beam is not installed."""

import pytest

pytest.importorskip("apache_beam")

from making import files, ingest, job, jpeg, write_tar, write_tars

from data_pipelines.ingestion import run, workers
from imagen_jax.common.errors import UserError

pytestmark = pytest.mark.filterwarnings("default")  # Beam itself warns


def test_the_dataset_equals_that_of_one_machine(tmp_path):
    write_tars(tmp_path / "tars", 4, 9)
    write_tar(tmp_path / "tars/00009.tar", {"z.jpg": jpeg(3), "z.txt": "a copy"})
    settings = {"shard_size": 8, "validation_fraction": 0.1}
    plain = ingest(tmp_path / "plain", tmp_path / "tars", **settings)
    beam = workers.beam(["runner=DirectRunner"])
    fleet = run.run(job(tmp_path / "fleet", tmp_path / "tars", **settings), beam)
    assert files(plain) == files(fleet)


def test_a_mistake_on_a_worker_is_one_line(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(UserError, match=r"x\.tar: damaged or cut short: .* are kept$") as error:
        run.run(job(tmp_path / "data", tmp_path / "x.tar"), workers.beam(["runner=DirectRunner"]))
    assert "\n" not in str(error.value)
