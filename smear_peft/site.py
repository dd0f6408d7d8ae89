"""`Site`: one place in a model for a routed block, as a value that says all that a block needs to know of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """One place for a routed block.

    Attributes:
        name: dotted name in the base model before injection.
        module_type: class name of the wrapped module.
        width: D, channels of the features that the block sees.
        feature_map: whether the channels are at dimension 1, as in (B, D, L) or (B, D, H, W), and not last.
        placement: "input" or "output" of the wrapped module.
        norm: "post_layer_norm", "pre_batch_norm" or "none".
        stack: "encoder" or "decoder" of an encoder-decoder model, None in any other.
        router_input: "own output", or "encoder state" in a decoder.
        bottleneck: r, width of one expert.
        parameters: number of trainable parameters of the block.
    """

    name: str
    module_type: str
    width: int
    feature_map: bool
    placement: str
    norm: str
    stack: str | None
    router_input: str
    bottleneck: int
    parameters: int = 0
