"""The paper's base model: 64x64, 2B parameters, T5-XXL text (arXiv:2205.11487, appendix F.1).

Cost in the paper: 256 TPU v4 chips for 2.5M steps of 2048 examples, on about 860M image-text pairs
of 256x256 pixels or more. Result in the paper: zero-shot FID-30K of 7.27 on COCO at 256x256,
together with sr256.py.

    python -m imagen_jax.train --config=configs/base64.py --workdir=runs/base64

| argument | effect |
|---|---|
| base64.py:1b, :500m, :300m | the same recipe with fewer U-Net parameters |
| base64.py:tiny | for a laptop, on the generated scenes |
| base64.py:v4-512, :1b,v4-128 | training refuses to start on any other TPU slice |

Not in the paper: the limit of 128 T5 tokens, and the usual EMA decay of 0.9999.
"""

from ml_collections import ConfigDict

# As in the paper, only embed_dim changes with the size (appendix F.1; sizes in figure A.13b).
EMBED_DIMS = {"2b": 512, "1b": 384, "500m": 256, "300m": 192}


def get_config(size: str = "2b") -> ConfigDict:
    if size not in (*EMBED_DIMS, "tiny"):
        raise ValueError(f"argument {size!r}; allowed: {', '.join(EMBED_DIMS)}, tiny")
    config = ConfigDict()
    config.seed = 0
    config.num_steps = 2_500_000
    config.batch_size = 2048
    config.microbatches = 0  # as few as device_batch and memory allow: 1 on the paper's slice
    config.device_batch = 8  # the rows of a TPU tile; fewer examples take as long
    config.log_every = 100
    config.eval_every = 10_000
    config.sample_every = 10_000
    config.checkpoint_every = 5000
    config.ema_decay = 0.9999

    config.data = ConfigDict()
    config.data.task = "folder"
    config.data.dir = "data"

    config.model = ConfigDict()
    config.model.image_size = 64
    config.model.embed_dim = EMBED_DIMS.get(size, 32)
    config.model.channel_mult = (1, 2, 3, 4)
    config.model.num_res_blocks = 3
    config.model.attention_resolutions = (32, 16, 8)
    config.model.per_head_channels = 64
    config.model.use_scale_shift_norm = True
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
    config.optimizer.name = "adafactor"
    # Relative to the RMS of each weight (optax's default, as in the paper). Zero-initialized
    # convolutions need 40,000 steps to grow to an RMS of 0.02, so for runs below about 200,000
    # steps prefer --config.optimizer.name=adam.
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 10_000
    config.optimizer.schedule = "cosine"  # to 0; the paper prints end_value=2500000, a misprint
    config.optimizer.weight_decay = 0.0

    config.sampling = ConfigDict()
    config.sampling.name = "ddim"
    config.sampling.num_steps = 256
    config.sampling.guidance_weight = 1.35  # the paper's for FID; samples look better at 5 or more
    config.sampling.threshold = "dynamic"

    config.mesh = ConfigDict()
    config.mesh.data = -1
    config.mesh.fsdp = 0
    config.mesh.tensor = 0  # above 1 if a chip would get fewer than 8 examples
    config.mesh.remat = ""  # recompute as little as memory allows
    return _tiny(config) if size == "tiny" else config


def _tiny(config: ConfigDict) -> ConfigDict:
    """Shrinks the recipe for a laptop: fewer, narrower blocks, generated scenes, small encoder."""
    config.num_steps = 2000
    config.batch_size = 8
    config.microbatches = 1
    config.log_every = 20
    config.eval_every = 500
    config.sample_every = 500
    config.checkpoint_every = 200
    config.ema_decay = 0.999

    config.data.task = "scenes_64"
    config.data.build = True
    config.data.num_train = 10_000
    config.data.sample_split = "heldout"

    config.model.num_res_blocks = 1
    config.model.attention_resolutions = (16, 8)
    config.model.per_head_channels = 32
    config.model.dtype = "float32"

    config.text.encoder = "byte-tiny"
    config.text.dim = 128
    config.text.max_tokens = 192

    config.optimizer.learning_rate = 1e-2  # 1e-4 needs more steps than this run has
    config.optimizer.warmup_steps = 100
    # 32 steps of dpmpp_2m over log-SNR have an eighth of the error of 32 DDIM steps over t: 5 gray
    # levels against 40 with the demo (docs/benchmarks.md).
    config.sampling.name = "dpmpp_2m"
    config.sampling.spacing = "log_snr"
    config.sampling.num_steps = 32
    config.sampling.guidance_weight = 3.0
    config.mesh.tensor = 1
    config.mesh.remat = "none"
    return config
