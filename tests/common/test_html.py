"""Pages escape text, embed their images, and load nothing from elsewhere."""

import base64
import io

import numpy as np
from PIL import Image

from imagen_jax.common import html


def test_a_page_escapes_its_title_once_and_its_body_never():
    page = html.page("<a> & b", html.element("p", "1 < 2", "good"))
    assert "<title>&lt;a&gt; &amp; b</title>" in page and "<h1>&lt;a&gt; &amp; b</h1>" in page
    assert '<p class="good">1 &lt; 2</p>' in page
    assert 'name="viewport"' in page and "http" not in page


def test_a_table_escapes_cells_and_may_have_no_header():
    table = html.table(["x", "y"], [["<b>", "1"]])
    assert "<tr><th>x</th><th>y</th></tr><tr><td>&lt;b&gt;</td><td>1</td></tr>" in table
    assert html.table((), [["1"]]).count("<tr>") == 1


def test_an_image_is_embedded(tmp_path):
    path = tmp_path / 'a"b.png'
    path.write_bytes(b"png")
    encoded = base64.b64encode(b"png").decode()
    assert html.image(path) == f'<img alt="a&quot;b" src="data:image/png;base64,{encoded}">'


def decoded(img):
    kind, data = img.partition("data:image/")[2].removesuffix('">').split(";base64,")
    return kind, Image.open(io.BytesIO(base64.b64decode(data)))


def test_a_small_picture_is_embedded_exactly_and_a_large_one_small():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    kind, image = decoded(html.picture(pixels, "a<b"))
    assert kind == "png" and 'alt="a&lt;b" class="pixels"' in html.picture(pixels, "a<b")
    np.testing.assert_array_equal(np.asarray(image), pixels)
    kind, image = decoded(html.picture(Image.new("RGB", (800, 400)), "x", most=200))
    assert kind == "webp" and image.size == (200, 100)


def test_a_slider_starts_at_the_last_picture():
    box = html.slider(["<img 1>", "<img 2>", "<img 3>"])
    assert 'max="2" value="2"' in box and box.count("<img") == 3


def test_an_interval_is_drawn_in_percent():
    bar = html.interval(0.5, 0.25, 0.75)
    assert "left:25.0%;width:50.0%" in bar and "left:50.0%" in bar
