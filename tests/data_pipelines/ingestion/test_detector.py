"""--detect_unsafe: nudenet, which a fake replaces here, scores the images that have no score."""

import sys
from types import SimpleNamespace

import pytest
from making import encoded, ingest, manifest, report, rows, write_tar
from PIL import Image

from data_pipelines.ingestion import filters
from data_pipelines.records import manifest as manifests
from imagen_jax.common.errors import UserError

SAFE = [{"class": "FACE_FEMALE", "score": 0.9}, {"class": "BELLY_EXPOSED", "score": 0.8}]
FOUND = {"class": "FEMALE_BREAST_EXPOSED", "score": 0.7}
WEAKER = {"class": "BUTTOCKS_EXPOSED", "score": 0.6}


@pytest.fixture
def detectors(monkeypatch):
    """The fake's detectors. They find exposed parts in red images; `seen` has the BGR of pixels."""
    made = []

    class NudeDetector:
        def __init__(self):
            self.seen = []
            made.append(self)

        def detect(self, image):
            self.seen.append(tuple(image[0, 0].tolist()))
            return [*SAFE, WEAKER, FOUND] if image[0, 0, 2] > 200 else SAFE

    monkeypatch.setitem(sys.modules, "nudenet", SimpleNamespace(NudeDetector=NudeDetector))
    filters.detector.cache_clear()
    yield made
    filters.detector.cache_clear()


@pytest.fixture
def tar(tmp_path):
    """A red image, a blue one, and a red one with a score `punsafe`."""
    files = {}
    for name, color in (("a", (250, 0, 0)), ("b", (0, 0, 250)), ("scored", (240, 0, 0))):
        files[f"{name}.png"] = encoded(Image.new("RGB", (16, 16), color))
        files[f"{name}.txt"] = f"picture {name}"
    files["scored.json"] = {"punsafe": 0.1}
    write_tar(tmp_path / "x.tar", files)
    return tmp_path / "x.tar"


def test_images_without_a_score_are_scored(tar, tmp_path, detectors):
    folder = ingest(tmp_path, tar, detect_unsafe=True)
    [detector] = detectors
    assert detector.seen == [(0, 0, 250), (250, 0, 0)]
    assert rows(folder).keys() == {"x/b", "x/scored"}
    assert manifest(folder)["counts"]["rejected"] == {"nudenet beyond --max_unsafe=0.5": 1}
    [skipped] = report(folder)["skipped"]
    assert (skipped["name"], skipped["detail"]) == ("x/a", "FEMALE_BREAST_EXPOSED 0.70")
    card = (folder / "card.md").read_text()
    assert "1 of 2 images have no score `punsafe`. nudenet looked for exposed" in card


def test_a_score_at_the_limit_passes(tar, tmp_path, detectors):
    folder = ingest(tmp_path, tar, detect_unsafe=True, max_unsafe=FOUND["score"])
    assert len(rows(folder)) == 3 and detectors


def test_nudenet_is_optional(tar, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nudenet", None)  # its import fails
    filters.detector.cache_clear()
    with pytest.raises(UserError, match=r"^--detect_unsafe needs nudenet: pip install nudenet \("):
        ingest(tmp_path / "data", tar, detect_unsafe=True)
    assert not (tmp_path / "data").exists()
    assert len(rows(ingest(tmp_path / "data", tar))) == 3


def test_nothing_to_detect_without_a_limit(tar, tmp_path, detectors):
    with pytest.raises(UserError, match=r"^--max_unsafe=1 keeps all images; set it below 1"):
        ingest(tmp_path / "data", tar, detect_unsafe=True, max_unsafe=1.0)
    assert not detectors


def test_a_manifest_without_the_option_stays_valid(tar, tmp_path, detectors, capsys):
    folder = ingest(tmp_path, tar)
    fields = manifests.read(folder)
    del fields["settings"]["detect_unsafe"]
    manifests.write(folder, fields)
    assert ingest(tmp_path, tar) == folder and not detectors
    assert "already prepared" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"with detect_unsafe=False \(now True\)"):
        ingest(tmp_path, tar, detect_unsafe=True)
