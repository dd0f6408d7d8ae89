"""A tiny random model for every row of the table of sites, and a batch for it. Nothing here names a row: a new one is
built from what transformers and timm say of it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES, model_type_to_module_name
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from smear_peft.architectures import ARCHITECTURES, Architecture, site_names

ROWS, PROMPT, LENGTH, SIDE = 3, 5, 8, 32  # B, of a text its prompt and the whole, of an image height and width
# Whatever of these a configuration or a model's class has; the second value where the setting is a list.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "d_ff", "n_inner", "hidden_dim", "ffn_dim"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "num_stages", "n_layer", "n_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_layers", "num_decoder_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads",), 2),
    **dict.fromkeys(("head_dim", "d_kv"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    **{"vocab_size": 64, "image_size": SIDE, "img_size": SIDE, "patch_size": 4, "window_size": 4, "embedding_size": 32},
    **{"num_heads": (4, [2, 2]), "embed_dim": 16, "depths": (1, [1, 1]), "hidden_sizes": (32, [16, 32])},
    **{"channels": (8, 16, 24, 32), "layers": (1, 1, 1, 1), "width_factor": 0.25},
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}


@dataclass(frozen=True)
class Family:
    """One row's tiny model.

    Attributes:
        row: of the table.
        kind: "encoder-decoder", "encoder", "decoder", "image" (transformers) or "timm".
        make: builds the model, in eval mode, always the same one.
        batch: B examples, with labels where the model takes them; of texts, the second and third are padded.
    """

    row: Architecture
    kind: str
    make: Callable[[], nn.Module]
    batch: dict[str, Tensor]

    @property
    def name(self) -> str:
        return self.row.family

    @property
    def text(self) -> bool:
        return self.kind in ("encoder-decoder", "encoder", "decoder")

    @property
    def generates(self) -> bool:
        return self.kind in ("encoder-decoder", "decoder")


@functools.cache
def families() -> tuple[Family, ...]:
    """Every row's."""
    return tuple(_timm(row) if row.package.startswith("timm.") else _transformers(row) for row in ARCHITECTURES)


def of_kind(*kinds: str) -> list[Family]:
    """Those of some kinds; all without any."""
    return [family for family in families() if family.kind in kinds or not kinds]


def kind_of(row: Architecture) -> str:
    """The kind of a row's models, without building one."""
    if row.package.startswith("timm."):
        return "timm"
    kind = _model_type(row)
    if CONFIG_MAPPING[kind]().is_encoder_decoder:
        return "encoder-decoder"
    if kind in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        return "image"
    causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return "decoder" if causal else "encoder"


AUTO = {
    "encoder-decoder": AutoModelForSeq2SeqLM,
    "encoder": AutoModelForSequenceClassification,
    "decoder": AutoModelForCausalLM,
    "image": AutoModelForImageClassification,
}


def _transformers(row: Architecture) -> Family:
    kind = kind_of(row)

    def make() -> nn.Module:
        config = small_config(CONFIG_MAPPING[_model_type(row)], num_labels=4, architectures=[])
        model = seeded(lambda: AUTO[kind].from_config(config))
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
        return model.eval()

    return Family(row, kind, make, text_batch(kind) if kind != "image" else image_batch("pixel_values"))


def _timm(row: Architecture) -> Family:
    def make() -> nn.Module:
        name, settings = tiny_timm_settings(row)
        return seeded(lambda: timm.create_model(name, num_classes=4, **settings)).eval()

    return Family(row, "timm", make, image_batch("x"))


@functools.cache
def tiny_timm_settings(row: Architecture) -> tuple[str, dict[str, Any]]:
    """One of timm's own models for tests, or another with settings that shrink it as far as its class lets us."""
    names = timm.list_models(module=row.package.rpartition(".")[2])
    for name in sorted(names, key=lambda name: (not name.startswith("test_"), len(name), name)):
        with torch.device("meta"):
            model = timm.create_model(name)
        if site_names(dict(model.named_modules())):  # of a module's blocks a row may have some alone
            break
    if name.startswith("test_"):
        return name, {}
    signature = inspect.signature(type(model).__init__).parameters
    return name, {key: small(key, p.default) for key, p in signature.items() if key in SMALL}


def _model_type(row: Architecture) -> str:
    module = row.package.rpartition(".")[2]
    types = [kind for kind in CONFIG_MAPPING_NAMES if model_type_to_module_name(kind) == module]
    return min(types, key=lambda kind: (hasattr(CONFIG_MAPPING[kind](), "text_config"), types.index(kind)))


def small_config(kind: type[PretrainedConfig], **more: Any) -> PretrainedConfig:
    """A configuration with every setting of `SMALL` that it has, and no dropout."""
    default = kind().to_dict()
    settings = {name: small(name, value) for name, value in default.items() if name in SMALL}
    aliases = {alias: name for alias, name in kind.attribute_map.items() if alias in SMALL and name not in settings}
    settings |= TOKENS | {alias: small(alias, default.get(name)) for alias, name in aliases.items()}
    settings |= {name: 0.0 for name, value in default.items() if "drop" in name and isinstance(value, float)}
    return kind(**settings, **more)


def small(name: str, default: Any) -> Any:
    """The setting as a number, or as a list where its default is one."""
    value = SMALL[name]
    if isinstance(value, tuple) and len(value) == 2:
        return value[1] if isinstance(default, list | tuple) else value[0]
    return value


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """A model with the weights of seed 0 and with norms, statistics and layer scales as of a trained one.

    The global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.running_var is not None:
                nn.init.normal_(module.running_mean, std=0.1)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
            elif isinstance(module, nn.LayerNorm) and module.weight is not None:
                nn.init.uniform_(module.weight, 0.5, 1.5)
        for p in model.parameters():
            if p.ndim == 1 and 0 < p.abs().max() < 1e-3:
                nn.init.uniform_(p, 0.5, 1.5)
    return model


def text_batch(kind: str) -> dict[str, Tensor]:
    """Texts of several lengths: padded on the right, or for a decoder, whose prompts end together, on the left."""
    draw = torch.Generator().manual_seed(1)
    ids, mask = torch.randint(3, 64, (ROWS, LENGTH), generator=draw), torch.ones(ROWS, LENGTH, dtype=torch.long)
    for row in range(1, ROWS):
        mask[row, :row] = 0
    if kind != "decoder":
        mask = mask.flip(1)
    batch = {"input_ids": ids * mask, "attention_mask": mask}
    if kind == "decoder":
        labels = batch["input_ids"].clone()
        labels[:, :PROMPT] = -100
        return {**batch, "labels": labels}
    if kind == "encoder":
        return {**batch, "labels": torch.arange(ROWS) % 4}
    return {**batch, "labels": torch.randint(3, 64, (ROWS, 4), generator=draw)}


def image_batch(name: str) -> dict[str, Tensor]:
    """Noise; labels where the model takes them (transformers')."""
    pixels = torch.randn(ROWS, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    return {name: pixels} if name == "x" else {name: pixels, "labels": torch.arange(ROWS) % 4}
