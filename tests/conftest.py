"""Settings of all tests (8 CPU devices, rank promotion is an error), tiny configs and tiny data."""

import atexit
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
# Compiling takes most of a test's time: optimize little, and compile no program twice.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="imagen_jax_tests_")

import jax
import numpy as np
import pytest

atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

ROOT = Path(__file__).parent.parent


def load_config(name, argument=None):
    """Loads the shipped config `configs/<name>.py`."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(argument) if argument else module.get_config()


def _shrink_run(config):
    config.batch_size = 8
    config.data.in_memory = False
    config.num_steps = 100
    config.num_samples = 4
    config.optimizer.warmup_steps = 1
    config.model.dtype = "float32"
    config.text.dim = 8
    config.text.max_tokens = 6
    config.sampling.num_steps = 2
    return config


def shrink(config):
    """Shrinks a shipped config of a U-Net until a step takes milliseconds; keeps the recipe.

    The demo's noise levels become uniform in t with equal weights, as tests compute them.
    """
    config.data.categories = ()
    if "time_sampling" in config.diffusion:
        config.diffusion.update(time_sampling="uniform", time_mean=0.0, time_std=1.0)
        config.diffusion.update(weighting="x", weighting_bias=0.0)
    config.model.image_size = 32
    config.model.patch_size = 4
    config.model.embed_dim = 8
    config.model.channel_mult = (1, 2)
    config.model.num_res_blocks = 1
    config.model.attention_resolutions = (4,)
    config.model.per_head_channels = 8
    return _shrink_run(config)


def shrink_sr(config):
    """Shrinks a shipped super-resolution config, to 32x32 -> 64x64."""
    config.data.image_size = 64
    config.model.image_size = 64
    config.model.low_res = 32
    config.model.widths = (8, 16)
    config.model.num_res_blocks = (1, 2)
    config.model.cond_width = 16
    config.model.num_heads = 2
    return _shrink_run(config)


def shrink_transformer(config):
    """Shrinks a shipped transformer config."""
    config.model.image_size = 16
    config.model.patch_size = 4
    config.model.width = 16
    config.model.depth = 2
    config.model.head_dim = 8
    return _shrink_run(config)


@pytest.fixture
def tiny_config():
    return shrink(load_config("demo", "unet"))


def random_batch(config, seed=0):
    """A batch of noise, in the format of Reader.train_batches."""
    from ml_dtypes import bfloat16

    rng = np.random.default_rng(seed)
    b, size, tokens = config.batch_size, config.model["image_size"], config.text.max_tokens
    lengths = rng.integers(1, tokens + 1, (b, 1))
    return {
        "image": rng.integers(0, 256, (b, size, size, 3)).astype(np.uint8),
        "text": rng.normal(size=(b, tokens, config.text.dim)).astype(bfloat16),
        "text_mask": np.arange(tokens)[None, :] < lengths,
    }


class FakeEncoder:
    """Replaces a text encoder: fixed random embeddings, a few tokens per caption."""

    max_tokens = 6

    def __init__(self):
        self.identity = {"encoder": "byte-tiny", "dim": 8, "max_tokens": self.max_tokens}

    def num_tokens(self, caption):
        return 1 + len(caption.encode()) % self.max_tokens

    def check(self, captions):
        pass

    def encode(self, captions, progress=None):
        from ml_dtypes import bfloat16

        rows = [np.random.default_rng(list(c.encode())) for c in captions]
        lengths = [self.num_tokens(c) for c in captions]
        return [r.normal(size=(n, 8)).astype(bfloat16) for r, n in zip(rows, lengths, strict=True)]


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A data dir with a few 32x32 scenes, embedded to fit `shrink`."""
    from data_pipelines.records import writing
    from data_pipelines.scenes.builder import Scenes

    path = str(tmp_path_factory.mktemp("data"))
    counts = {"train": 40, "validation": 16, "heldout": 8}
    writing.prepare(
        Scenes(data_dir=path, resolution=32, counts=counts, seed=0, encoder=FakeEncoder())
    )
    return path


@pytest.fixture(scope="session")
def cascade_runs(tmp_path_factory):
    """The workdirs of a base model and a super-resolution stage with random weights."""
    from saved_runs import save_cascade

    return save_cascade(tmp_path_factory)


def train_run(config, workdir, stop=lambda step: False, **kwargs):
    """Trains as `python -m imagen_jax.train` does, without flags."""
    from data_pipelines.reading.reader import Reader, build
    from imagen_jax.train import evaluations
    from imagen_jax.training import experiment, loop

    build(config)
    built, reader = experiment.build(config), Reader(config)
    kwargs = {"evals": evaluations(built.stage, reader), **kwargs}
    return loop.train(built, reader, workdir, stop, **kwargs)
