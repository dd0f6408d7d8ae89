"""`Site`: one place in a model for a routed block, as a value that says all that a block needs to know; `Sites`."""

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
        placement: "input" or "output" of the wrapped module; "parallel": experts read one, add to the other.
        norm: "post_layer_norm", "pre_batch_norm" or "none".
        stack: "encoder" or "decoder" of an encoder-decoder model, None in any other.
        router_input: "own output"; "encoder state" in a decoder with an encoder; "prompt" in one without: the own
            output at the prompt's positions.
        bottleneck: r, width of one expert.
        parameters: number of trainable parameters of the block.
        inputs: width of what the experts read, where that is not D.
        encoder_width: width of the encoder's state, where the router reads that.
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
    inputs: int | None = None
    encoder_width: int | None = None

    @property
    def router_width(self) -> int:
        """Width of what the router reads."""
        return self.encoder_width or self.width


class Sites(list[Site]):
    """A list of sites that prints as a table."""

    COLUMNS = ("site", "module", "width", "r", "placement", "norm", "router sees", "parameters")

    def __str__(self) -> str:
        rows = [
            (s.name, s.module_type, s.width, s.bottleneck, s.placement, s.norm, s.router_input, f"{s.parameters:,}")
            for s in self
        ]
        total = ("", *[""] * (len(self.COLUMNS) - 2), f"{sum(site.parameters for site in self):,}")
        lines = [tuple(map(str, row)) for row in (self.COLUMNS, *rows, total)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(_line(line, widths) for line in lines)


NUMBERS = (2, 3, 7)  # columns that are set right


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    columns = enumerate(zip(cells, widths, strict=True))
    return "  ".join(cell.rjust(width) if i in NUMBERS else cell.ljust(width) for i, (cell, width) in columns)
