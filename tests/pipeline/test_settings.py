"""Settings are checked against the stages, and each error names its setting on one line."""

import numpy as np
import pytest
from conftest import load_config, shrink, shrink_sr

from imagen_jax.config import parse
from imagen_jax.pipeline.settings import SettingError, Settings, samplers


@pytest.fixture(scope="module")
def configs():
    base, sr = shrink(load_config("demo", "unet")), shrink_sr(load_config("sr256", "tiny"))
    return [parse(base), parse(sr)]


def test_a_setting_applies_to_all_stages_or_to_each(configs):
    one, both = Settings(steps=5, guidance=3), Settings(steps=(5, 7), guidance=["3", "1.5"])
    assert [(s.num_steps, s.guidance_weight) for s in samplers(one, configs)] == [(5, 3), (5, 3)]
    assert [(s.num_steps, s.guidance_weight) for s in samplers(both, configs)] == [(5, 3), (7, 1.5)]


def test_without_settings_the_stages_sample_as_their_configs_say(configs):
    assert samplers(Settings(), configs) == [c.sampling for c in configs]


def test_strength_applies_to_the_first_stage_and_resample_to_all(configs):
    image = np.zeros((8, 8, 3), np.uint8)
    found = samplers(Settings(image=image, strength=0.5), configs)
    assert [s.strength for s in found] == [0.5, 1]
    found = samplers(Settings(image=image, mask=image), configs)
    assert [s.resample for s in found] == [4, 4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num": 0}, "num is 0; allowed: a whole number from 1"),
        ({"seed": -1}, "seed is -1; allowed: a whole number from 0 to 4294967295"),
        ({"seed": 2**32 - 1, "num": 2}, "seed is 4294967295 and num is 2; the last seed is"),
        ({"to_seed": 0.5}, "to_seed is 0.5; allowed: a whole number"),
        ({"batch_size": "8"}, "batch_size is '8'; allowed: a whole number from 1"),
        ({"steps": 0}, "steps is 0; allowed: 1 or more"),
        ({"steps": 2.5}, "steps is 2.5; it must be of type int"),
        ({"sampler": "euler"}, "sampler is 'euler'; allowed: "),
        ({"guidance": "much"}, "guidance is 'much'; it must be of type float"),
        ({"guidance": [1, 2, 3]}, "guidance has 3 values; allowed: 1, or one per stage (2)"),
        ({"guidance": [1, -1]}, "guidance is -1.0; allowed: 0 or more"),
        ({"guidance_interval": 3, "guidance": 2}, "guidance_interval is (3.0,); allowed: (low, hi"),
        ({"guidance_interval": (-3, 3), "guidance": 1}, "guidance_interval=-3,3 needs guidance"),
        ({"mask": np.zeros((8, 8), bool)}, "mask (an image) needs an image, and a base model"),
        ({"strength": 0.5}, "strength=0.5 needs an image, no mask, and a base model"),
    ],
)
def test_a_wrong_setting_is_a_one_line_error_that_starts_with_its_name(configs, settings, message):
    with pytest.raises(SettingError) as e:
        samplers(Settings(**settings), configs)
    assert str(e.value).startswith(message) and "\n" not in str(e.value)
