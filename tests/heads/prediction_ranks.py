"""What each rank of ``test_two_ranks_equal_one_process`` runs on its half of the batch."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmssl.heads.prediction import ContrastivePrediction, NegativesConfig

BATCH, LENGTH, WIDTH = 6, 9, 5
SETTINGS = {
    "mixed": {"count": 12},
    "all": {"count": None},
    "speaker": {"source": "speaker", "count": 7},
    "sequence": {"source": "sequence", "count": 4},
    "whole-sequence": {"source": "sequence", "count": None},
    "excl": {"current": False, "count": 10},
    "excl-all": {"current": False, "count": None},
    "more-than-there-is": {"count": 45},
    "excl-more-than-there-is": {"current": False, "count": 30},
}
LENGTHS = (9, 4, 1, 9, 6, 2)
"""Moments that are no padding; the first half is the first rank's."""


class Model(nn.Module):
    """Something seen, a recurrent context of it, and the head."""

    def __init__(self, negatives: NegativesConfig) -> None:
        super().__init__()
        self.see, self.remember = nn.Linear(3, WIDTH), nn.GRU(WIDTH, 4, batch_first=True)
        self.head = ContrastivePrediction(WIDTH, 4, steps=3, skip=1, negatives=negatives)
        for weight in self.head.parameters():  # which begin at zero
            nn.init.normal_(weight)

    def forward(self, x: Tensor, seeds: Tensor, present: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and the metrics of sequences [B, T, 3]."""
        z = self.see(x)
        return self.head(z, self.remember(z)[0], seeds, present)


def walk(rank: int, size: int) -> dict[str, Tensor]:
    """Return for all settings, with and without padding, the loss, metrics and gradients as engines average them."""
    x = torch.randn(BATCH, LENGTH, 3, generator=torch.Generator().manual_seed(1))
    seeds = torch.tensor([11, 2**62, 5, -9, 0, 77])
    present = torch.arange(LENGTH) < torch.tensor(LENGTHS).unsqueeze(1)
    mine = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
    found = {}
    for name, settings in SETTINGS.items():
        for padded in (False, True):
            torch.manual_seed(0)
            model = Model(NegativesConfig(**settings))
            loss, metrics = model(x[mine], seeds[mine], present[mine] if padded else None)
            (loss / size).backward()
            values = {"loss": loss.detach() / size, **{key: value / size for key, value in metrics.items()}}
            values |= {f"grad-{key}": parameter.grad for key, parameter in model.named_parameters()}
            for key, value in values.items():
                total = value.clone()
                if size > 1:
                    dist.all_reduce(total)
                found[f"{name}{'-padded' * padded}/{key}"] = total
    return found
