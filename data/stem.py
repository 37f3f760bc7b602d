"""The first layers of the preset nano-conv: convolutions in place of patches, as in arXiv
2106.14881, but with pooling and without BatchNorm."""
from torch import nn


def conv_stem(width, patch_size):
    """[B, 3, S, S] -> [B, width, S / p, S / p]: each layer halves the sides, so p is a power of 2.

    A small ViT from scratch learns small objects hundreds of steps sooner this way. No BatchNorm,
    which would be faster still, but would make an image's features depend on the batch it is in.
    """
    layers, channels, steps = [], 3, patch_size.bit_length() - 1
    for step in reversed(range(steps)):
        layers += [nn.Conv2d(channels, width >> step, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        channels = width >> step
        nn.init.kaiming_normal_(layers[-3].weight)
    return nn.Sequential(*layers)
