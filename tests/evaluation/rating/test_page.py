"""The rating page in a browser: by keyboard and by touch, back and forth, and on a phone."""

import random
import threading

import browser
import pytest
import uvicorn
from ratings import answer_all, coco_study, drawbench_study, owners_shown, prefers

from imagen_jax.common import network
from imagen_jax.evaluation.rating import results, server
from imagen_jax.evaluation.rating.store import Store

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not browser.PATH, reason="no Chromium on this machine"),
]
QUESTIONS = ("quality", "alignment")


@pytest.fixture
def tab(tmp_path):
    with browser.Browser(tmp_path / "profile") as found:
        yield found
        assert not found.errors


@pytest.fixture
def serve():
    """Returns a function that serves a study and returns the addresses of its raters."""
    running = []

    def start(store):
        bound = network.listen("127.0.0.1", 0)
        app = server.make_app(store, network.allowed_hosts("127.0.0.1"))
        served = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
        thread = threading.Thread(target=served.run, kwargs={"sockets": [bound]})
        thread.start()
        running.append((served, thread))
        return [f"{network.url('127.0.0.1', bound)}/r/{r.token}/" for r in store.raters()]

    yield start
    for served, thread in running:
        served.should_exit = True
        thread.join(20)


def open_trial(tab, address):
    tab.open(address)
    tab.wait("study")
    tab.run("document.querySelector('#text button').click()")
    tab.wait("at >= 0")


def press(tab, key):
    tab.run(f"document.dispatchEvent(new KeyboardEvent('keydown', {{key: '{key}'}}))")


def test_raters_by_keyboard_are_measured(tab, serve, tmp_path):
    """One rater answers in the browser, 24 others in threads; the interval holds their preference.

    All prefer one model with a probability of 0.75, and are indifferent never.
    """
    store = drawbench_study(tmp_path, raters=25)
    addresses, shown, rng = serve(store), owners_shown(store)[1], random.Random(5)
    open_trial(tab, addresses[0])
    given = []
    for position in range(4):
        tab.wait(f"at == {position} && !moving")
        tab.wait("[...document.querySelectorAll('.set img')].every(i => i.complete)")
        assert tab.run("document.querySelectorAll('.set img').length") == 16
        assert "secretly" not in tab.run("document.documentElement.outerHTML")
        for _ in QUESTIONS:
            side = (shown[position][0][0] == "secretly-good") == (rng.random() < 0.75)
            given.append("left" if side else "right")
            press(tab, "1" if side else "3")
    tab.wait("document.getElementById('closing')?.textContent.startsWith('Everything is saved')")
    stored = [t["answers"][q] for t in store.tasks(1) for q in QUESTIONS]
    assert stored == given
    others = [
        threading.Thread(
            target=answer_all, args=(Store(store.path), r, prefers("secretly-good", 0.75, seed=r))
        )
        for r in range(2, 26)
    ]
    for thread in others:
        thread.start()
    for thread in others:
        thread.join()
    for table in results.analyze(store).tables:
        good, _, bad = table.rows[0].rates
        assert good.low < 0.75 < good.high and bad.low < 0.25 < bad.high
        assert table.rows[0].raters == 25 and table.rows[0].answers == 100


def test_a_rater_goes_back_changes_an_answer_and_comes_back_later(tab, serve, tmp_path):
    store = drawbench_study(tmp_path)
    [address, _] = serve(store)
    open_trial(tab, address)
    press(tab, "2"), press(tab, "2")
    tab.wait("at == 1 && !moving")
    press(tab, "ArrowLeft")
    tab.wait("at == 0")
    press(tab, "3")  # changes the first question only, and stays
    tab.wait("!unsaved.length && !saving")
    assert tab.run("at") == 0
    assert store.tasks(1)[0]["answers"] == {"quality": "right", "alignment": "same"}
    press(tab, "ArrowRight")
    tab.wait("at == 1")
    tab.open(address)
    tab.wait("study")
    assert "3 to go" in tab.run("document.getElementById('text').textContent")
    tab.run("document.querySelector('#text button').click()")
    assert tab.run("at") == 1


def test_an_answer_waits_until_the_server_is_back(tab, serve, tmp_path):
    store = drawbench_study(tmp_path)
    [address, _] = serve(store)
    open_trial(tab, address)
    tab.call("Network.enable")
    offline = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    tab.call("Network.emulateNetworkConditions", offline=True, **offline)
    press(tab, "1"), press(tab, "1")
    tab.wait("document.getElementById('error').textContent.includes('sent again')")
    assert not store.ratings()
    tab.call("Network.emulateNetworkConditions", offline=False, **offline)
    tab.wait("!unsaved.length && !saving")
    assert len(store.ratings()) == 2 and not tab.run("document.getElementById('error').textContent")


@pytest.mark.parametrize("make", [drawbench_study, coco_study])
@pytest.mark.parametrize("size", [(360, 740), (1280, 900)])
def test_the_page_fits_its_screen(tab, serve, tmp_path, make, size):
    """Nothing scrolls sideways, and the answers are in view without scrolling."""
    tab.resize(*size)
    store = make(tmp_path)
    for address in serve(store):
        open_trial(tab, address)
        tab.wait("[...document.querySelectorAll('.set img')].every(i => i.complete)")
        assert tab.run("document.documentElement.scrollWidth") <= size[0]
        bottom = "document.querySelector('footer').getBoundingClientRect().bottom"
        assert tab.run(bottom) <= size[1] + 1
        tab.run("document.querySelector('.set button').click()")
        tab.wait("document.querySelector('dialog img').naturalWidth > 0")
        assert tab.run("document.querySelector('dialog').open")
        tab.run("document.querySelector('dialog').click()")
        assert not tab.run("document.querySelector('dialog').open")
