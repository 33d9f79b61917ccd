"""A 32x32 model of the drawn scenes in every category: colors, counts, positions, words.

The base model that ships with the package: configs/demo.py with all captions, more data and more
steps. Cost: about two hours on two cores. Results: docs/gallery.md.

    python -m imagen_jax.train --config=configs/scenes32.py --workdir=runs/scenes32
    python -m imagen_jax.evaluate --workdir=runs/scenes32 --prompts=scenes --num=160 --guidance=3
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.num_steps = 20_000
    config.batch_size = 32
    config.log_every = 100
    config.eval_every = 800
    config.eval_batches = 8
    config.sample_every = 800
    config.num_samples = 16
    config.checkpoint_every = 400
    config.ema_decay = 0.999

    config.data = ConfigDict()
    config.data.task = "scenes_32"
    config.data.dir = "data/scenes32"
    config.data.build = True
    config.data.num_train = 200_000
    config.data.in_memory = True
    # Simple captions leave little open, so shapes are learned sooner. The others are DrawBench's.
    config.data.categories = (
        *("Colors", "Counting", "Positional", "Descriptions", "Text"),
        *("Conflicting", "Misspellings", "Simple"),
    )
    config.data.sample_split = "heldout"

    config.model = ConfigDict()
    config.model.name = "transformer"
    config.model.image_size = 32
    config.model.patch_size = 4
    config.model.width = 128
    config.model.depth = 6
    config.model.head_dim = 32
    config.model.mlp_ratio = 2.75
    config.model.text_tokens = "keys"
    config.model.text_patch_size = 4  # 160 bytes of text would cost more than the 64 patches
    config.model.dtype = "float32"

    config.text = ConfigDict()
    config.text.encoder = "byte-tiny"
    config.text.dim = 128
    config.text.max_tokens = 160
    config.text.pooling = "mean"

    config.diffusion = ConfigDict()  # as in demo.py
    config.diffusion.prediction = "x"
    config.diffusion.time_sampling = "log_snr_normal"
    config.diffusion.time_mean = -2.5
    config.diffusion.time_std = 2.5
    config.diffusion.log_snr_min = -9.0
    config.diffusion.log_snr_max = 4.0
    config.diffusion.weighting = "sqrt_v"
    config.diffusion.weighting_bias = -5.0
    config.diffusion.caption_dropout = 0.1
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
    config.sampling.num_steps = 24
    config.sampling.guidance_weight = 2.0
    return config
