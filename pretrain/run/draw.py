"""Small pictures for TensorBoard, as uint8 arrays [height, width, 3]. A plotting library would take 0.2 s for each."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

COLOURS = ((31, 119, 180), (214, 39, 40), (44, 160, 44))
WIDTH, HEIGHT, MARGIN = 360, 240, 36
CELL = 6
"""Pixels of one attention probability in each direction."""


def curves_image(curves: dict[str, NDArray[np.float64]]) -> NDArray[np.uint8]:
    """Curves of falling values: the index across, the value upwards on a logarithmic scale over five decades."""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    highest = max(float(values.max()) for values in curves.values()) or 1.0
    longest = max(len(values) for values in curves.values())
    top = float(np.ceil(np.log10(highest)))
    across, up = WIDTH - 2 * MARGIN, HEIGHT - 2 * MARGIN
    for decade in range(6):
        y = MARGIN + decade / 5 * up
        draw.line([(MARGIN, y), (WIDTH - MARGIN, y)], fill=(220, 220, 220))
        draw.text((4, y - 6), f"1e{top - decade:.0f}", fill="black")
    draw.text((MARGIN, HEIGHT - MARGIN + 4), "1", fill="black")
    draw.text((WIDTH - MARGIN - 20, HEIGHT - MARGIN + 4), f"{longest}", fill="black")
    for number, (name, values) in enumerate(curves.items()):
        share = np.clip((top - np.log10(np.maximum(values, 10.0 ** (top - 6)))) / 5, 0, 1)
        points = [
            (MARGIN + across * index / max(1, longest - 1), MARGIN + up * part) for index, part in enumerate(share)
        ]
        draw.line(points, fill=COLOURS[number], width=2)
        draw.text((MARGIN + 150 * number, 12), name, fill=COLOURS[number])
    return np.asarray(image)


def attention_image(probabilities: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Probabilities [heads, queries, keys], each head a square, white for 0 and dark for 1; four heads in a row."""
    heads, length, _ = probabilities.shape
    across = min(4, heads)
    down = -(-heads // across)
    side = length * CELL + CELL
    grid = np.full((down * side, across * side, 3), 255, np.uint8)
    for head, square in enumerate(probabilities):
        large = np.kron(1 - np.sqrt(square), np.ones((CELL, CELL)))
        y, x = head // across * side, head % across * side
        grid[y : y + length * CELL, x : x + length * CELL] = (large[..., None] * (255, 245, 225)).astype(np.uint8)
        grid[y : y + length * CELL, x + length * CELL] = 160
        grid[y + length * CELL, x : x + length * CELL] = 160
    return grid
