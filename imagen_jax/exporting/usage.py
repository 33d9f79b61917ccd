"""How to use an export, for its model card."""

from __future__ import annotations

from imagen_jax.pipeline.trained import TrainedStage

_SAFETENSORS = """\
```
python -m imagen_jax.sample --workdir=FOLDER --prompts="your prompt"{more}
```

or from Python:

```python
import imagen_jax

images = imagen_jax.load("FOLDER")("your prompt"{arguments})
```"""

_ORBAX = """\
```python
import orbax.checkpoint as ocp

params = ocp.StandardCheckpointer().restore("/ABSOLUTE/FOLDER/params")
```"""

_STABLEHLO = """\
Needs JAX only; `model.safetensors` has the weights, which are inputs.

```python
from jax import export
from safetensors.flax import load_file

weights = load_file("FOLDER/model.safetensors")
with open("FOLDER/sample.stablehlo", "rb") as file:
    sample = export.deserialize(file.read())
images = sample.call(weights, inputs)  # float32 [batch, height, width, 3] in [-1, 1]
```

`inputs` is a dict of arrays, with any batch size:

| program | inputs |
| --- | --- |
| `sample.stablehlo` | {sample} |
| `denoise.stablehlo` | {denoise} |

`denoise` returns the predicted image, `x_hat`, of one evaluation without guidance."""

_ONNX = """\
```python
import onnxruntime

session = onnxruntime.InferenceSession("FOLDER/denoise.onnx")
[x_hat] = session.run(["x_hat"], inputs)
```

It predicts the image, `x_hat`, from a noisy image: one evaluation without guidance. The inputs, \
with the batch size that was exported: {denoise}."""


def of_stage(kind: str, stage: TrainedStage) -> str:
    """Returns how to use one exported stage, in Markdown."""
    if kind == "safetensors":
        more = " --image=photo.jpg" if stage.low_res else ""
        arguments = ', image="photo.jpg"' if stage.low_res else ""
        return _SAFETENSORS.format(more=more, arguments=arguments)
    config = stage.stage.config
    text = f"`text` [{config.text.tokens}, {config.text.width}], `text_mask` bool"
    size, low = config.unet.image_size, config.unet.low_res
    sample, denoise = f"`seeds` uint32, {text}", f"`z` [{size}, {size}, 3], `log_snr`, {text}"
    if low:
        sample += f", `low_res` uint8 [{stage.low_res}, {stage.low_res}, 3]"
        denoise += f", `low_res` [{low}, {low}, 3], `aug_level`"
    others = {"orbax": _ORBAX, "stablehlo": _STABLEHLO, "onnx": _ONNX}
    return others[kind].format(sample=sample, denoise=denoise)


def of_cascade(kind: str) -> str:
    """Returns how to use an exported cascade, in Markdown."""
    if kind == "safetensors":
        return _SAFETENSORS.format(more="", arguments="")
    return "Run the stages one after the other; the card of each says how."
