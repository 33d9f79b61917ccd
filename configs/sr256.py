"""The paper's first super-resolution model: 64x64 -> 256x256.

Source: arXiv:2205.11487, appendices B.1 and F.2. 614M parameters (the paper says 600M;
models/efficient_unet.py lists other readings with their sizes). Cost in the paper: 128 TPU v4 chips
for 2.5M steps of 2048 examples. Result in the paper: zero-shot FID-30K of 7.27 on COCO together
with base64.py, at guidance 1.35 there and 8 here.

    python -m imagen_jax.train --config=configs/sr256.py --workdir=runs/sr256

| argument | effect |
|---|---|
| sr256.py:tiny | for a laptop, on the generated scenes |
| sr256.py:v4-256 | training refuses to start on any other TPU slice |

The network receives the noise level of its low-resolution image, aug_level, which training draws
from [0, 1]. In the paper 0 gives the best FID, and 0.1 to 0.3 give the best-looking samples.

The paper trains this stage with Adam and found Adafactor worse. Here every stage defaults to
Adafactor. For the paper's optimizer, with the same learning rate and the paper's b1, b2 and eps:

    --config.optimizer.name=adam

Prefer it for runs below about 200,000 steps (see optim.OptimizerConfig).
"""

from ml_collections import ConfigDict


def get_config(size: str = "600m") -> ConfigDict:
    if size not in ("600m", "tiny"):
        raise ValueError(f"argument {size!r}; allowed: 600m, tiny")
    config = ConfigDict()
    config.seed = 0
    config.num_steps = 2_500_000
    config.batch_size = 2048
    config.microbatches = 0  # as few as device_batch and memory allow: 1 on the paper's slice
    config.device_batch = 16
    config.log_every = 100
    config.eval_every = 10_000
    config.sample_every = 10_000
    config.checkpoint_every = 5000
    config.ema_decay = 0.9999

    config.data = ConfigDict()
    config.data.task = "folder"
    config.data.dir = "data"
    config.data.image_size = 256

    config.model = ConfigDict()
    config.model.name = "efficient_unet"
    config.model.image_size = 256
    config.model.low_res = 64
    config.model.widths = (128, 256, 512, 1024)
    config.model.num_res_blocks = (2, 4, 8, 8)
    config.model.skip = "concat"
    config.model.cond_width = 2048
    config.model.num_heads = 8
    config.model.self_attention = True
    config.model.dropout = 0.0
    config.model.dtype = "bfloat16"

    config.text = ConfigDict()
    config.text.encoder = "t5-v1_1-xxl"
    config.text.dim = 4096
    config.text.max_tokens = 128
    config.text.pooling = "attention"
    config.text.sequence = "cross_attention_layernorm"

    config.diffusion = ConfigDict()
    config.diffusion.schedule = "cosine"
    config.diffusion.prediction = "eps"  # as in the paper
    config.diffusion.caption_dropout = 0.1

    config.optimizer = ConfigDict()
    config.optimizer.name = "adafactor"  # the paper: adam
    # With Adafactor, relative to the RMS of each weight, and slow at first: see base64.py.
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 10_000
    config.optimizer.schedule = "cosine"
    config.optimizer.weight_decay = 0.0

    config.sampling = ConfigDict()
    config.sampling.name = "ddim"
    config.sampling.num_steps = 128
    config.sampling.guidance_weight = 8.0  # the paper's for FID
    config.sampling.threshold = "dynamic"

    config.mesh = ConfigDict()
    config.mesh.data = -1
    config.mesh.fsdp = 0
    config.mesh.remat = ""  # recompute as little as memory allows
    return _tiny(config) if size == "tiny" else config


def _tiny(config: ConfigDict) -> ConfigDict:
    """Shrinks the recipe for a laptop: fewer, narrower blocks, generated scenes, small encoder."""
    config.num_steps = 3000
    config.batch_size = 16
    config.microbatches = 1
    config.log_every = 20
    config.eval_every = 500
    config.sample_every = 1000
    config.num_samples = 4
    config.checkpoint_every = 500
    config.ema_decay = 0.99

    config.data.task = "scenes_256"
    config.data.build = True
    config.data.num_train = 2000
    config.data.sample_split = "heldout"
    # Crops, 16x16 -> 64x64, as in sr1024.py: more images in the same time.
    config.data.image_size = 256
    config.model.image_size = 64
    config.model.low_res = 16

    config.model.widths = (16, 32, 64, 64)
    config.model.num_res_blocks = (1, 1, 2, 2)
    config.model.cond_width = 64
    config.model.num_heads = 4
    config.model.dtype = "float32"

    config.text.encoder = "byte-tiny"
    config.text.dim = 128
    config.text.max_tokens = 192

    # The low-resolution image is already close to x. The noise has to pass through the 16 channels
    # of the first level, 12 of which it needs, and a short run learns x before it learns that.
    config.diffusion.prediction = "x"
    config.diffusion.weighting = "x"
    config.diffusion.low_discrepancy = True
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.grad_clip = 1.0
    config.sampling.name = "dpmpp_2m"
    config.sampling.spacing = "log_snr"
    config.sampling.num_steps = 16
    config.sampling.guidance_weight = 1.0
    config.sampling.aug_level = 0.1
    config.mesh.remat = "none"
    return config
