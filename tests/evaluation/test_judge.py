"""Questions are asked once and judged as DSG does; words are read; against stubs."""

import base64
import io
import json
import sys
import types
from http.server import BaseHTTPRequestHandler

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from serving import serving

from imagen_jax.common import endpoint
from imagen_jax.common.errors import UserError
from imagen_jax.evaluation import judge, table
from imagen_jax.evaluation.questions import Question, quoted

RED, BLUE = (np.full((16, 16, 3), color, np.uint8) for color in ((200, 0, 0), (0, 0, 200)))


class Stub(BaseHTTPRequestHandler):
    """A vision model that sees whether an image is red, and no more."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text, image = (part for part in body["messages"][0]["content"])
        kind, data = image["image_url"]["url"].split(",")
        assert kind == "data:image/png;base64" and body["model"] == "eye"
        self.server.asked.append(text["text"])
        self.send_response(self.server.status)
        self.end_headers()
        red = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))[0, 0, 0] > 100
        reply = "Yes, it is." if red else "No."
        self.wfile.write(json.dumps({"choices": [{"message": {"content": reply}}]}).encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(endpoint.time, "sleep", lambda seconds: None)
    with serving(Stub, asked=[], status=200) as server:
        yield server


def example(category, *questions):
    return {"id": "0", "caption": "red", "category": category, "questions": questions}


def test_a_judge_answers_once_and_a_wrong_premise_is_wrong(server, tmp_path):
    address, answers = f"http://127.0.0.1:{server.server_port}/v1", tmp_path / "answers.jsonl"
    red, bright = Question("Is it red?"), Question("Is the red bright?", parents=(0,))
    blue = Question("Is it blue?", "no")
    examples = [example("a", red, bright), example("b", red, bright), example("b", blue)]
    images = [RED, BLUE, BLUE]
    found = judge.questions(address, "eye", answers).measure(images, examples)
    assert [(g, row["fully"], row["claims"]) for g, row in found.items()] == [
        ("a", 1, 1), ("b", 0.5, 1 / 3), ("all", 2 / 3, 3 / 5)
    ]  # fmt: skip
    assert found["all"]["scores"] == [1, 0, 1] and found["all"]["num"] == 3
    # The question whose premise is wrong is not asked.
    assert sorted(server.asked) == sorted(
        q.prompt for q in (red, bright, red, blue)
    ) and server.asked[0].endswith("Answer with yes or no.")
    answers.write_text(answers.read_text() + '\n{"cut off')
    again = judge.questions(address, "eye", answers).measure(images, examples)
    assert again == found and len(server.asked) == 4


def test_an_endpoint_that_refuses_is_one_line(server, tmp_path):
    server.status = 401
    metric = judge.questions(f"http://127.0.0.1:{server.server_port}", "eye", tmp_path / "a")
    with pytest.raises(UserError, match=r"--judge=http.*401 Unauthorized\. The answers so far"):
        metric.measure([RED], [example("", Question("Is it red?"))])


@pytest.mark.parametrize(
    ("question", "right", "wrong"),
    [
        (Question("?"), ["yes", "Yes.", "YES, there is no doubt", "I think yes"],
         ["no", "No, yes is wrong", "", "maybe", "it is yes or no"]),
        (Question("?", "no"), ["No.", "There is no cat"], ["yes", "Yes, not no"]),
        (Question("?", "four"), ["4", "Four.", "There are four"], ["14", "five", "forty"]),
        (Question("?", "3", ("1", "2", "3")), ["3", "three", "There are 3."], ["2", "2 or 3", ""]),
        (Question("?", "red", ("red", "dark red")), ["red"], ["dark red", "it is dark red"]),
    ],
)  # fmt: skip
def test_answers_are_judged(question, right, wrong):
    assert [question.is_right(r) for r in right] == [True] * len(right)
    assert [question.is_right(r) for r in wrong] == [False] * len(wrong)


def test_quotes_are_found():
    assert quoted("a sign that says \"Stop it\" and 'Go'") == ["Stop it", "Go"]
    assert quoted("the dog's bone on the cats' mat") == []
    assert quoted("\u201cHello\u201d in an artist\u2019s \u2018own\u2019 hand") == ["Hello", "own"]


def reading(texts, monkeypatch):
    """Replaces rapidocr by a reader that finds these texts."""
    module = types.ModuleType("rapidocr")
    sizes = []
    engine = lambda image: sizes.append(image.shape) or types.SimpleNamespace(txts=texts)  # noqa: E731
    module.RapidOCR = lambda params: engine
    monkeypatch.setitem(sys.modules, "rapidocr", module)
    monkeypatch.setitem(sys.modules, "onnxruntime", types.SimpleNamespace(__version__="1"))
    monkeypatch.setattr("importlib.metadata.version", lambda name: "3")
    return sizes


def test_words_are_read_in_any_case_and_order(monkeypatch):
    sizes = reading(("GO away", "stop"), monkeypatch)
    captions = ('the words "Stop, go" here', 'the word "went" and "go"', "no words")
    examples = [{"caption": c, "category": "Text"} for c in captions]
    found = judge.word_accuracy().measure([RED] * 3, examples)
    assert found["all"]["scores"] == [1, 0] and found["Text"]["claims"] == 3 / 4
    assert sizes == [(512, 512, 3)] * 2
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(UserError, match=r"needs rapidocr: pip install -e '\.\[ocr\]'"):
        judge.word_accuracy()


def test_real_text_recognition_reads_the_word():
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    image = Image.new("RGB", (256, 256), "white")
    ImageDraw.Draw(image).text((40, 90), "Hello", "black", ImageFont.load_default(48))
    examples = [{"caption": f'"{word}"', "category": ""} for word in ("hello", "world")]
    found = judge.word_accuracy().measure([np.asarray(image)] * 2, examples)
    assert found["all"]["scores"] == [1, 0]


def test_metrics_that_do_not_suit_the_prompts_are_one_line(monkeypatch):
    module = types.ModuleType("image_metrics")
    module.NAMES = ("fid",)
    module.metrics = lambda names, folder, reference: dict.fromkeys(names, (folder, reference))
    monkeypatch.setattr(table, "_image_metrics", lambda: module)
    scene, plain = {"scene": "{}", "caption": "x"}, {"caption": "x"}
    assert table.choose([scene], "") == ["alignment"]
    assert table.choose([scene | {"questions": (1,)}], "http") == ["alignment", "questions"]
    with pytest.raises(UserError, match="--metrics is needed: the prompts are no scenes"):
        table.choose([plain | {"questions": (1,)}], "")
    with pytest.raises(UserError, match=r"--metrics has 'fit'; allowed: alignment, .*, fid"):
        table.check_names(["fid", "fit"], "")
    with pytest.raises(UserError, match="which a vision model answers; give its address"):
        table.check_names(["questions"], "")
    for name, words in (
        ("alignment", "the prompts are no scenes"),
        ("word_accuracy", "no prompt quotes"),
    ):
        with pytest.raises(UserError, match=f"--metrics has {name}, but {words}"):
            table.check_suits([name], [plain], "")
    found = table.metrics(["fid", "alignment"], table.Sources(weights="w", reference="r"))
    assert list(found) == ["fid", "alignment"] and found["fid"] == ("w", "r")
