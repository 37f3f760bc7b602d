"""The resize of VeCLIP's released checkpoints, for train_clip.eval_transform."""
import torch.nn.functional as F


def resize_unsmoothed(pixels, S):
    """[3, h, w] -> [3, S, S]: shorter side to S without antialias, centre crop. Sizes and crop are
    rounded as in VeCLIP's release."""
    h, w = pixels.shape[1:]
    h, w = max(S, round(S * h / w)), max(S, round(S * w / h))
    top, left = (h - S) // 2, (w - S) // 2
    return F.interpolate(pixels[None], (h, w), mode="bilinear")[0, :, top:top + S, left:left + S]
