"""A pixel transformer that draws 256x256 images in a single stage, without super-resolution.

Source of the network: JiT, arXiv:2511.13720, JiT-G/16. transformer64.py is the same recipe at
64x64: patches of 16 instead of 4 keep the number of tokens, and so the time of a step. 1.96B
parameters. Cost: not trained at this size; docs/scaling.md has the predicted time of a step.
Expected result: none measured. In JiT, trained on the classes of ImageNet, an FID of 1.82.

    python -m imagen_jax.train --config=configs/transformer256.py --workdir=runs/transformer256

| argument | effect |
|---|---|
| transformer256.py:1b, :300m | the same recipe with fewer parameters |
| transformer256.py:v4-512, :1b,v4-128 | training refuses to start on any other TPU slice |
"""

from ml_collections import ConfigDict

# Width and depth, as in transformer64.py.
SIZES = {"2b": (2048, 24), "1b": (1536, 22), "300m": (1024, 14)}


def get_config(size: str = "2b") -> ConfigDict:
    if size not in SIZES:
        raise ValueError(f"argument {size!r}; allowed: {', '.join(SIZES)}")
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
    config.model.image_size = 256
    config.model.patch_size = 16
    config.model.width, config.model.depth = SIZES[size]
    config.model.head_dim = 128
    config.model.mlp_ratio = 3.0
    config.model.bottleneck = 256  # for the 768 values of a patch, as in JiT-G
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
    config.diffusion.prediction = "x"  # at this patch size the only one that works in JiT
    config.diffusion.weighting = "min_snr"  # see transformer64.py
    config.diffusion.caption_dropout = 0.1

    config.optimizer = ConfigDict()
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
    config.mesh.tensor = 0
    config.mesh.remat = ""
    return config
