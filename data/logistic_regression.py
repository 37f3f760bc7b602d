"""Logistic regression by L-BFGS on any device: eval_zeroshot.py's linear probe; not a command."""
import torch
import torch.nn.functional as F


class LogisticRegression:
    """The mean cross-entropy + penalty / 2 * |W|^2, without a penalty on the bias: the objective of
    scikit-learn's LogisticRegression(C=1 / (penalty * n)). A fit starts from the result before."""

    def __init__(self, d, classes, device="cpu", dtype=torch.float32):
        self.weight = torch.zeros(classes, d, device=device, dtype=dtype, requires_grad=True)
        self.bias = torch.zeros(classes, device=device, dtype=dtype, requires_grad=True)

    def fit(self, x, y, penalty, tolerance=1e-5, steps=1000, block=2 ** 16):
        """x [n, d], y [n]. Ends when no gradient is above `tolerance`, or after `steps`."""
        optimizer = torch.optim.LBFGS(
            [self.weight, self.bias], max_iter=steps, tolerance_grad=tolerance, tolerance_change=0,
            line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            loss = penalty / 2 * self.weight.square().sum()
            loss.backward()
            # block by block: the logits of a million images would fill the memory
            for part, target in zip(x.split(block), y.split(block)):
                logits = part @ self.weight.T + self.bias
                fit = F.cross_entropy(logits, target, reduction="sum") / len(x)
                fit.backward()
                loss = loss.detach() + fit.detach()
            return loss

        optimizer.step(closure)
        return self

    @torch.no_grad()
    def predict(self, x):
        """[n, d] -> class [n]"""
        return (x @ self.weight.T + self.bias).argmax(1)
