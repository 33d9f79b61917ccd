"""A 32x32 text-to-image model that trains in minutes on a laptop, on generated scenes.

A small configs/base64.py with the bundled text encoder, a byte-level T5. Comments mark each
departure from the paper that a short run needs. Cost: about 6 minutes on two cores. Results:
docs/benchmarks.md.

    python -m imagen_jax.train --config=configs/demo.py --workdir=runs/demo
    python -m imagen_jax.evaluate --workdir=runs/demo
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.num_steps = 2600
    config.batch_size = 32
    config.log_every = 50
    config.eval_every = 325
    config.eval_batches = 8
    config.sample_every = 650
    config.num_samples = 16
    config.checkpoint_every = 650
    config.ema_decay = 0.995  # 0.9999 averages over more steps than this run has

    config.data = ConfigDict()
    config.data.task = "scenes_32"
    config.data.build = True
    config.data.num_train = 16_000
    config.data.in_memory = True  # decoding would take CPU time from training
    # Counting, positions and spelling take longer to learn than this run; () is all categories.
    config.data.categories = ("Colors", "Conflicting")
    config.data.sample_split = "heldout"

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

    config.text = ConfigDict()
    config.text.encoder = "byte-tiny"
    config.text.dim = 128
    config.text.max_tokens = 64  # every caption is padded to this; longer ones are left out

    config.diffusion = ConfigDict()
    # At this patch size eps is harder to predict than the image, and the samples of a short run
    # stay noisy (arXiv:2511.13720). The output layers follow the prediction, see models/unet.py.
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
    config.sampling.num_steps = 32
    config.sampling.guidance_weight = 3.0
    return config
