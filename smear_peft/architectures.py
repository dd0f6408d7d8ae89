"""The families of models that smear_peft knows by heart, as data: one row a family.

A row says which modules are sites, by the class that holds them. Nothing else in the package knows an architecture: a
new family is a new row in `ARCHITECTURES` (docs/architectures.md says how), and a model without a row works with
`target_modules`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Architecture:
    """One family.

    Attributes:
        family: its name, as messages and the docs say it.
        package: the Python module or package that its classes live in.
        sites: "Class.child": that child of every module of that class is a site; "Class.child.grandchild" goes deeper.
        layer_norms: classes of the layer norms that train by default.
    """

    family: str
    package: str
    sites: tuple[str, ...]
    layer_norms: tuple[str, ...] = ()

    def owns(self, kind: type) -> bool:
        """Whether a class is one of this family's."""
        return f"{kind.__module__}.".startswith(f"{self.package}.")


def _t5(family: str, name: str) -> Architecture:
    """T5 of some version: after each attention and each feed-forward layer; layer norms train (paper, section 4)."""
    sites = (f"{name}Attention.o", f"{name}DenseActDense.wo", f"{name}DenseGatedActDense.wo")
    return Architecture(family, f"transformers.models.{family}", sites, (f"{name}LayerNorm",))


def _text(family: str, *sites: str) -> Architecture:
    """Any other of transformers' text models: after each attention and each feed-forward layer."""
    return Architecture(family, f"transformers.models.{family}", sites)


def _image(family: str, *sites: str) -> Architecture:
    """One of transformers' image models."""
    return Architecture(family, f"transformers.models.{family}", sites)


def _timm(family: str, module: str, *sites: str) -> Architecture:
    """One of timm's image models."""
    return Architecture(f"timm {family}", f"timm.models.{module}", sites)


ARCHITECTURES: tuple[Architecture, ...] = (
    # Encoder-decoders. Their decoders' routers look at the encoder's state.
    _t5("t5", "T5"),
    _t5("mt5", "MT5"),
    _t5("umt5", "UMT5"),
    _text("bart", "BartAttention.out_proj", "BartEncoderLayer.fc2", "BartDecoderLayer.fc2"),
    _text("mbart", "MBartAttention.out_proj", "MBartEncoderLayer.fc2", "MBartDecoderLayer.fc2"),
    # Encoders. Their routers look at the unpadded positions.
    _text("bert", "BertSelfOutput.dense", "BertOutput.dense"),
    _text("roberta", "RobertaSelfOutput.dense", "RobertaOutput.dense"),
    _text("xlm_roberta", "XLMRobertaSelfOutput.dense", "XLMRobertaOutput.dense"),
    _text("distilbert", "DistilBertSelfAttention.out_lin", "FFN.lin2"),
    _text("deberta_v2", "DebertaV2SelfOutput.dense", "DebertaV2Output.dense"),
    _text("electra", "ElectraSelfOutput.dense", "ElectraOutput.dense"),
    _text("modernbert", "ModernBertAttention.Wo", "ModernBertMLP.Wo"),
    # Decoders alone. Their routers look at the prompt (prompt.py).
    _text("llama", "LlamaAttention.o_proj", "LlamaMLP.down_proj"),
    _text("mistral", "MistralAttention.o_proj", "MistralMLP.down_proj"),
    _text("qwen2", "Qwen2Attention.o_proj", "Qwen2MLP.down_proj"),
    _text("qwen3", "Qwen3Attention.o_proj", "Qwen3MLP.down_proj"),
    _text("gemma", "GemmaAttention.o_proj", "GemmaMLP.down_proj"),
    _text("gemma2", "Gemma2Attention.o_proj", "Gemma2MLP.down_proj"),
    _text("gemma3", "Gemma3Attention.o_proj", "Gemma3MLP.down_proj"),
    _text("gpt2", "GPT2Attention.c_proj", "GPT2MLP.c_proj"),
    _text("opt", "OPTAttention.out_proj", "OPTDecoderLayer.fc2"),
    # Images: transformers around patches, then convolutions.
    _image("vit", "ViTAttention.o_proj", "ViTMLP.fc2"),
    _image("deit", "DeiTAttention.o_proj", "DeiTMLP.fc2"),
    _timm("vit", "vision_transformer", "Block.attn.proj", "Block.mlp.fc2"),
    # Swin's attention runs on windows, of which an example has many: a route per window would be none per example.
    _image("swin", "SwinMLP.fc2"),
    _image("swinv2", "Swinv2Output.dense"),
    _timm("swin", "swin_transformer", "SwinTransformerBlock.mlp.fc2"),
    _timm("swin v2", "swin_transformer_v2", "SwinTransformerV2Block.mlp.fc2"),
    _image("convnext", "ConvNextLayer.pwconv2"),
    _image("convnextv2", "ConvNextV2Layer.pwconv2"),
    _timm("convnext", "convnext", "ConvNeXtBlock.mlp.fc2"),
    # Before the last ReLU of each residual block (paper, section 4). The pre-activation form has none: before the sum.
    _image("resnet", "ResNetBasicLayer.activation", "ResNetBottleNeckLayer.activation"),
    _timm("resnet", "resnet", "BasicBlock.act2", "Bottleneck.act3"),
    _timm("sk resnet", "sknet", "SelectiveKernelBasic.act", "SelectiveKernelBottleneck.act"),
    _timm("tresnet", "tresnet", "BasicBlock.act", "Bottleneck.act"),
    _timm("resnest", "resnest", "ResNestBottleneck.act3"),
    _timm("byob", "byobnet", "BasicBlock.act", "BottleneckBlock.act", "EdgeBlock.act", "SelfAttnBlock.act"),
    _timm("resnet v2", "resnetv2", "Bottleneck.act3", "PreActBottleneck.conv3", "PreActBasic.conv2"),
)


def layer_norm_names(modules: dict[str, nn.Module]) -> list[str]:
    """Names of the layer norms of which copies can train: in T5 those of the paper, else all that have a weight."""
    return paper_norm_names(modules) or [name for name, module in modules.items() if is_layer_norm(module)]


def is_layer_norm(module: nn.Module) -> bool:
    """Most models of transformers have classes of their own for it, which say so in their names."""
    named = isinstance(module, nn.LayerNorm) or type(module).__name__.endswith(("LayerNorm", "RMSNorm"))
    return named and isinstance(getattr(module, "weight", None), nn.Parameter)


def paper_norm_names(modules: dict[str, nn.Module]) -> list[str]:
    """Names of the layer norms that the paper trains in models of this kind."""
    return [
        name
        for name, module in modules.items()
        for row in ARCHITECTURES
        if type(module).__name__ in row.layer_norms and row.owns(type(module))
    ]


def site_names(modules: dict[str, nn.Module]) -> list[str]:
    """Names of the modules that are sites by some family's row."""
    return [name for name in modules if any(is_site(name, modules, row) for row in ARCHITECTURES)]


def is_site(name: str, modules: dict[str, nn.Module], row: Architecture) -> bool:
    """Whether the module called `name` is a site of a family."""
    for site in row.sites:
        holder_class, _, path = site.partition(".")
        if name == path or name.endswith(f".{path}"):
            holder = modules.get(name.removesuffix(path).removesuffix("."))
            kinds = type(holder).__mro__ if holder is not None else ()
            if any(kind.__name__ == holder_class and row.owns(kind) for kind in kinds):
                return True
    return False
