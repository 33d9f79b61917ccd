"""The Beam pipeline writes the same store as one machine. Skipped if Beam is not installed."""

from functools import partial

import pytest

beam = pytest.importorskip("apache_beam")

from data_pipelines import encode_text_beam  # noqa: E402
from data_pipelines.embeddings import caption_lists, encoding  # noqa: E402
from data_pipelines.embeddings.shards import finish  # noqa: E402
from data_pipelines.embeddings.store import create_store  # noqa: E402
from imagen_jax.text import encoder_identity  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # Beam itself warns

FILES = {
    "a.txt": b"a red circle\nfive dogs\n\na red circle\n" + b"x" * 70,
    "b.csv": b"caption\na blue square\nfive dogs\n\xff\xfe\n",
    "c.txt": b"five dogs\n" + b"".join(b"%d stars\n" % i for i in range(30)),
}


def test_the_store_equals_that_of_one_machine(tmp_path):
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
    files = [str(tmp_path / name) for name in FILES]
    reads = [partial(caption_lists.read_file, file, "caption") for file in files]
    stores = [
        create_store(str(tmp_path / name), encoder_identity("byte-tiny", 64), "int8", 3)
        for name in ("plain", "beam")
    ]
    encoder_args = ("byte-tiny", 64, 1)
    found = (item for read in reads for item in read())
    shards = encoding.assign(stores[0], found, 0, 1)
    encoding.encode(stores[0], shards, encoding.load_encoder(*encoder_args))
    for _ in range(2):  # the second run finds all shards finished
        with beam.Pipeline("DirectRunner") as pipeline:
            encode_text_beam.build(pipeline, stores[1], reads, encoder_args)
    report = finish(stores[0])
    assert finish(stores[1]) == report
    assert (report["captions"], len(report["skipped"])) == (33, 3)
    plain, fleet = ({f.name: f.read_bytes() for f in s.path.iterdir()} for s in stores)
    assert plain == fleet
