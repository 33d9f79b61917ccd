"""Super-resolution for the demo: 32x32 -> 64x64, a small Efficient U-Net on the same scenes.

A small configs/sr256.py. Cost: about 6 minutes on two cores. Results: docs/benchmarks.md.
Together with configs/demo.py it is a cascade of two stages:

    python -m imagen_jax.train --config=configs/demo.py --workdir=runs/demo
    python -m imagen_jax.train --config=configs/demo_sr.py --workdir=runs/demo_sr
    python -m imagen_jax.sample --workdir=runs/demo,runs/demo_sr --prompts="a red circle"
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.num_steps = 1200
    config.batch_size = 16
    config.log_every = 50
    config.eval_every = 300
    config.eval_batches = 4
    config.sample_every = 600
    config.num_samples = 8
    config.checkpoint_every = 600
    config.ema_decay = 0.99

    config.data = ConfigDict()
    config.data.task = "scenes_64"
    config.data.dir = "data/demo_sr"  # base64.py:tiny keeps different scenes_64 in data
    config.data.build = True
    config.data.num_train = 8000
    config.data.in_memory = True  # as in demo.py
    config.data.categories = ("Simple",)  # as in demo.py
    config.data.sample_split = "heldout"

    config.model = ConfigDict()
    config.model.name = "efficient_unet"
    config.model.image_size = 64
    config.model.low_res = 32
    config.model.widths = (32, 64)
    config.model.num_res_blocks = (1, 2)
    config.model.skip = "concat"
    config.model.cond_width = 64
    config.model.num_heads = 4
    config.model.dtype = "float32"

    config.text = ConfigDict()
    config.text.encoder = "byte-tiny"
    config.text.dim = 128
    config.text.max_tokens = 64

    config.diffusion = ConfigDict()
    # The network could predict eps, as in the paper. But the low-resolution image is already close
    # to x, while the noise has to pass through a level of half the resolution: a short run learns x
    # first.
    config.diffusion.prediction = "x"
    config.diffusion.weighting = "x"
    config.diffusion.low_discrepancy = True

    config.optimizer = ConfigDict()
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.grad_clip = 1.0

    config.sampling = ConfigDict()
    config.sampling.name = "dpmpp_2m"
    config.sampling.spacing = "log_snr"
    config.sampling.num_steps = 16
    config.sampling.guidance_weight = 1.0
    config.sampling.aug_level = 0.1
    return config
