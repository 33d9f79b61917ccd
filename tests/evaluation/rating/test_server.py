"""The rating server: who sees what, what is validated, and several raters at once."""

import json
import threading
import types

import pytest
from ratings import PROMPTS, drawbench_study, write_samples
from starlette.testclient import TestClient

from imagen_jax import rate
from imagen_jax.common import network
from imagen_jax.common.errors import UserError
from imagen_jax.evaluation.rating import server
from imagen_jax.evaluation.rating.store import Store

GIVEN = {"quality": "left", "alignment": "same"}


@pytest.fixture
def store(tmp_path):
    return drawbench_study(tmp_path)


@pytest.fixture
def client(store):
    return client_of(store)


def client_of(store, hosts=("localhost",)):
    return TestClient(server.make_app(store, list(hosts)), base_url="http://localhost")


def link(store, rater=1):
    return f"/r/{store.raters()[rater - 1].token}/"


def post(client, address, position=0, answers=GIVEN, seconds=1.0):
    body = {"position": position, "answers": answers, "seconds": seconds}
    return client.post(f"{address}answer", json=body)


def test_a_rater_reads_trials_and_answers_them(client, store):
    address = link(store)
    assert "</html>" in client.get(address).text
    state = client.get(f"{address}state").json()
    assert [t["answers"] for t in state["trials"]] == [{}] * 4
    assert [q["name"] for q in state["questions"]["pair"]] == ["quality", "alignment"]
    assert post(client, address, 2).json() == {"saved": True}
    assert (
        client_of(Store(store.path)).get(f"{address}state").json()["trials"][2]["answers"] == GIVEN
    )
    name = state["trials"][0]["sides"][0][0]
    for suffix in ("", "-full"):
        picture = client.get(f"{address}picture/{name}{suffix}")
        assert picture.headers["content-type"] == "image/webp"
        assert "immutable" in picture.headers["cache-control"]


def test_no_model_is_named_to_raters(client, store):
    address = link(store)
    state = client.get(f"{address}state")
    names = [n for t in state.json()["trials"] for side in t["sides"] for n in side]
    replies = [client.get(address), state, client.get("/"), client.get("/r/x/")]
    replies += [client.get(f"{address}picture/{name}") for name in names]
    replies.append(post(client, address, answers={}))
    for reply in replies:
        assert b"secretly" not in reply.content and "secretly" not in str(reply.headers)


def test_raters_see_and_change_only_their_own(client, store):
    post(client, link(store, 1))
    assert not any(t["answers"] for t in client.get(f"{link(store, 2)}state").json()["trials"])
    assert {r["rater"] for r in store.ratings()} == {1}


@pytest.mark.parametrize("end", ["", "state", "picture/0123456789abcdef"])
def test_an_unknown_link_opens_nothing(client, store, end):
    assert client.get(f"/r/wrong/{end}").status_code == 404
    assert post(client, "/r/wrong/").status_code == 404
    results = store.settings()["results"]
    assert client.get(f"/r/{results}/{end}").status_code == 404
    assert client.get(f"{link(store).replace('/r/', '/results/')}").status_code == 404


@pytest.mark.parametrize(
    "name",
    [
        "../study.sqlite",
        "..%2Fstudy.sqlite",
        "%2e%2e/study",
        "0123456789abcdef",
        "/etc/passwd",
        "%00",
    ],
)
def test_only_pictures_of_the_study_are_served(client, store, name):
    assert client.get(f"{link(store)}picture/{name}").status_code == 404


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("{", "not JSON"),
        ("[" * 4000, "not JSON"),
        ("[]", "must be an object with position, answers and seconds"),
        ({"position": 0, "answers": GIVEN, "seconds": 1, "rater": 2}, "must be an object with"),
        ({"position": True, "answers": GIVEN, "seconds": 1}, "position is True"),
        ({"position": -1, "answers": GIVEN, "seconds": 1}, "position is -1"),
        ({"position": 99, "answers": GIVEN, "seconds": 1}, "there is no such trial"),
        ({"position": 0, "answers": {"quality": "left"}, "seconds": 1}, "answers must be to"),
        ({"position": 0, "answers": ["left"], "seconds": 1}, "must be an object of strings"),
        ({"position": 0, "answers": GIVEN | {"quality": "x"}, "seconds": 1}, "quality is 'x'"),
        ({"position": 0, "answers": GIVEN, "seconds": -1}, "seconds is -1"),
        ('{"position": 0, "answers": {}, "seconds": NaN}', "seconds is nan"),
    ],
)
def test_bad_requests_are_refused(client, store, body, words):
    content = body if isinstance(body, str) else json.dumps(body)
    response = client.post(f"{link(store)}answer", content=content)
    assert response.status_code == 400 and words in response.json()["error"]
    assert not store.ratings()


def test_a_large_request_is_refused(client, store):
    assert client.post(f"{link(store)}answer", content="x" * 5000).status_code == 413
    assert client.post(f"{link(store)}answer", content=iter([b"{}"])).status_code == 413


def test_the_results_have_a_link_of_their_own(client, store):
    post(client, link(store))
    address = f"/results/{store.settings()['results']}/"
    assert "secretly-good" in client.get(address).text
    assert client.get(f"{address}answers.csv").text.count("\n") == 3


def test_a_foreign_host_name_is_refused(store):
    client = client_of(store, [*network.allowed_hosts("127.0.0.1"), "rate.example"])
    for host, status in (("evil.example", 400), ("rate.example", 200), ("localhost:99", 200)):
        assert client.get(link(store), headers={"Host": host}).status_code == status


def test_eight_browsers_at_once_lose_no_answer(tmp_path):
    store = drawbench_study(tmp_path, raters=8)
    app, replies = server.make_app(store, ["*"]), []

    def rater(number):
        client = TestClient(app)
        for position in range(4):
            replies.append(post(client, link(store, number), position).status_code)

    threads = [threading.Thread(target=rater, args=(i,)) for i in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert replies == [200] * 32 and len(store.ratings()) == 64


def flags_for(monkeypatch, **changes):
    """Sets the command's flags: its defaults, and `changes`."""
    values = {
        "study": "study", "protocol": None, "a": None, "b": None, "model": [], "references": None,
        "categories": None, "samples": 8, "pairs": 200, "seed": 0, "raters": None, "batches": 1,
        "results": False, "csv": None, "margin": 0.05, "host": "127.0.0.1", "port": 0,
        "public_url": None,
    }  # fmt: skip
    monkeypatch.setattr(rate, "FLAGS", types.SimpleNamespace(**values | changes))


def test_the_command_starts_goes_on_and_prints_results(tmp_path, monkeypatch, capsys):
    a, b = (str(write_samples(tmp_path / n)) for n in ("x", "y"))
    served = []
    monkeypatch.setattr(server, "serve", lambda app, bound: (served.append(app), bound.close()))
    folder = str(tmp_path / "study")
    flags_for(monkeypatch, a=a, b=b, protocol="drawbench", study=folder, raters=2)
    rate.main([])
    first = capsys.readouterr().out
    assert first.count("/r/") == 2 and "http://127.0.0.1:" in first
    flags_for(monkeypatch, study=folder, raters=3, public_url="https://rate.example/x/")
    rate.main([])
    again = capsys.readouterr().out
    assert again.count("https://rate.example/x/r/") == 3 and "rater 3 (0 of 4)" in again
    tokens = [line.split("/r/")[1] for line in first.splitlines() if "/r/" in line]
    assert all(token in again for token in tokens)
    flags_for(monkeypatch, study=folder, a=a, b=a + "/../y/../x2")
    with pytest.raises(UserError, match=r"has models .*; name another folder"):
        rate.main([])
    post(TestClient(served[0], base_url="http://localhost"), f"/r/{tokens[0]}")
    flags_for(monkeypatch, study=folder, results=True, csv=str(tmp_path / "answers.csv"))
    rate.main([])
    assert "1 of 3 raters have started" in capsys.readouterr().out
    assert (tmp_path / "answers.csv").read_text().count("\n") == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "holds no study; start one with --a=DIRECTORY"),
        ({"results": True}, "holds no study"),
        ({"csv": "x.csv"}, "--csv=x.csv needs --results"),
        ({"a": "x", "model": ["m=x"]}, "--model is in place of --a and --b"),
        ({"model": ["x"]}, "--model is 'x'; it must be NAME=DIRECTORY"),
        ({"a": "x", "b": "x"}, "--a and --b are both x"),
        ({"a": "no", "b": "none", "protocol": "drawbench"}, "--a=no is not a folder"),
        (
            {"a": "x", "protocol": "drawbench", "references": "r"},
            "--references is for --protocol=coco",
        ),
        ({"public_url": "rate.example"}, "--public_url is 'rate.example'; it must be like"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, changes, words):
    monkeypatch.chdir(tmp_path)
    flags_for(monkeypatch, **changes)
    with pytest.raises(UserError) as e:
        rate.main([])
    assert words in str(e.value) and "\n" not in str(e.value)
    assert not list(tmp_path.iterdir())


def test_a_port_in_use_is_reported_before_pictures_are_copied(tmp_path, monkeypatch):
    a, b = (str(write_samples(tmp_path / n, PROMPTS[:1])) for n in ("x", "y"))
    bound = network.listen("127.0.0.1", 0)
    port = bound.getsockname()[1]
    folder = tmp_path / "study"
    flags_for(monkeypatch, a=a, b=b, protocol="drawbench", study=str(folder), port=port)
    with pytest.raises(UserError, match=f"--port is {port}, which is in use"):
        rate.main([])
    bound.close()
    assert not folder.exists()
