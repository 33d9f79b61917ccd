"""Super-resolution for scenes32.py: 32x32 -> 256x256, a small transformer.

It trains on crops, as configs/sr1024.py does, and enlarges whole images. Cost: about an hour on one
core. Results: docs/gallery.md.

    python -m imagen_jax.train --config=configs/scenes256.py --workdir=runs/scenes256
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.num_steps = 6000
    config.batch_size = 8
    config.log_every = 100
    config.eval_every = 500
    config.eval_batches = 8
    config.sample_every = 1000
    config.num_samples = 8
    config.checkpoint_every = 500
    config.ema_decay = 0.998

    config.data = ConfigDict()
    config.data.task = "scenes_256"
    config.data.dir = "data/scenes256"
    config.data.build = True
    config.data.num_train = 8000
    config.data.in_memory = True
    config.data.image_size = 256
    config.data.sample_split = "heldout"

    config.model = ConfigDict()
    config.model.name = "transformer"
    config.model.image_size = 128
    config.model.low_res = 16
    config.model.low_res_skip = True
    config.model.patch_size = 8
    config.model.width = 128
    config.model.depth = 4
    config.model.head_dim = 32
    config.model.mlp_ratio = 2.75
    config.model.dtype = "float32"

    config.text = ConfigDict()
    config.text.encoder = "byte-tiny"
    config.text.dim = 128
    config.text.max_tokens = 160
    config.text.pooling = "mean"
    config.text.sequence = "none"  # the low-resolution image says what is where

    config.diffusion = ConfigDict()  # as in demo.py, but less time at high noise
    config.diffusion.prediction = "x"
    config.diffusion.time_sampling = "log_snr_normal"
    config.diffusion.time_mean = -1.0
    config.diffusion.time_std = 2.5
    config.diffusion.log_snr_min = -9.0
    config.diffusion.log_snr_max = 5.0
    config.diffusion.weighting = "sqrt_v"
    config.diffusion.weighting_bias = -3.0
    config.diffusion.low_discrepancy = True

    config.optimizer = ConfigDict()
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 0.02
    config.optimizer.adam_learning_rate = 2e-3
    config.optimizer.b2 = 0.99
    config.optimizer.warmup_steps = 100
    config.optimizer.grad_clip = 1.0

    config.sampling = ConfigDict()
    config.sampling.name = "dpmpp_2m"
    config.sampling.spacing = "log_snr"
    config.sampling.num_steps = 12
    config.sampling.guidance_weight = 1.0
    config.sampling.aug_level = 0.02  # at 0.1 some of the noise stays as speckles
    return config
