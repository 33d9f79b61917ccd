"""The page shows a batch as the model gets it; bad flags are one-line errors."""

import base64
import io
import re

import numpy as np
import pytest
from absl import flags
from conftest import ROOT, load_config, shrink_sr
from PIL import Image

from data_pipelines import inspect
from data_pipelines.reading.reader import Reader
from imagen_jax.common.errors import UserError
from imagen_jax.config import parse
from imagen_jax.diffusion.conditioning import shrink_pixels


@pytest.fixture
def run_main():
    before = set(flags.FLAGS)
    inspect.define_flags()

    def run(*args):
        flags.FLAGS(["inspect", *args])
        inspect.main([])

    yield run
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)


def test_the_page_has_the_batch_of_the_run(tiny_data, tmp_path, monkeypatch, run_main):
    values = shrink_sr(load_config("sr256", "tiny")).to_dict()
    values["data"].update(dir=tiny_data, build=False, task="scenes_32", image_size=32)
    values["model"].update(image_size=32, low_res=8)
    monkeypatch.setattr(inspect.typed_config, "load", lambda *args: values)
    out = tmp_path / "page.html"
    run_main("--config=x", "--position=8", "--num=4", "--seconds=0.2", f"--out={out}")
    page = out.read_text()
    shown = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
        for data in re.findall(r"base64,([^\"]+)", page)
    ]
    batches = Reader(parse(values)).train_batches(8)
    batch = next(batches)
    batches.close()
    low_res = shrink_pixels(batch["image"], 8)
    assert len(shown) == 8
    for i in range(4):
        np.testing.assert_array_equal(shown[2 * i], batch["image"][i])
        np.testing.assert_array_equal(shown[2 * i + 1], low_res[i])
        length = int(batch["text_mask"][i].sum())
        assert f"1x{length}" in page
    for words in ("train-0000", "scenes_32, record ", "examples/s", "decoding", "padding"):
        assert words in page
    assert "http" not in page


def test_bad_flags_are_refused(run_main):
    with pytest.raises(UserError, match="--config=FILE is needed"):
        run_main()
    with pytest.raises(UserError, match=r"data\.dir=/no has no dataset"):
        run_main(f"--config={ROOT}/configs/folder.py", "--set=data.dir=/no")
