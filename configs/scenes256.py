"""Super-resolution of the released cascade: 32x32 -> 256x256, a small Efficient U-Net.

A small configs/sr1024.py: it trains on crops and enlarges whole images. It has RMS norms, because
the statistics of a GroupNorm differ between crops and whole images, which then are tinted. Cost:
about half an hour on one core. Results: docs/gallery.md.

    python -m imagen_jax.train --config=configs/scenes256.py --workdir=runs/scenes256
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.num_steps = 3000
    config.batch_size = 16
    config.log_every = 50
    config.eval_every = 500
    config.eval_batches = 8
    config.sample_every = 1000
    config.num_samples = 8
    config.checkpoint_every = 500
    config.ema_decay = 0.995

    config.data = ConfigDict()
    config.data.task = "scenes_256"
    config.data.dir = "data/scenes256"
    config.data.build = True
    config.data.num_train = 8000
    config.data.in_memory = True
    config.data.image_size = 256
    config.data.sample_split = "heldout"

    config.model = ConfigDict()
    config.model.name = "efficient_unet"
    config.model.image_size = 64
    config.model.low_res = 8
    config.model.widths = (32, 64, 128)
    config.model.num_res_blocks = (1, 2, 2)
    config.model.skip = "concat"
    config.model.cond_width = 128
    config.model.num_heads = 4
    config.model.self_attention = False  # it trains on crops
    config.model.norm = "rms"
    config.model.dtype = "float32"

    config.text = ConfigDict()
    config.text.encoder = "byte-tiny"
    config.text.dim = 128
    config.text.max_tokens = 160

    config.diffusion = ConfigDict()
    # The low-resolution image is already close to x; see demo_sr.py.
    config.diffusion.prediction = "x"
    config.diffusion.weighting = "x"
    config.diffusion.low_discrepancy = True

    config.optimizer = ConfigDict()
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.grad_clip = 1.0

    config.sampling = ConfigDict()
    config.sampling.name = "dpmpp_2m"
    config.sampling.spacing = "log_snr"
    config.sampling.num_steps = 12
    config.sampling.guidance_weight = 1.0
    config.sampling.aug_level = 0.1
    return config
