"""Rewritten captions join the old ones, from a function or from an endpoint of OpenAI's kind."""

import base64
import io
import json
import sys
import types
from http.server import BaseHTTPRequestHandler

import pytest
from making import DATE, files, ingest, manifest, rows, write_tars
from PIL import Image
from serving import serving

from data_pipelines.ingestion import recaptioning, rewriters
from data_pipelines.records import prepared
from imagen_jax.common import endpoint
from imagen_jax.common.errors import UserError


def shout(images, captions):
    assert all(image.mode == "RGB" for image in images)
    return ["" if caption.endswith("3") else caption.upper() for caption in captions]


def make(data_dir, rewrite, **changes):
    fields = {"task": "folder", "name": "loud", "source": "rewritten", "batch_size": 3}
    return recaptioning.Job(
        **{**fields, "data_dir": str(data_dir), "rewrite": rewrite, "date": DATE, **changes},
        settings={"model": "shout"},
    )


@pytest.fixture
def data_dir(tmp_path):
    write_tars(tmp_path / "tars", 1, 10)
    ingest(tmp_path, tmp_path / "tars", shard_size=4)
    return tmp_path


def test_both_captions_are_kept_by_name(data_dir):
    folder = recaptioning.run(make(data_dir, shout))
    before, after = rows(data_dir / "folder/1.0.0"), rows(folder)
    assert before.keys() == after.keys()
    for name, row in after.items():
        caption = before[name]["caption"]
        more = [] if caption.endswith(b"3") else [caption.upper()]
        assert row["caption"] == caption and row["captions"].tolist() == [caption, *more]
        assert row["caption_sources"].tolist() == [b"caption", b"rewritten"][: 1 + len(more)]
        assert (row["image"] == before[name]["image"]).all()
    fields = manifest(folder)
    assert fields["counts"]["recaption"] == {"no rewritten caption": 1, "rewritten": 9}
    assert fields["captions"]["sources"] == {"caption": 10, "rewritten": 9}
    names = prepared.caption_sources(str(data_dir), "loud")
    assert names == {"caption": 10, "rewritten": 9}
    assert prepared.caption_sources(str(data_dir), "folder") == {}
    assert fields["sources"][0]["sha256"] == manifest(data_dir / "folder/1.0.0")["digest"]
    card = (folder / "card.md").read_text()
    assert "## Sources" in card and "| picture number 0 | PICTURE NUMBER 0 |" in card
    assert (folder / "card.html").read_text().count("</html>") == 1
    # Once more: the names of earlier captions stay.
    folder = recaptioning.run(make(data_dir, shout, task="loud", name="louder", source="again"))
    row = rows(folder)["00000/000000001"]
    assert row["caption_sources"].tolist() == [b"caption", b"rewritten", b"again"]


def test_an_interrupted_run_is_finished_by_the_same_command(data_dir):
    calls = []

    def fails(images, captions):
        calls.append(captions)
        if len(calls) == 4:
            raise UserError("down")
        return shout(images, captions)

    with pytest.raises(UserError, match="down"):
        recaptioning.run(make(data_dir, fails, batch_size=2))
    with pytest.raises(UserError, match="'loud' is unfinished"):
        prepared.find(str(data_dir), "loud")
    with pytest.raises(UserError, match=r"was begun with model=shout \(now other\)"):
        recaptioning.run(make(data_dir, shout)._replace(settings={"model": "other"}))
    again = recaptioning.run(make(data_dir, fails, batch_size=2))
    assert len(calls) == 4 + 3  # of five batches, the first shard's two are not done again
    whole = recaptioning.run(make(data_dir, shout, name="other"))
    names = lambda folder: {k: v["captions"].tolist() for k, v in rows(folder).items()}  # noqa: E731
    assert names(again) == names(whole)
    with pytest.raises(UserError, match="exists; choose another --name"):
        recaptioning.run(make(data_dir, shout))
    assert not any(name.startswith(prepared.WORK) for name in files(again))


class Stub(BaseHTTPRequestHandler):
    """Answers as OpenAI's API does, but the first request with an error that may pass."""

    def do_POST(self):
        self.server.requests.append(self)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        failing = len(self.server.requests) == 1
        self.send_response(self.server.status if failing else 200)
        self.end_headers()
        text, image = (part for part in body["messages"][0]["content"])
        kind, data = image["image_url"]["url"].split(",")
        assert kind == "data:image/jpeg;base64"
        size = Image.open(io.BytesIO(base64.b64decode(data))).size
        reply = f"{body['model']} {size} {text['text']} {self.headers['Authorization']}"
        content = {"choices": [{"message": {"content": reply}}]}
        self.wfile.write(json.dumps(content if self.server.good else {}).encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(endpoint.time, "sleep", lambda seconds: None)
    with serving(Stub, requests=[], status=503, good=True) as server:
        yield server


def test_an_endpoint_of_openais_kind(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    address = f"http://127.0.0.1:{server.server_port}/v1/"
    rewrite = rewriters.load(address, "tiny", "now: {caption}")
    images = [Image.new("RGB", (16, 20 + i)) for i in range(3)]
    assert rewrite(images, ["a", "b", "c"]) == [
        f"tiny (16, {20 + i}) now: {caption} Bearer secret" for i, caption in enumerate("abc")
    ]
    assert len(server.requests) == 4
    assert server.requests[0].path == "/v1/chat/completions"


@pytest.mark.parametrize(
    ("status", "good", "words", "requests"),
    [(401, True, "HTTP 401 Unauthorized", 1), (200, False, "its reply has no choices: {}", 1)],
)
def test_an_endpoint_that_refuses_is_one_line(server, status, good, words, requests):
    server.status, server.good = status, good
    rewrite = rewriters.load(f"http://127.0.0.1:{server.server_port}", "", "")
    with pytest.raises(UserError) as error:
        rewrite([Image.new("RGB", (8, 8))], ["a"])
    assert words in str(error.value) and "\n" not in str(error.value)
    assert len(server.requests) == requests


def test_a_function_is_found_by_name(monkeypatch):
    module = types.ModuleType("user_model")
    module.shout = shout
    monkeypatch.setitem(sys.modules, "user_model", module)
    assert rewriters.load("user_model:shout", "", "") is shout
    for model in ("user_model:gone", "no_such_module:f", "llava"):
        with pytest.raises(UserError, match="--model"):
            rewriters.load(model, "", "")
