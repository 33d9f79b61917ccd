"""Config values that are derived from several keys."""

import dataclasses

import pytest
from conftest import load_config

from imagen_jax.config import parse


@pytest.mark.parametrize(
    ("prediction", "weighting", "label"),
    [
        ("eps", "eps", "loss (eps-MSE; the network predicts eps)"),
        ("x", "x", "loss (x-MSE; the network predicts x)"),
        ("v", "min_snr", "loss (MSE, min_snr weighting; the network predicts v)"),
    ],
)
def test_the_loss_axis_names_the_weighting_and_the_prediction(prediction, weighting, label):
    config = parse(load_config("base64", "tiny"))
    changes = {"prediction": prediction, "weighting": weighting}
    config = dataclasses.replace(config, diffusion=dataclasses.replace(config.diffusion, **changes))
    assert config.loss_label == label
