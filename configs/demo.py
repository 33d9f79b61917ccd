"""A 32x32 text-to-image model that trains in minutes on a laptop, on generated scenes.

A small configs/transformer64.py with the bundled text encoder, a byte-level T5. Comments mark what
a short run needs. Cost: about 10 minutes on two cores. Results: docs/benchmarks.md.

    python -m imagen_jax.train --config=configs/demo.py --workdir=runs/demo
    python -m imagen_jax.evaluate --workdir=runs/demo

`configs/demo.py:unet` is the same run with a U-Net of configs/base64.py's kind, for comparison.
"""

from ml_collections import ConfigDict


def get_config(network: str = "transformer") -> ConfigDict:
    if network not in ("transformer", "unet"):
        raise ValueError(f"argument {network!r}; allowed: transformer, unet")
    config = ConfigDict()
    config.seed = 0
    config.num_steps = 2200
    config.batch_size = 32
    config.log_every = 50
    config.eval_every = 275
    config.eval_batches = 8
    config.sample_every = 550
    config.num_samples = 16
    config.checkpoint_every = 550
    config.ema_decay = 0.995  # 0.9999 averages over more steps than this run has

    config.data = ConfigDict()
    config.data.task = "scenes_32"
    config.data.build = True
    config.data.num_train = 20_000
    config.data.in_memory = True  # decoding would take CPU time from training
    # One or two objects near the middle, and captions that state all but small offsets. Whatever a
    # caption leaves open adds noise to the gradients. () is all categories of DrawBench.
    config.data.categories = ("Simple",)
    config.data.sample_split = "heldout"

    config.model = ConfigDict()
    # Two cores train a transformer on 64 patches to better images in the same time than a U-Net.
    config.model.name = "transformer"
    config.model.image_size = 32
    config.model.patch_size = 4
    config.model.width = 128
    config.model.depth = 5
    config.model.head_dim = 32
    config.model.mlp_ratio = 2.75
    config.model.text_tokens = "keys"
    config.model.dtype = "float32"

    config.text = ConfigDict()
    config.text.encoder = "byte-tiny"
    config.text.dim = 128
    config.text.max_tokens = 64  # every caption is padded to this; longer ones are left out
    config.text.pooling = "mean"

    config.diffusion = ConfigDict()
    # A patch of noise is harder to predict than a patch of an image (arXiv:2511.13720).
    config.diffusion.prediction = "x"
    # The cosine schedule draws log-SNRs above 0 half of the time, where little is left to learn.
    # These noise levels decide the shapes, and the weights balance the errors over them.
    config.diffusion.time_sampling = "log_snr_normal"
    config.diffusion.time_mean = -2.5
    config.diffusion.time_std = 2.5
    config.diffusion.log_snr_min = -9.0
    config.diffusion.log_snr_max = 4.0
    config.diffusion.weighting = "sqrt_v"
    config.diffusion.weighting_bias = -5.0
    config.diffusion.caption_dropout = 0.15  # a short run learns the null prompt late
    config.diffusion.low_discrepancy = True

    config.optimizer = ConfigDict()
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 0.02
    config.optimizer.adam_learning_rate = 2e-3
    config.optimizer.b2 = 0.99
    config.optimizer.warmup_steps = 50
    config.optimizer.grad_clip = 1.0

    config.sampling = ConfigDict()
    config.sampling.name = "dpmpp_2m"
    config.sampling.spacing = "log_snr"
    config.sampling.num_steps = 16
    config.sampling.guidance_weight = 2.0
    return _unet(config) if network == "unet" else config


def _unet(config: ConfigDict) -> ConfigDict:
    """Replaces the transformer by a U-Net that takes about as long per step."""
    config.model = ConfigDict()
    config.model.image_size = 32
    config.model.patch_size = 4  # moves the work to 8x8, where a CPU is fast; 1 in the paper
    config.model.embed_dim = 64
    config.model.cond_width = 128  # the paper's 4 x embed_dim: text would be half the work
    config.model.channel_mult = (1, 2)
    config.model.num_res_blocks = 1
    config.model.attention_resolutions = (8, 4)
    config.model.per_head_channels = 32
    config.model.dtype = "float32"

    config.optimizer = ConfigDict()
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.grad_clip = 1.0
    return config
