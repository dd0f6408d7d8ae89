"""Real handwritten digits (scikit-learn's 1,797, no download) in six domains that look nothing like each other.

Each 8 x 8 digit is scaled to 32 x 32 "ink" in [0, 1] and rendered six times. Everything follows from one seed. A digit
belongs to one split in all of its six forms.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy import ndimage
from sklearn.datasets import load_digits

from recipes.image_set import ImageSet, Splits

SIZE = 32
SHARES = (0.65, 0.15, 0.20)

Array = np.ndarray
Draw = np.random.Generator


def plain(ink: Array, draw: Draw) -> Array:
    """White on black, as it was scanned: the domain that the base model knows."""
    return np.repeat(ink[..., None], 3, -1)


def paper(ink: Array, draw: Draw) -> Array:
    """Dark ink on coloured, ruled paper."""
    sheet, pen = draw.uniform(0.65, 1.0, (len(ink), 1, 1, 3)), draw.uniform(0.0, 0.35, (len(ink), 1, 1, 3))
    page = np.broadcast_to(sheet, (*ink.shape, 3)).copy()
    page[:, 5::7] -= 0.18
    return _over(page, pen, ink)


def sketch(ink: Array, draw: Draw) -> Array:
    """A pencil's outline on white, with gaps."""
    soft = ndimage.gaussian_filter(ink, (0, 0.7, 0.7))
    edge = np.hypot(ndimage.sobel(soft, 1), ndimage.sobel(soft, 2))
    edge = np.clip(1.3 * edge / edge.max((1, 2), keepdims=True) - 0.35, 0, 1)
    pressure = np.clip(_clouds(draw, ink.shape, 1.5) + 0.25, 0, 1)
    return np.repeat((1 - 0.9 * edge * pressure)[..., None], 3, -1)


def painting(ink: Array, draw: Draw) -> Array:
    """Two colours in broad brush strokes that run into each other."""
    ground, paint = _two_colours(draw, len(ink))
    wet = np.clip(1.5 * ndimage.gaussian_filter(ink, (0, 1.5, 1.5)), 0, 1)
    strokes = np.stack([_clouds(draw, ink.shape, (0.6, 3.0)) for _ in range(3)], -1) - 0.5
    return _over(ground, paint, wet) + 0.5 * strokes


def photo(ink: Array, draw: Draw) -> Array:
    """A sign before a busy scene: uneven light, little contrast, sensor noise."""
    scene = np.stack([_clouds(draw, ink.shape, 3.0) for _ in range(3)], -1)
    light = np.linspace(-0.25, 0.25, SIZE) * draw.choice([-1, 1], (len(ink), 1))
    colour = np.where(draw.random((len(ink), 1, 1, 1)) < 0.5, 0.95, 0.05) + draw.uniform(
        -0.05, 0.05, (len(ink), 1, 1, 3)
    )
    view = _over(0.2 + 0.6 * scene, colour, 0.85 * ink) + light[:, None, :, None]
    return view + draw.normal(0, 0.08, view.shape)


def infograph(ink: Array, draw: Draw) -> Array:
    """A small tilted digit in a flat colour, among bars and boxes."""
    angles, scale = draw.uniform(-40, 40, len(ink)), 0.72
    tilted = np.stack([_turned(one, angle, scale) for one, angle in zip(ink, angles, strict=True)])
    page = np.ones((*ink.shape, 3))
    page[:, :4] = draw.uniform(0.2, 0.8, (len(ink), 1, 1, 3))
    heights, colours = draw.integers(2, 9, (len(ink), 6)), draw.uniform(0.1, 0.9, (len(ink), 6, 3))
    for one, tops, tones in zip(page, heights, colours, strict=True):
        for bar, (top, tone) in enumerate(zip(tops, tones, strict=True)):
            one[SIZE - top :, 1 + 5 * bar : 5 + 5 * bar] = tone
    return _over(page, draw.uniform(0.0, 0.55, (len(ink), 1, 1, 3)), tilted)


DOMAINS: dict[str, Callable[[Array, Draw], Array]] = {
    render.__name__: render for render in (plain, paper, sketch, painting, photo, infograph)
}


def load_splits(seed: int = 42) -> Splits:
    """Train, validation and test parts (65, 15 and 20% of the digits), each in all six domains.

    Args:
        seed: of the rendering and of the split.
    """
    data = load_digits()
    ink = _as_ink(data.images)
    order = np.random.default_rng(seed).permutation(len(ink))
    images = [_rendered(render, ink, np.random.default_rng([seed, i])) for i, render in enumerate(DOMAINS.values())]
    cuts = np.cumsum([round(share * len(ink)) for share in SHARES[:-1]])
    return Splits(*(_part(images, data.target, part) for part in np.split(order, cuts)))


def _part(images: list[Array], target: Array, digits: Array) -> ImageSet:
    whole = np.concatenate([of_domain[digits] for of_domain in images])
    return ImageSet(
        images=torch.from_numpy(whole).permute(0, 3, 1, 2).contiguous(),
        labels=torch.from_numpy(np.tile(target[digits], len(images))).long(),
        domains=torch.arange(len(images)).repeat_interleave(len(digits)),
        names=[f"{domain}/{target[digit]}/{digit:04d}" for domain in DOMAINS for digit in digits],
        domain_names=list(DOMAINS),
    )


def _rendered(render: Callable[[Array, Draw], Array], ink: Array, draw: Draw) -> Array:
    return np.round(255 * np.clip(render(ink, draw), 0, 1)).astype(np.uint8)


def _as_ink(images: Array) -> Array:
    """(M, 8, 8) of 0 to 16 -> (M, 32, 32) of [0, 1], sharpened so that the scaled strokes keep an edge."""
    large = ndimage.zoom(images / 16, (1, SIZE / 8, SIZE / 8), order=3, mode="grid-constant", grid_mode=True)
    return np.clip(1.6 * large - 0.3, 0, 1)


def _over(ground: Array, colour: Array, cover: Array) -> Array:
    """Paint of a colour over (M, S, S, 3), as thick as `cover` (M, S, S)."""
    return ground * (1 - cover[..., None]) + colour * cover[..., None]


def _clouds(draw: Draw, shape: tuple[int, ...], width: float | tuple[float, float]) -> Array:
    """Smooth noise (M, S, S) in [0, 1], blots about `width` pixels wide."""
    high, wide = width if isinstance(width, tuple) else (width, width)
    noise = ndimage.gaussian_filter(draw.normal(size=shape), (0, high, wide))
    return np.clip(0.5 + 0.25 * noise / noise.std(), 0, 1)


def _two_colours(draw: Draw, count: int) -> tuple[Array, Array]:
    """Two colours (M, 1, 1, 3) of clearly different brightness, either one the lighter."""
    dark, light = draw.uniform(0.1, 0.4, (count, 1, 1, 3)), draw.uniform(0.6, 0.9, (count, 1, 1, 3))
    swap = draw.random((count, 1, 1, 1)) < 0.5
    return np.where(swap, light, dark), np.where(swap, dark, light)


def _turned(ink: Array, degrees: float, scale: float) -> Array:
    """(S, S) turned about its centre and made smaller."""
    angle = np.deg2rad(degrees)
    matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / scale
    centre = np.array([(SIZE - 1) / 2] * 2)
    return np.clip(ndimage.affine_transform(ink, matrix, centre - matrix @ centre, order=1), 0, 1)
