"""Reading the fixtures (tests/fixtures/oracle), and comparing with them at their own tolerances."""

import json
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file

FOLDER = Path(__file__).parents[1] / "fixtures" / "oracle"
NAMES = [entry["name"] for entry in json.loads((FOLDER / "INDEX.json").read_text())]
OUTPUT = {torch.float64: 1e-7, torch.float32: 1e-4}
GRADIENT = {torch.float64: 1e-7, torch.float32: 1e-3}
ZERO = {torch.float64: 1e-12, torch.float32: 1e-7}


class Fixture:
    """One fixture in one precision."""

    def __init__(self, name: str, dtype: torch.dtype):
        meta = json.loads((FOLDER / f"{name}.json").read_text())
        tensors = load_file(FOLDER / f"{name}.safetensors")
        if dtype == torch.float64:
            tensors = {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}
            tensors.update(load_file(FOLDER / f"{name}.f64.safetensors"))
        self.name, self.dtype, self.tensors = name, dtype, tensors
        self.config = meta["config"]
        self.zero = set(meta["zero_up_to_roundoff"])

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.tensors[key]

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors under a prefix, without it."""
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}

    def check(self, key: str, value: torch.Tensor, tolerance: float | None = None) -> None:
        """Assert that a value is the fixture's; a `tolerance` of one's own is relative to the largest entry."""
        expected = self[key]
        kind = GRADIENT if key.startswith("grad") else OUTPUT
        scale = max(float(expected.abs().max()), 1e-6) if expected.is_floating_point() else 0.0
        rtol = atol = kind[self.dtype] if tolerance is None else tolerance
        if tolerance is not None or self.dtype == torch.float64:
            atol = rtol * scale
        if key in self.zero:
            rtol, atol = 0.0, ZERO[self.dtype] if tolerance is None else tolerance
        torch.testing.assert_close(
            value.detach().to(expected.dtype), expected, rtol=rtol, atol=atol, msg=lambda m: f"{self.name} {key}: {m}"
        )


@contextmanager
def draws(monkeypatch, **returns):
    """Let torch's random functions return recorded draws, one after another: draws(mp, rand=[u], multinomial=[a])."""
    with monkeypatch.context() as patch:
        for name, values in returns.items():
            queue = list(values)

            def replay(*args, queue=queue, **kwargs):
                return queue.pop(0)

            patch.setattr(torch, name, replay)
        yield
