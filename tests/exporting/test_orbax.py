"""An exported Orbax checkpoint is read by Orbax alone, on any number of devices."""

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import imagen_jax
from imagen_jax import stage as stages
from imagen_jax.common.errors import UserError
from imagen_jax.runs import verification


def test_orbax_restores_the_weights_without_a_target(cascade_runs, command):
    out = command(f"--workdir={cascade_runs[1]}", "--format=orbax")
    found = ocp.StandardCheckpointer().restore(out / "params")
    _, expected = stages.load(cascade_runs[1])
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert not any(problem for _, problem in verification.problems(out))
    with pytest.raises(UserError, match=r"is exported as 'orbax', which other programs load"):
        imagen_jax.load(out)
