"""SLIP's self-supervision (arXiv 2112.12750, section 3), for `train_clip.py --ssl`."""
import torch
import torch.nn.functional as F
from PIL import ImageFilter
from torch import nn
from torchvision.transforms import v2

COLOURS = v2.Compose([v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8),
                      v2.RandomGrayscale(0.2), v2.RandomHorizontalFlip()])


def augment_slip(image, S, crop):
    """A view for SLIP's loss, as in its release: a small crop, other colours, a flip, a blur"""
    image = COLOURS(crop(image, S, 0.08))
    radius = torch.empty(()).uniform_(0.1, 2.0).item()
    return image.filter(ImageFilter.GaussianBlur(radius)) if torch.rand(()) < 0.5 else image


def projection_head(width, hidden=4096, out=256):
    """Three layers, BatchNorm after the first two (the release)"""
    layers = [(nn.Linear(n, hidden), nn.BatchNorm1d(hidden), nn.ReLU()) for n in (width, hidden)]
    return nn.Sequential(*layers[0], *layers[1], nn.Linear(hidden, out))


def simclr_loss(head, views, temperature=0.1):
    """NT-Xent. views [N, 2, W]: the image tower's features of two views of all ranks' images

    A view must find the other view of its image among both views of all images, itself excluded.
    BatchNorm needs the whole batch, so every rank computes the loss of all ranks' features. As in
    the release, the head sees the first views, then the second."""
    z = torch.cat([head(view) for view in views.unbind(1)])  # [2 N, 256]
    z = F.normalize(z.float(), dim=-1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    labels = torch.arange(len(z), device=z.device).roll(len(z) // 2)
    return F.cross_entropy((z @ z.T / temperature).masked_fill(itself, -torch.inf), labels)
