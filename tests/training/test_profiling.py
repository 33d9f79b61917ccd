"""A profile holds the steps that were asked for, whole, and bad requests are one line."""

import jax
import jax.numpy as jnp
import pytest

from imagen_jax.common.errors import UserError
from imagen_jax.training.profiling import Profile, parse_steps


def test_steps_are_both_included():
    assert parse_steps("", 20) == range(0)
    assert list(parse_steps("10:13", 20)) == [10, 11, 12, 13]
    assert list(parse_steps("20:20", 20)) == [20]


@pytest.mark.parametrize(
    "text", ["13", "13:10", "0:3", "10:21", "a:b", "1:2:3", "-1:2", " 1:2", "1:"]
)
def test_bad_steps_are_one_line(text):
    with pytest.raises(UserError, match=r"profile_steps is .* steps from 1 to 20 \(config"):
        parse_steps(text, 20)


def run(profile, first, last):
    """The loop's use of a profile, from step `first` on; what was traced."""
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
    """The numbers of the steps in the one trace that a folder holds."""
    (path,) = folder.glob("plugins/profile/*/*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(path)).planes
    events = (e for plane in planes for line in plane.lines for e in line.events)
    return sorted(dict(e.stats)["step_num"] for e in events if e.name == "train")


def test_a_trace_holds_these_steps_and_is_where_tensorboard_looks(tmp_path):
    run(Profile(range(2, 5), tmp_path), 1, 6)
    assert traced(tmp_path) == [2, 3, 4]
    assert [p.name for p in tmp_path.iterdir()] == ["plugins"]
    assert (tmp_path / "plugins" / "profile" / "steps_2_to_4").is_dir()


def test_a_resumed_run_traces_what_is_left(tmp_path):
    run(Profile(range(2, 5), tmp_path), 4, 6)
    assert traced(tmp_path) == [4]


def test_a_run_that_stops_early_keeps_its_trace(tmp_path):
    run(Profile(range(2, 5), tmp_path), 1, 3)
    assert traced(tmp_path) == [2, 3]


def test_without_steps_nothing_is_written(tmp_path):
    run(Profile(range(0), tmp_path), 1, 3)
    assert not list(tmp_path.iterdir())
