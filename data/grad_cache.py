"""GradCache (Gao et al. 2021): the loss of a batch that is too large for memory, for
`train_clip.py --micro-batch`. Same loss and gradients, for a second forward pass."""
from contextlib import nullcontext

import torch


def backward(model, ddp_model, objective, chunks, drawn, autocast):
    """Put the gradients of the whole batch's loss into .grad, return the loss. `ddp_model` is the
    model or its DDP; chunks: [(images, Texts), ...].

    Compute all features without gradients, then the loss of the whole batch and its gradients with
    respect to the features, then each chunk again, to carry these into the weights."""
    with torch.no_grad(), autocast():
        scales, *features = zip(*(model(*chunk) for chunk in chunks))
    scale = scales[0].requires_grad_()
    features = [torch.cat(parts).requires_grad_() for parts in features]
    loss = objective(drawn, scale, *features)
    loss.backward()
    gradients = zip(*(feature.grad.split(len(chunks[0][0])) for feature in features))
    for i, (chunk, gradient) in enumerate(zip(chunks, gradients), 1):
        once = ddp_model is model or i == len(chunks)  # ranks exchange gradients in the last chunk
        with nullcontext() if once else ddp_model.no_sync():
            with autocast():
                outputs = ddp_model(*chunk)
            torch.autograd.backward(outputs, [scale.grad / len(chunks), *gradient])
    return loss
