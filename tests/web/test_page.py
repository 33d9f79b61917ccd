"""The drawing page in a browser: it draws, shows verdicts, stops, repaints, and fits a phone."""

import base64
import io
import threading

import browser
import numpy as np
import pytest
import uvicorn
from conftest import FakeEncoder
from PIL import Image

from imagen_jax.common import network
from imagen_jax.pipeline import cascade
from imagen_jax.web import server
from imagen_jax.web.drawing import Model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not browser.PATH, reason="no Chromium on this machine"),
]


@pytest.fixture(scope="module")
def pipe(cascade_runs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cascade, "load_encoder", lambda *args: FakeEncoder())
        yield cascade.load(cascade_runs[0])


@pytest.fixture
def page(pipe, tmp_path):
    """A browser with the page open."""
    model = Model(
        pipe, "tiny", (), lambda: ["<b>one</b>"], lambda *_: [("<i>x</i>", True), ("y", False)]
    )
    bound = network.listen("127.0.0.1", 0)
    served = uvicorn.Server(uvicorn.Config(server.make_app(model), log_config=None, lifespan="off"))
    thread = threading.Thread(target=served.run, kwargs={"sockets": [bound]})
    thread.start()
    with browser.Browser(tmp_path / "profile", 390, 844) as tab:
        tab.open(f"http://127.0.0.1:{bound.getsockname()[1]}/")
        tab.wait("model")
        yield tab
        assert not tab.errors
    served.should_exit = True
    thread.join(20)


def pixels(tab):
    url = tab.run("document.getElementById('save').href")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


def draw(tab):
    tab.run("document.getElementById('go').click()")
    tab.wait("document.getElementById('status').textContent.startsWith('Drawn in')")


def test_the_page_draws_repaints_and_stops(page, pipe):
    page.run("document.querySelector('[name=steps]').value = 3")
    assert page.run("document.getElementById('prompt').value") == "<b>one</b>"
    page.run("document.getElementById('prompt').value = 'a red circle'")
    page.run("document.getElementById('seed').value = 7")
    draw(page)
    [expected] = pipe("a red circle", seed=7, steps=3, progress=False)
    before = pixels(page)
    np.testing.assert_array_equal(before, np.asarray(expected))
    claims = "[...document.querySelectorAll('#claims li')].map(x => [x.textContent, x.className])"
    assert page.run(claims) == [["<i>x</i>", "holds"], ["y", "fails"]]
    assert "--seed=7" in page.run("document.getElementById('command').textContent")

    page.run("document.getElementById('edit').open = true")
    page.wait("!document.getElementById('mask').hidden")
    page.run("document.getElementById('mask').scrollIntoView({block: 'center'})")
    box = page.run(
        "(b => [b.left, b.top, b.width])(document.getElementById('mask').getBoundingClientRect())"
    )
    left, top, width = box
    page.drag(*((left + width * 0.2, top + width * y) for y in (0.3, 0.4, 0.5)))
    page.run("document.getElementById('seed').value = 8")
    draw(page)
    after = pixels(page)
    np.testing.assert_array_equal(after[:, 20:], before[:, 20:])
    assert not np.array_equal(after[:, :12], before[:, :12])

    page.run("document.querySelector('[name=steps]').value = 1000")
    page.run("document.getElementById('edit').open = false")
    page.run("document.getElementById('go').click()")
    page.wait("/evaluation/.test(document.getElementById('status').textContent)")
    page.run("document.getElementById('stop').click()")
    page.wait("document.getElementById('status').textContent == 'Stopped.'")
    page.run("document.querySelector('[name=steps]').value = 3")
    draw(page)


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_its_screen(page, width):
    page.resize(width, 844)
    page.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.run("document.documentElement.scrollWidth") <= width
