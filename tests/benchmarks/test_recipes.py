"""Recipes as text, and the table over seeds."""

from types import SimpleNamespace

import pytest

from benchmarks.recipes import RECIPES, Point, read_recipes, table
from imagen_jax.common.errors import UserError


def test_the_recipes_share_the_data_and_differ_in_network_and_diffusion():
    configs = read_recipes(list(RECIPES))
    new, paper, *unets = configs.values()
    assert all(config.data == new.data for config in configs.values())
    assert (paper.diffusion.prediction, paper.diffusion.time_sampling) == ("eps", "uniform")
    assert paper.unet == new.unet and paper.optimizer.name == "adam"
    assert all(config.optimizer.schedule == "constant" for config in configs.values())
    assert {type(config.unet).__name__ for config in unets} == {"UNetConfig"}


def test_a_recipe_without_a_config_is_refused():
    with pytest.raises(UserError, match=r"--recipe is 'demo'; it must be 'NAME: CONFIG KEY=VALUE"):
        read_recipes(["demo"])


def test_the_table_adds_up_the_seeds():
    trials = [
        SimpleNamespace(name="a", points=[Point("a", seed, 60.0, 100 + seed, 0.1, right, 10)])
        for seed, right in enumerate((4, 6))
    ]
    assert table(trials).splitlines()[-1] == (
        "| a | 60 | 100 | 0.1000 (0.1000-0.1000) | 50% (30-70%) of 20 |"
    )
