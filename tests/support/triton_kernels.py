"""The Triton kernels of TRL's fused head in torch, for TRL 1.15, which has no others: Triton's interpreter is slow."""

import torch


class Launched:
    """Called as a Triton kernel is, the grid first, and looks like the one in whose place it is."""

    def __init__(self, function, kernel):
        self.function, self.fn = function, kernel.fn

    def __getitem__(self, grid):
        return self.function


def _logits(products, logit_scale, softcap, inv_t, HAS_SOFTCAP):
    logits = products * logit_scale
    if HAS_SOFTCAP:
        logits = softcap * torch.tanh(logits / softcap)
    return logits * inv_t


def forward_kernel(
    tile, stride, targets, largest, total, weighted, squares, sums, before, target_logit, start, width, *,
    BLOCK_SIZE, HAS_ENTROPY, HAS_LOG_SUM_SQ_PROBS, HAS_MEAN_LOGITS, HAS_IS_TOP1, **transform,
):  # fmt: skip
    """Add a range of the vocabulary to the running sums and maxima of N positions, whatever is asked for."""
    logits = _logits(tile.float(), **transform)
    former = largest.clone()
    largest.copy_(torch.maximum(former, logits.amax(-1)))
    shrink, exps = (former - largest).exp(), (logits - largest.unsqueeze(-1)).exp()
    total.mul_(shrink).add_(exps.sum(-1))
    weighted.mul_(shrink).add_((exps * logits).sum(-1))
    squares.mul_(shrink.square()).add_(exps.square().sum(-1))
    sums += logits.sum(-1)
    tokens, targets = torch.arange(start, start + width, device=tile.device), targets.unsqueeze(-1)
    earlier = logits.masked_fill(tokens >= targets, float("-inf"))
    before.copy_(torch.maximum(before, earlier.amax(-1)))
    is_target = tokens == targets
    target_logit += torch.where(is_target, logits, 0).sum(-1)


def backward_kernel(
    tile, stride, targets, log_z, entropy, grad_log_probs, grad_entropy, start, width, *,
    BLOCK_SIZE, HAS_LOGPROB_GRAD, HAS_ENTROPY_GRAD, **transform,
):  # fmt: skip
    """Overwrite products with their gradients, by autograd."""
    is_target = torch.arange(start, start + width, device=tile.device) == targets.unsqueeze(-1)
    with torch.enable_grad():
        products = tile.float().requires_grad_()
        logits = _logits(products, **transform)
    log_probs = logits.detach() - log_z.unsqueeze(-1)
    grads = torch.zeros_like(log_probs)
    if HAS_LOGPROB_GRAD:
        grads += grad_log_probs.unsqueeze(-1) * (is_target.float() - log_probs.exp())
    if HAS_ENTROPY_GRAD:
        grads -= grad_entropy.unsqueeze(-1) * log_probs.exp() * (log_probs + entropy.unsqueeze(-1))
    tile.copy_(torch.autograd.grad(logits, products, grads)[0])
