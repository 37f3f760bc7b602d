"""The demo's augmentation, for small sets of drawings: `train_clip.py --augment drawing`."""
import math

import torch
from PIL import Image, ImageChops, ImageFilter


def uniform(low, high):
    return torch.empty(()).uniform_(low, high).item()


def augment_drawing(image, S):
    """RGB image -> [S, S]: turned, zoomed, shifted and sheared a little; at times with its
    edges."""
    angle, shear, dx, dy = uniform(-0.105, 0.105), *(uniform(-0.045, 0.045) for _ in range(3))
    zoom = uniform(0.93, 1.07)
    zx, zy = (side / S * zoom * uniform(0.97, 1.03) for side in image.size)
    cos, sin = math.cos(angle), math.sin(angle)
    a, b, d, e = zx * cos, zx * (shear - sin), zy * sin, zy * cos  # output pixel -> input pixel
    cx, cy = image.width * (0.5 + dx), image.height * (0.5 + dy)
    matrix = a, b, cx - (a + b) * S / 2, d, e, cy - (d + e) * S / 2
    image = image.transform((S, S), Image.AFFINE, matrix, Image.BILINEAR, fillcolor="white")
    edges = image.filter(ImageFilter.CONTOUR)
    return ImageChops.multiply(image, edges) if uniform(0, 1) < 0.3 else image
