"""How to use an export, for its model card."""

from __future__ import annotations

from imagen_jax.pipeline.cascade import TrainedStage

_SAMPLE = """\
```
python -m imagen_jax.sample --workdir=FOLDER --prompts="your prompt"{more}
```

or from Python:

```python
import imagen_jax

images = imagen_jax.load("FOLDER")("your prompt"{arguments})
```"""


def of_stage(kind: str, stage: TrainedStage) -> str:
    """Returns how to use one exported stage, in Markdown."""
    if kind != "safetensors":
        return _OTHERS[kind]
    more = " --image=photo.jpg" if stage.low_res else ""
    arguments = ', image="photo.jpg"' if stage.low_res else ""
    return _SAMPLE.format(more=more, arguments=arguments)


def of_cascade(kind: str) -> str:
    """Returns how to use an exported cascade, in Markdown."""
    if kind == "safetensors":
        return _SAMPLE.format(more="", arguments="")
    return "Each stage is used on its own; see its card."


_OTHERS: dict[str, str] = {}
