"""CPC as an auxiliary loss of a recurrent model of your own, as with the agents of the paper (arXiv:1807.03748, 3.4).

The model watches a pointer that turns at a speed of its own, through noise, and is to say where the pointer will be
some steps after the end. There are few labelled sequences and many without a label: ``ContrastivePrediction`` learns
from all of them what the recurrent state needs. ``python examples/cpc_auxiliary.py`` trains with and without it.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.heads.prediction import ContrastivePrediction, NegativesConfig

STEPS, AHEAD, SENSORS, DIRECTIONS = 24, 4, 16, 8


class Watcher(nn.Module):
    """A small recurrent model: what it sees (z), what it remembers (c), and an answer from its last state."""

    def __init__(self, dim: int = 48) -> None:
        super().__init__()
        self.see = nn.Sequential(nn.Linear(SENSORS, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.remember = nn.GRU(dim, dim, batch_first=True)
        self.answer = nn.Linear(dim, DIRECTIONS)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map [B, T, sensors] to what is seen and contexts, both [B, T, D], and scores of answers [B, directions]."""
        z = self.see(x)
        c, _ = self.remember(z)
        return z, c, self.answer(c[:, -1])


def sequences(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return what is seen of turning pointers, [n, T, sensors], and where each is ``AHEAD`` steps later, int64 [n]."""
    start = torch.rand(count, 1, generator=generator)
    speed = 0.02 + 0.1 * torch.rand(count, 1, generator=generator)
    turns = start + speed * torch.arange(STEPS + AHEAD)
    sensors = torch.arange(SENSORS) / SENSORS
    clean = torch.cos(2 * torch.pi * (turns[:, :STEPS, None] - sensors))
    noise = torch.randn(clean.shape, generator=generator)
    return clean + noise, (turns[:, -1] % 1 * DIRECTIONS).long()


def train(
    weight: float, steps: int = 400, labelled: int = 48, batch_size: int = 32, seed: int = 0, others: int = 2000
) -> float:
    """Train with the auxiliary loss times ``weight`` (0: without), and return the share of right answers on others."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    known, truth = sequences(labelled, generator)
    model = Watcher()
    auxiliary = ContrastivePrediction(48, 48, steps=8, negatives=NegativesConfig(count=None))
    optimizer = torch.optim.AdamW([*model.parameters(), *auxiliary.parameters()], lr=2e-3, weight_decay=1e-2)
    for _ in range(steps):
        loss = F.cross_entropy(model(known)[2], truth)
        if weight:
            z, c, _ = model(sequences(batch_size, generator)[0])
            loss = loss + weight * auxiliary(z, c).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    unseen, answers = sequences(others, torch.Generator().manual_seed(seed + 1))
    with torch.no_grad():
        return float((model(unseen)[2].argmax(1) == answers).double().mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--labelled", type=int, default=48)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name, weight in (("labels alone", 0.0), ("with CPC beside", 1.0)):
        scores = [train(weight, options.steps, options.labelled, seed=seed) for seed in range(3)]
        print(f"{name}: {', '.join(f'{score:.1%}' for score in scores)} right on sequences it has not seen (3 seeds)")
