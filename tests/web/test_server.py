"""The drawing page's server: pictures, the line, stopping, and who may ask."""

import base64
import http.client
import io
import itertools
import json
import threading
import types

import anyio
import numpy as np
import pytest
import uvicorn
from conftest import FakeEncoder
from PIL import Image
from starlette.testclient import TestClient

from imagen_jax import demo
from imagen_jax.common import network
from imagen_jax.common.errors import UserError
from imagen_jax.pipeline import cascade
from imagen_jax.web import drawing, server
from imagen_jax.web.drawing import Model

STAGES = [
    {"steps": 3, "guidance": 2, "sampler": "dpmpp_2m", "threshold": "dynamic"},
    {"steps": 2, "guidance": 1, "sampler": "ddim", "threshold": "static"},
]
REQUEST = {"prompt": "a red circle", "seed": 5, "stages": STAGES}


@pytest.fixture(scope="module")
def model(cascade_runs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cascade, "load_encoder", lambda *args: FakeEncoder())

        def check(image, prompt):
            return [(f"{prompt} of {image.shape[0]} pixels", False)]

        yield Model(
            cascade.load(*cascade_runs), "tiny", ["--workdir=w"], lambda: ["an example"], check
        )


@pytest.fixture
def client(model):
    return TestClient(server.make_app(model), base_url="http://localhost:7860")


def events(response):
    lines = [m for m in response.text.split("\n\n") if m]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def picture(url):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


def test_a_picture_appears_stage_by_stage_and_equals_that_of_python(client, model, monkeypatch):
    monkeypatch.setattr(drawing, "FRAME_SECONDS", 0)
    response = client.post("/draw", json=REQUEST)
    assert response.headers["content-type"].startswith("text/event-stream")
    *frames, end = events(response)
    assert [(f["stage"], f["done"], f["total"], f["size"]) for f in frames] == [
        (0, 0, 3, 32), (0, 1, 3, 32), (0, 2, 3, 32), (0, 3, 3, 32),
        (1, 0, 2, 64), (1, 1, 2, 64), (1, 2, 2, 64),
    ]  # fmt: skip
    assert frames[0]["image"] is None and frames[1]["eta"] is None and frames[2]["eta"] > 0
    settings = {k: [s[k] for s in STAGES] for k in STAGES[0]}
    small, large = model.pipe(
        "a red circle", seed=5, return_stages=True, progress=False, **settings
    )
    np.testing.assert_array_equal(picture(frames[3]["image"]), np.asarray(small[0]))
    np.testing.assert_array_equal(picture(frames[-1]["image"]), np.asarray(large[0]))
    assert end["claims"] == [["a red circle of 64 pixels", False]] and end["seconds"] > 0
    assert end["command"] == (
        "python -m imagen_jax.sample --workdir=w '--prompts=a red circle' --seed=5 --num=1 "
        "--steps=3,2 --guidance=2,1 --sampler=dpmpp_2m,ddim --threshold=dynamic,static"
    )


def test_the_page_and_what_it_asks_about_the_model(client):
    page = client.get("/")
    assert page.status_code == 200 and "</html>" in page.text
    assert "http://" not in page.text and "https://" not in page.text  # loads nothing from afar
    about = client.get("/model").json()
    assert about["title"] == "tiny" and about["examples"] == ["an example"]
    assert [s["size"] for s in about["stages"]] == [32, 64]
    assert about["stages"][0]["defaults"].keys() == STAGES[0].keys()


@pytest.mark.parametrize(
    ("content", "kind", "status", "words"),
    [
        (json.dumps(REQUEST), "text/plain", 415, "application/json"),
        ("{", "application/json", 400, "not JSON"),
        ("[" * 100_000, "application/json", 400, "not JSON"),
        ("\xff", "application/json", 400, "not JSON"),
        (json.dumps(REQUEST | {"seed": "x"}), "application/json", 400, "seed is x"),
        ('{"prompt": "a", "seed": ' + "9" * 9000 + "}", "application/json", 400, "not JSON"),
        (
            json.dumps(REQUEST | {"mask": "data:image/png;base64,AAAA"}),
            "application/json", 400, "mask is not a readable image",
        ),
    ],
)  # fmt: skip
def test_bad_requests_are_refused(client, content, kind, status, words):
    response = client.post("/draw", content=content, headers={"Content-Type": kind})
    assert response.status_code == status and words in response.json()["error"]


def test_a_large_request_is_refused(client, monkeypatch):
    monkeypatch.setattr(server, "MAX_BODY", 2**20)
    response = client.post(
        "/draw", content=b" " * (2**20 + 1), headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 400 and "larger than 1 MB" in response.json()["error"]


def test_a_name_of_another_site_is_refused_on_loopback_only(model):
    headers = {"Host": "evil.example"}
    local = TestClient(server.make_app(model), base_url="http://127.0.0.1")
    assert local.get("/", headers=headers).status_code == 400
    everywhere = TestClient(server.make_app(model, "0.0.0.0"), base_url="http://127.0.0.1")
    assert everywhere.get("/", headers=headers).status_code == 200


@pytest.fixture
def slow_server(monkeypatch):
    """The port of a real server whose "slow" pictures never end, and the prompts it began."""
    began, over = [], threading.Event()

    def slow_events(model, stepper, wanted, job):
        began.append(wanted.prompt)
        for i in itertools.count() if wanted.prompt == "slow" else range(2):
            yield {"i": i}
            if over.wait(0.02):
                return

    def prepare(model, body):
        return types.SimpleNamespace(prompt=json.loads(body)["prompt"]), None

    monkeypatch.setattr(server, "_prepare", prepare)
    monkeypatch.setattr(drawing, "events", slow_events)
    model = Model(cascade.Cascade([]), "no network")
    bound = network.listen("127.0.0.1", 0)
    served = uvicorn.Server(uvicorn.Config(server.make_app(model), log_config=None, lifespan="off"))
    thread = threading.Thread(target=served.run, kwargs={"sockets": [bound]})
    thread.start()
    yield bound.getsockname()[1], began
    over.set()
    served.should_exit = True
    thread.join(60)
    assert not thread.is_alive()


def post(port, prompt):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/draw", json.dumps(REQUEST | {"prompt": prompt}), headers)
    return connection, connection.getresponse()


def test_pictures_wait_in_line_and_closing_the_connection_stops_one(slow_server):
    port, began = slow_server
    first, response = post(port, "slow")
    assert response.fp.readline() == b"10\r\n"  # the length of a chunk
    assert b'{"i": 0}' in response.fp.readline()
    second, waiting = post(port, "quick")
    waiting.fp.readline()
    assert waiting.fp.readline().strip() == b'data: {"ahead": 1}'
    assert began == ["slow"]
    response.close()
    first.close()
    # The second picture would never begin if the first went on.
    assert any(b'{"i": 1}' in line for line in iter(waiting.fp.readline, b""))
    assert began == ["slow", "quick"]
    second.close()


def test_a_failure_is_an_event_and_the_line_moves_on(model, monkeypatch):
    def failing(model, stepper, wanted, job):
        yield {"i": 0}
        raise UserError("no luck") if wanted.seed_is_odd else RuntimeError("secret")

    odd = types.SimpleNamespace(seed_is_odd=True)
    line = []

    async def collect(events):
        picture, sent = server.Picture(line, events), []

        async def receive():
            await anyio.sleep_forever()

        async def send(message):
            sent.append(message.get("body", b""))

        await picture({"type": "http"}, receive, send)
        return b"".join(sent).decode()

    assert 'data: {"error": "no luck"}' in anyio.run(collect, failing(0, 0, odd, 0))
    odd.seed_is_odd = False
    text = anyio.run(collect, failing(0, 0, odd, 0))
    assert "the terminal of the server says why" in text and "secret" not in text
    assert not line


def test_a_full_line_is_refused(model, monkeypatch):
    monkeypatch.setattr(server, "MAX_WAITING", 0)
    client = TestClient(server.make_app(model), base_url="http://localhost")
    response = client.post("/draw", json=REQUEST)
    assert response.status_code == 503 and "try again later" in response.json()["error"]


def test_the_command_checks_its_workdir_first(tmp_path, monkeypatch):
    flags = types.SimpleNamespace(
        workdir=[str(tmp_path)], step=None, host="127.0.0.1", port=0, compilation_cache=""
    )
    monkeypatch.setattr(demo, "FLAGS", flags)
    with pytest.raises(UserError, match="holds no run"):
        demo.main([])


def test_a_scenes_model_offers_held_out_captions_and_checks_what_it_can_parse(model):
    opened = demo.open_model([stage.name for stage in model.pipe.stages], None)
    prompts, check = opened.examples(), opened.check
    blank = np.full((64, 64, 3), 250, np.uint8)
    assert check(blank, "a red circle on a white background") == [
        ("a red circle", False), ("the background is white", True)
    ]  # fmt: skip
    assert check(blank, "a photo of a dog") is None
    assert all(check(blank, prompt) for prompt in prompts)
