"""Pages escape text, embed their images, and load nothing from elsewhere."""

import base64

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
