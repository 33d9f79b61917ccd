"""A profile holds exactly the steps of --profile_steps; a bad value is a one-line error."""

import jax
import jax.numpy as jnp
import pytest

from imagen_jax.common.errors import UserError
from imagen_jax.training.profiling import Profile, parse_steps


def test_both_ends_of_profile_steps_are_included():
    assert parse_steps("", 20) == range(0)
    assert list(parse_steps("10:13", 20)) == [10, 11, 12, 13]
    assert list(parse_steps("20:20", 20)) == [20]


@pytest.mark.parametrize(
    "text", ["13", "13:10", "0:3", "10:21", "a:b", "1:2:3", "-1:2", " 1:2", "1:"]
)
def test_bad_steps_give_a_one_line_error(text):
    with pytest.raises(UserError, match=r"profile_steps is .* steps from 1 to 20 \(config"):
        parse_steps(text, 20)


def run(profile, first, last):
    """Runs steps `first` to `last` and calls the profile as the training loop does."""
    step = jax.jit(lambda x: x @ x)
    x = jnp.ones((8, 8))
    for i in range(first, last + 1):
        if profile.starts(i):
            profile.start(x)
        with jax.profiler.StepTraceAnnotation("train", step_num=i):
            x = step(x)
        if profile.ends(i):
            profile.stop(i, x)
    profile.close()


def traced(folder):
    """Returns the numbers of the steps in the only trace of a folder."""
    (path,) = folder.glob("plugins/profile/*/*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(path)).planes
    events = (e for plane in planes for line in plane.lines for e in line.events)
    return sorted(dict(e.stats)["step_num"] for e in events if e.name == "train")


def test_a_trace_holds_its_steps_where_tensorboard_looks(tmp_path):
    run(Profile(range(2, 5), tmp_path), 1, 6)
    assert traced(tmp_path) == [2, 3, 4]
    assert [p.name for p in tmp_path.iterdir()] == ["plugins"]
    assert (tmp_path / "plugins" / "profile" / "steps_2_to_4").is_dir()


def test_a_resumed_run_traces_the_remaining_steps(tmp_path):
    run(Profile(range(2, 5), tmp_path), 4, 6)
    assert traced(tmp_path) == [4]


def test_a_run_that_stops_early_keeps_its_trace(tmp_path):
    run(Profile(range(2, 5), tmp_path), 1, 3)
    assert traced(tmp_path) == [2, 3]


def test_without_profile_steps_nothing_is_written(tmp_path):
    run(Profile(range(0), tmp_path), 1, 3)
    assert not list(tmp_path.iterdir())
