"""What a run starts from, and goes back to after training has diverged."""

from __future__ import annotations

from typing import Any

from imagen_jax.common.cli import log
from imagen_jax.runs import warm_start
from imagen_jax.runs.checkpoint import Checkpoints
from imagen_jax.runs.local_checkpoints import LocalCheckpoints
from imagen_jax.training.experiment import Experiment
from imagen_jax.training.metrics import MetricLogger
from imagen_jax.training.periodic import Actions
from imagen_jax.training.step import TrainState


def start_or_resume(
    experiment: Experiment, checkpoints: Checkpoints, local: LocalCheckpoints | None = None
) -> tuple[TrainState, dict[str, Any]]:
    """Returns the state and the data position to start from. The first that exists wins:

    1. the newest local checkpoint that is whole on all hosts, if no checkpoint of this workdir is
       newer and training goes on after it, and its data position;
    2. the newest checkpoint of this workdir that is not damaged, and its data position;
    3. the weights of config.init, and the first example;
    4. random weights, and the first example.
    """
    config, shapes = experiment.config, experiment.abstract_state
    newer = range(max(checkpoints.steps(), default=1), config.num_steps)
    source: Checkpoints | LocalCheckpoints
    if local and (step := local.newest_whole(shapes, newer)):
        source = local
    else:
        source, step = checkpoints, checkpoints.newest_whole()
    if step is None:
        return initial_state(experiment), {"examples": 0}
    state, position = source.restore(shapes, config.identity, step)
    log.info("resuming from step %d in %s", int(state.step), source.directory)
    return state, position


def initial_state(experiment: Experiment) -> TrainState:
    """Returns the state at step 0, with the weights of config.init as far as they fit."""
    state = experiment.init()
    if not experiment.config.init.workdir:
        return state
    return experiment.start_from(warm_start.load(experiment.config, state.params))


def go_back(
    experiment: Experiment,
    checkpoints: Checkpoints,
    local: LocalCheckpoints,
    logger: MetricLogger,
    actions: Actions,
    step: int,
) -> tuple[TrainState, int]:
    """Returns the state to start from, and its step, after training has diverged at `step`.

    The data go on after those of `step`. A run that is killed after this repeats it.

    Raises:
      RunError: the run has gone back to this checkpoint too often.
    """
    checkpoints.wait()
    state, position = start_or_resume(experiment, checkpoints)
    start = int(state.step)
    local.discard_after(start)
    count = actions.guard.go_back(step, start)
    actions.offset += (step - start) * experiment.config.batch_size
    logger.resume_at(start, position.get("window", ()))
    logger.write(start + 1, {"rollback/from_step": step, "rollback/count": count})
    return state, start
