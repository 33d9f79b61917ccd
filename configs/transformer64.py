"""A pixel transformer in place of the base U-Net: text -> 64x64 images.

Source of the network: JiT, arXiv:2511.13720. Everything else is as in base64.py unless a comment
says otherwise. 1.96B parameters. Cost: not trained at this size; docs/scaling.md has the predicted
time of a step. Expected result: none measured.

    python -m imagen_jax.train --config=configs/transformer64.py --workdir=runs/transformer64

| argument | effect |
|---|---|
| transformer64.py:1b, :300m | the same recipe with fewer parameters |
| transformer64.py:tiny | for a laptop, on the generated scenes |
| transformer64.py:v4-512, :1b,v4-128 | training refuses to start on any other TPU slice |
"""

from ml_collections import ConfigDict

# Width and depth. These widths shard 64 ways into whole tiles of a TPU.
SIZES = {"2b": (2048, 24), "1b": (1536, 22), "300m": (1024, 14)}


def get_config(size: str = "2b") -> ConfigDict:
    if size not in (*SIZES, "tiny"):
        raise ValueError(f"argument {size!r}; allowed: {', '.join(SIZES)}, tiny")
    config = ConfigDict()
    config.seed = 0
    config.num_steps = 2_500_000
    config.batch_size = 2048
    config.microbatches = 0  # as few as device_batch and memory allow: 1 on a v4-512
    config.device_batch = 8
    config.log_every = 100
    config.eval_every = 10_000
    config.sample_every = 10_000
    config.checkpoint_every = 5000
    config.ema_decay = 0.9999

    config.data = ConfigDict()
    config.data.task = "folder"
    config.data.dir = "data"

    config.model = ConfigDict()
    config.model.name = "transformer"
    config.model.image_size = 64
    config.model.patch_size = 4  # 256 patches, as in JiT
    config.model.width, config.model.depth = SIZES.get(size, (128, 4))
    config.model.head_dim = 128  # the width of a TPU's matrix unit
    config.model.mlp_ratio = 3.0
    config.model.bottleneck = 0  # a patch has only 48 values
    config.model.text_tokens = "sequence"
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
    config.diffusion.prediction = "x"  # as in JiT
    # JiT weights the error of x by up to 400, and draws few times where the weight is large. Here
    # times are uniform, so the weight stays below 5: min(SNR, 5).
    config.diffusion.weighting = "min_snr"
    config.diffusion.caption_dropout = 0.1

    config.optimizer = ConfigDict()
    # JiT's optimizer. Adafactor would take long to move the projections that start at zero.
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 2e-4
    config.optimizer.b2 = 0.95
    config.optimizer.warmup_steps = 10_000
    config.optimizer.schedule = "constant"

    config.sampling = ConfigDict()
    config.sampling.name = "dpmpp_2m"
    config.sampling.spacing = "log_snr"
    config.sampling.num_steps = 64
    config.sampling.guidance_weight = 3.0
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
    config.batch_size = 16
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

    config.model.patch_size = 8
    config.model.head_dim = 32
    config.model.text_tokens = "keys"  # 64 patches against 192 tokens of text, one per byte
    config.model.dtype = "float32"

    config.text.encoder = "byte-tiny"
    config.text.dim = 128
    config.text.max_tokens = 192

    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.schedule = "cosine"
    config.optimizer.grad_clip = 1.0
    config.sampling.num_steps = 32
    config.mesh.tensor = 1
    config.mesh.remat = "none"
    return config
