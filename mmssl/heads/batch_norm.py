"""Batch normalisation over the global batch, for any device and any number of ranks."""

import torch
from torch import Tensor, nn

from mmssl.distributed import all_reduce, ranks
from mmssl.errors import UserError


class BatchNorm(nn.Module):
    """Normalises each feature to mean 0 and variance 1 (arXiv:1502.03167), without learned gain and bias.

    Statistics are over all ranks, so W ranks see what one process with the whole batch sees, gradients included;
    torch's SyncBatchNorm would do the same but refuses CPU tensors. They are over one micro-batch: with
    ``train.accumulate`` above 1 fewer samples are normalised together, and the running statistics move once per
    micro-batch; so here, unlike elsewhere, the result depends on it. Evaluation uses the running statistics, buffers.
    """

    running_mean: Tensor
    running_var: Tensor
    batches: Tensor

    def __init__(self, dim: int, eps: float = 1e-6, momentum: float = 0.1) -> None:
        """``eps`` is MAE's for linear probes, ``momentum`` torch's: the share of a new batch in what runs."""
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [B, dim] to float32 [B, dim]; while training, ranks must have equally many samples.

        Raises UserError for a training batch of a single sample over all ranks.
        """
        x = x.float()
        if not self.training:
            return (x - self.running_mean) * (self.running_var + self.eps).rsqrt()
        count = len(x) * ranks()
        if count < 2:
            raise UserError("batch normalisation needs 2 samples or more in a micro-batch: raise train.batch_size")
        mean = all_reduce(x.sum(0)) / count
        centred = x - mean
        variance = all_reduce(centred.square().sum(0)) / count
        self._run(mean.detach(), variance.detach() * count / (count - 1))
        return centred * (variance + self.eps).rsqrt()

    @torch.no_grad()
    def _run(self, mean: Tensor, variance: Tensor) -> None:
        self.batches += 1
        # The first batches count equally: at a constant share, a run of few steps would be evaluated with the zeros and
        # ones that the buffers start from. From 1 / momentum batches on this is what torch does.
        share = self.batches.float().reciprocal().clamp(min=self.momentum)
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)
