"""Your own images: a 64x64 text-to-image model for a laptop, and its super-resolution stage.

Prepare images with captions (docs/data.md has the formats), then train:

    python -m data_pipelines.ingest --source=photos
    python -m imagen_jax.train --config=configs/folder.py --workdir=runs/folder

Cost: half a second of CPU time per step, about 10 minutes on two idle cores. Expected result on 184
training images of simple scenes: a held-out loss of 0.066 after 500 of the 2,000 steps, when most
samples of held-out captions have the caption's colors but not yet its shapes.

The second stage enlarges 64x64 to 256x256 and trains on the same data:

    python -m imagen_jax.train --config=configs/folder.py:sr --workdir=runs/folder_sr
    python -m imagen_jax.sample --workdir=runs/folder,runs/folder_sr --prompts="a red circle"

Both recipes suit small folders. They are configs/demo.py at 64x64 and configs/sr256.py:tiny.
"""

from ml_collections import ConfigDict


def get_config(stage: str = "base") -> ConfigDict:
    if stage not in ("base", "sr"):
        raise ValueError(f"argument {stage!r}; allowed: base, sr")
    config = ConfigDict()
    config.seed = 0
    config.num_steps = 2000
    config.batch_size = 16
    config.log_every = 50
    config.eval_every = 500
    config.eval_batches = 4
    config.sample_every = 500
    config.num_samples = 16
    config.checkpoint_every = 500
    config.ema_decay = 0.995  # 0.9999 averages over more steps than this run has

    config.data = ConfigDict()
    config.data.task = "folder"
    config.data.dir = "data"

    config.model = ConfigDict()
    config.model.dtype = "float32"

    config.text = ConfigDict()
    config.text.encoder = "byte-tiny"
    config.text.dim = 128
    config.text.max_tokens = 192

    config.diffusion = ConfigDict()
    # As in demo.py: a short run learns to predict the image before it learns the noise.
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
    return _super_resolution(config) if stage == "sr" else _base(config)


def _base(config: ConfigDict) -> ConfigDict:
    """Sets up 64x64 from text alone."""
    config.model.image_size = 64
    config.model.patch_size = 4  # moves the work to 16x16, where a CPU is fast; the paper: 1
    config.model.embed_dim = 64
    # The paper's 4 x embed_dim would make the text half of the work here.
    config.model.cond_width = 128
    config.model.channel_mult = (1, 2)
    config.model.num_res_blocks = 1
    config.model.attention_resolutions = (8,)
    config.model.per_head_channels = 32

    config.sampling.num_steps = 32
    config.sampling.guidance_weight = 3.0
    return config


def _super_resolution(config: ConfigDict) -> ConfigDict:
    """Sets up 64x64 to 256x256, trained on crops like configs/sr256.py:tiny: 16x16 to 64x64."""
    config.num_samples = 4
    config.ema_decay = 0.99

    config.data.image_size = 256

    config.model.name = "efficient_unet"
    config.model.image_size = 64
    config.model.low_res = 16
    config.model.widths = (16, 32, 64, 64)
    config.model.num_res_blocks = (1, 1, 2, 2)
    config.model.skip = "concat"
    config.model.cond_width = 64
    config.model.num_heads = 4

    config.sampling.num_steps = 16
    config.sampling.guidance_weight = 1.0
    config.sampling.aug_level = 0.1
    return config
