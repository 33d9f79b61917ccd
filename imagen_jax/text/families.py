"""The supported encoder families: how to read the config.json and weight names of each."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from imagen_jax.common.errors import UserError
from imagen_jax.text.bert import BertConfig, BertEncoder
from imagen_jax.text.clip import ClipConfig, ClipTextEncoder
from imagen_jax.text.layers import ACTIVATIONS
from imagen_jax.text.loading import Key
from imagen_jax.text.t5 import FEED_FORWARDS, T5Config, T5Encoder

MOST_LAYERS = 1024  # building more takes minutes; the largest known encoder has 48
_LAYERS = ("num_layers", "num_hidden_layers")
_TYPES = {"int": int, "float": (int, float), "str": str, "bool": bool}


@dataclasses.dataclass(frozen=True)
class Family:
    """One kind of encoder in Hugging Face's format.

    Attributes:
      config: a dataclass with the field names of config.json.
      module: the network, built as `module(config, rngs=...)`.
      names: our module names -> Hugging Face's; * is a block number.
      tokenizer: tokenizer_class if the folder does not name one.
      section: the part of config.json that holds the fields (default: all of it).
      defaults: values of fields that config.json may omit or never has, where they differ from
        the defaults of `config`.
      allowed: supported values of a field, if not all values are.
      renames: (pattern, replacement) for tensor names, so that `names` needs one spelling.
    """

    config: type
    module: type[nnx.Module]
    names: Mapping[str, str]
    tokenizer: str
    section: str | None = None
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    allowed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    renames: tuple[tuple[str, str], ...] = ()

    def read_config(self, fields: dict[str, Any], path: Path) -> Any:
        """Turns the fields of the config.json at `path` into the typed config.

        Raises:
          UserError: a field is missing or has an unsupported value.
        """
        if self.section is not None:
            if not isinstance(fields.get(self.section), dict):
                raise UserError(f"{path}: section {self.section!r} is missing")
            fields = fields[self.section]
        fields = {**self.defaults, **fields}
        for name, allowed in self.allowed.items():
            if name in fields and fields[name] not in allowed:
                raise UserError(
                    f"{path}: {name} is {fields[name]!r}; supported: {', '.join(allowed)}"
                )
        known = {f.name: f for f in dataclasses.fields(self.config)}
        for name, field in known.items():
            if name not in fields and field.default is dataclasses.MISSING:
                raise UserError(f"{path}: field {name!r} is missing")
            if name in fields and not isinstance(fields[name], _TYPES[field.type]):
                raise UserError(f"{path}: {name} is {fields[name]!r}; expected {field.type}")
        config = self.config(**{name: fields[name] for name in known if name in fields})
        for name in known:
            value = getattr(config, name)
            if type(value) is int and not 0 <= value < 2**31:
                raise UserError(f"{path}: {name} is {value}; allowed: 0 to {2**31 - 1}")
            if name in _LAYERS and not 0 < value <= MOST_LAYERS:
                raise UserError(f"{path}: {name} is {value}; allowed: 1 to {MOST_LAYERS}")
        return config

    def canonical(self, name: str) -> str:
        """Returns a stored tensor name in the spelling that `names` uses."""
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name


def namer(names: Mapping[str, str], leaves: Mapping[str, str]) -> Callable[[Key], str]:
    """Returns a function that maps a weight's key in our module to its name in a file.

    Args:
      names: module names; * is a block number.
      leaves: names of the weights inside a module.
    """

    def stored_name(key: Key) -> str:
        *parts, leaf = (str(part) for part in key)
        number = next((part for part in parts if part.isdigit()), "")
        module = ".".join("*" if part.isdigit() else part for part in parts)
        return f"{names[module].replace('*', number)}.{leaves[leaf]}"

    return stored_name


T5_NAMES = {
    "embed": "shared",
    "relative_bias.table": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    "blocks.*.relative_bias.table": "encoder.block.*.layer.0.SelfAttention.relative_attention_bias",
    "blocks.*.attention_norm": "encoder.block.*.layer.0.layer_norm",
    "blocks.*.attention.query": "encoder.block.*.layer.0.SelfAttention.q",
    "blocks.*.attention.key": "encoder.block.*.layer.0.SelfAttention.k",
    "blocks.*.attention.value": "encoder.block.*.layer.0.SelfAttention.v",
    "blocks.*.attention.out": "encoder.block.*.layer.0.SelfAttention.o",
    "blocks.*.mlp_norm": "encoder.block.*.layer.1.layer_norm",
    "blocks.*.mlp.gate": "encoder.block.*.layer.1.DenseReluDense.wi_0",
    "blocks.*.mlp.up": "encoder.block.*.layer.1.DenseReluDense.wi_1",
    "blocks.*.mlp.hidden": "encoder.block.*.layer.1.DenseReluDense.wi",
    "blocks.*.mlp.down": "encoder.block.*.layer.1.DenseReluDense.wo",
    "final_norm": "encoder.final_layer_norm",
}
BERT_NAMES = {
    "embed.tokens": "embeddings.word_embeddings",
    "embed.positions": "embeddings.position_embeddings",
    "embed.segments": "embeddings.token_type_embeddings",
    "embed.norm": "embeddings.LayerNorm",
    "blocks.*.attention.query": "encoder.layer.*.attention.self.query",
    "blocks.*.attention.key": "encoder.layer.*.attention.self.key",
    "blocks.*.attention.value": "encoder.layer.*.attention.self.value",
    "blocks.*.attention.out": "encoder.layer.*.attention.output.dense",
    "blocks.*.attention_norm": "encoder.layer.*.attention.output.LayerNorm",
    "blocks.*.mlp.up": "encoder.layer.*.intermediate.dense",
    "blocks.*.mlp.down": "encoder.layer.*.output.dense",
    "blocks.*.mlp_norm": "encoder.layer.*.output.LayerNorm",
}
CLIP_NAMES = {
    "tokens": "embeddings.token_embedding",
    "positions": "embeddings.position_embedding",
    "blocks.*.attention_norm": "encoder.layers.*.layer_norm1",
    "blocks.*.attention.query": "encoder.layers.*.self_attn.q_proj",
    "blocks.*.attention.key": "encoder.layers.*.self_attn.k_proj",
    "blocks.*.attention.value": "encoder.layers.*.self_attn.v_proj",
    "blocks.*.attention.out": "encoder.layers.*.self_attn.out_proj",
    "blocks.*.mlp_norm": "encoder.layers.*.layer_norm2",
    "blocks.*.mlp.up": "encoder.layers.*.mlp.fc1",
    "blocks.*.mlp.down": "encoder.layers.*.mlp.fc2",
}

_T5 = Family(
    config=T5Config,
    module=T5Encoder,
    names=T5_NAMES,
    tokenizer="T5Tokenizer",
    defaults={"feed_forward_proj": "relu"},  # folders of T5 v1.0 predate this field
    allowed={"feed_forward_proj": FEED_FORWARDS},
    renames=((r"^encoder\.embed_tokens\.", "shared."),),
)
_BERT = Family(
    config=BertConfig,
    module=BertEncoder,
    names=BERT_NAMES,
    tokenizer="BertTokenizer",
    allowed={"hidden_act": ACTIVATIONS, "position_embedding_type": ("absolute",)},
    # A model with heads prefixes its encoder; checkpoints from TensorFlow keep its norm names.
    renames=((r"^bert\.", ""), (r"\.gamma$", ".weight"), (r"\.beta$", ".bias")),
)
_CLIP_TEXT = Family(
    config=ClipConfig,
    module=ClipTextEncoder,
    names=CLIP_NAMES,
    tokenizer="CLIPTokenizer",
    allowed={"hidden_act": ACTIVATIONS},
    renames=((r"^text_model\.", ""),),
)
_GATED = {"feed_forward_proj": "gated-gelu"}
# Keyed by model_type in config.json.
FAMILIES = {
    "t5": _T5,
    "mt5": dataclasses.replace(_T5, defaults=_GATED),
    "umt5": dataclasses.replace(_T5, defaults={**_GATED, "bias_in_every_block": True}),
    "bert": _BERT,
    "clip_text_model": _CLIP_TEXT,
    "clip": dataclasses.replace(_CLIP_TEXT, section="text_config"),
}
