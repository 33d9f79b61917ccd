"""Config values that are derived from several keys."""

import dataclasses

import pytest
from conftest import load_config

from imagen_jax.common.errors import UserError
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


def test_the_low_resolution_skip_needs_a_network_that_predicts_x():
    config = load_config("demo_sr")
    config.model.low_res_skip = True
    assert parse(config).unet.low_res_skip
    config.diffusion.prediction = "eps"
    config.diffusion.weighting = "eps"
    with pytest.raises(UserError, match="False unless"):
        parse(config).unet  # noqa: B018
