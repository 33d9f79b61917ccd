"""Every start writes down what it ran with, and says what has changed."""

import dataclasses
import json

from conftest import load_config, shrink

from imagen_jax.common.version import code_version
from imagen_jax.config import parse
from imagen_jax.runs import starts


def lines(workdir):
    return [json.loads(line) for line in (workdir / "starts.jsonl").read_text().splitlines()]


def test_a_start_names_versions_commit_devices_seed_and_config(tmp_path):
    config = parse(shrink(load_config("demo", "unet")))
    starts.record(tmp_path, config, 0)
    (line,) = lines(tmp_path)
    assert line["versions"]["jax"] and line["versions"]["imagen_jax"] == code_version()
    assert line["devices"] == {"count": 8, "kind": "cpu", "processes": 1}
    assert line["seed"] == config.seed and line["changes"] == {}
    assert parse(line["config"]) == parse(json.loads(json.dumps(dataclasses.asdict(config))))


def test_the_next_start_logs_what_differs(tmp_path, caplog):
    config = parse(shrink(load_config("demo", "unet")))
    starts.record(tmp_path, config, 0)
    with (tmp_path / "starts.jsonl").open("a") as file:
        file.write('{"time": "2026')  # a crash within a line
    model = {**config.model, "channel_mult": (1, 1)}
    with caplog.at_level("INFO", logger="imagen_jax"):
        starts.record(tmp_path, dataclasses.replace(config, num_steps=7, model=model), 40)
    last = json.loads((tmp_path / "starts.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 40
    assert last["changes"] == {
        "config.model.channel_mult": [[1, 2], [1, 1]],
        "config.num_steps": [100, 7],
    }
    assert "changed since the last start: config.num_steps was 100, is 7" in caplog.text
    caplog.clear()
    starts.record(tmp_path, dataclasses.replace(config, num_steps=7, model=model), 41)
    assert "changed" not in caplog.text
