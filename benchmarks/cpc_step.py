"""One optimiser step of ``cpc-audio`` on 8 windows of 20,480 samples: ours against the same network in plain torch.

Plain is what one would write from the paper with torch's own parts: ``nn.Conv1d``, a norm over channels, ``nn.GRU``, an
``nn.Linear`` per step ahead, scores by ``einsum``, ``F.cross_entropy`` and torch's default AdamW. Both run in one
process with the same weights, waveforms and candidates, which must give the same loss and gradients before anything is
timed, and take turns. ``--stream`` times ``encoder.step`` on 10 ms at a time besides.

``python benchmarks/cpc_step.py [--threads N] [--batch-size 8] [--repeats 9] [--stream]``
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.engine.optim import adamw, param_groups
from mmssl.heads.prediction import Candidates, ContrastivePrediction, draw_candidates
from mmssl.objectives.cpc import CPC
from tasks.build import build_objective, load_recipe

KERNELS, STRIDES = (10, 8, 4, 4, 4), (5, 4, 2, 2, 2)
CHANNELS, UNITS, STEPS, SAMPLES, RATE, EDGE = 512, 256, 12, 20480, 16000, 2


class ChannelNorm(nn.Module):
    """A LayerNorm over the channels of [B, C, T]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, T] to [B, C, T]."""
        return self.norm(x.transpose(1, 2)).transpose(1, 2)  # type: ignore[no-any-return]


class PlainCPC(nn.Module):
    """The network and its loss as the paper's section 3.1 reads."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv1d(1 if i == 0 else CHANNELS, CHANNELS, kernel, stride)
            for i, (kernel, stride) in enumerate(zip(KERNELS, STRIDES, strict=True))
        )
        self.norms = nn.ModuleList(ChannelNorm() for _ in KERNELS)
        self.gru = nn.GRU(CHANNELS, UNITS, batch_first=True)
        self.predictors = nn.ModuleList(nn.Linear(UNITS, CHANNELS, bias=False) for _ in range(STEPS))

    def forward(self, wave: Tensor, negatives: Callable[[Tensor], Candidates]) -> Tensor:
        """Return the loss of waveforms [B, 1, samples]."""
        x = wave
        for conv, norm, kernel, stride in zip(self.convs, self.norms, KERNELS, STRIDES, strict=True):
            x = F.relu(norm(conv(F.pad(x, (kernel - stride, 0)))))
        z = x.transpose(1, 2)
        c, _ = self.gru(z)
        found = negatives(z)
        losses = []
        for k, predictor in enumerate(self.predictors, 1):
            first = max(k, EDGE)  # tokens that see the zeros before the window are no truth
            prediction, truth = predictor(c[:, first - k : -k]), z[:, first:]
            positive = torch.einsum("btd,btd->bt", prediction, truth).unsqueeze(-1)
            scores = torch.einsum("btd,bmd->btm", prediction, found.vectors)
            place = found.own[:, None] + torch.arange(first, z.shape[1])
            same = found.places[:, None, :] == place[:, :, None]
            spare = torch.zeros_like(same)
            spare[:, :, -1] = ~same.any(-1)
            logits = torch.cat([positive, scores.masked_fill(same | spare, -torch.inf)], -1)
            losses.append(F.cross_entropy(logits.flatten(0, 1), torch.zeros(logits[..., 0].numel(), dtype=torch.long)))
        return torch.stack(losses).mean()


@torch.no_grad()
def copy_weights(ours: CPC, theirs: PlainCPC) -> None:
    """Make plain torch compute what ours does: blocks of taps become kernels."""
    for conv, norm, kernel, mine, my_norm in zip(
        theirs.convs, theirs.norms, KERNELS, ours.encoder.tokenizer.convs.convs, ours.encoder.tokenizer.convs.norms,
        strict=True,
    ):  # fmt: skip
        taps = mine.weight.unflatten(0, (mine.blocks, mine.dim)).unflatten(2, (mine.stride, -1))
        conv.weight.copy_(taps.permute(1, 3, 0, 2).flatten(2)[..., -kernel:])
        conv.bias.copy_(mine.bias)
        norm.norm.load_state_dict(my_norm.state_dict())
    theirs.gru.load_state_dict(ours.encoder.backbone.blocks[0].state_dict())
    head = ours.heads[0]
    assert isinstance(head, ContrastivePrediction)
    for predictor, matrix in zip(theirs.predictors, head.predictor.project.weight.split(CHANNELS), strict=True):
        predictor.weight.copy_(matrix)


def check(ours: Tensor, theirs: Tensor, objective: CPC, plain: PlainCPC) -> str:
    """Compare losses, and the gradients of the GRU and of a convolution's bias; raises AssertionError."""
    pairs = [
        (objective.encoder.backbone.blocks[0].weight_ih_l0.grad, plain.gru.weight_ih_l0.grad),
        (objective.encoder.tokenizer.convs.convs[0].bias.grad, plain.convs[0].bias.grad),
    ]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    apart = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    assert apart < 1e-3, apart
    return f"losses {ours.item():.6f} and {theirs.item():.6f}, gradients apart by {apart:.0e} of their norm"


def measure(threads: int, batch_size: int, repeats: int) -> None:
    """Time steps in turns, and print medians."""
    torch.set_num_threads(threads)
    recipe = load_recipe("cpc-audio")
    objective, plain = build_objective(recipe), PlainCPC()
    assert isinstance(objective, CPC)
    nn.init.normal_(objective.heads[0].predictor.project.weight, std=0.02)  # as trained: at zero, gradients are
    copy_weights(objective, plain)
    batch = {"signal": 0.1 * torch.randn(batch_size, 1, SAMPLES), "seed": torch.arange(batch_size)}
    settings = recipe.objective.negatives  # type: ignore[attr-defined]

    def draw(z: Tensor) -> Candidates:
        present = (torch.arange(z.shape[1]) >= EDGE).expand(batch_size, 1, -1)
        return draw_candidates(z.unsqueeze(1), present, batch["seed"], settings)

    optimizers = adamw(param_groups(objective, 0.0), (0.9, 0.999), 1e-8), torch.optim.AdamW(plain.parameters(), 0.0)
    sides = {"ours": lambda: objective(batch).loss, "plain torch": lambda: plain(batch["signal"], draw)}
    losses = {name: side() for name, side in sides.items()}
    for loss in losses.values():
        loss.backward()
    print(check(*(loss.detach() for loss in losses.values()), objective, plain))
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for (name, side), optimizer in zip(sides.items(), optimizers, strict=True):
            began = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            side().backward()
            optimizer.step()
            times[name].append(time.perf_counter() - began)
    for name, seconds in times.items():
        median = statistics.median(seconds)
        hours = batch_size * SAMPLES / RATE / median
        print(f"{name}: {1e3 * median:.0f} ms a step, {hours:.1f} hours of audio per hour of training")
    ratios = [b / a for a, b in zip(times["ours"], times["plain torch"], strict=True)]
    print(f"ours is {statistics.median(ratios):.2f} x as fast, {threads} threads, batches of {batch_size}")


def stream(threads: int, steps: int = 500) -> None:
    """Time ``encoder.step`` on 10 ms of sound at a time."""
    torch.set_num_threads(threads)
    encoder = build_objective(load_recipe("cpc-audio")).encoders()["audio"].eval()  # type: ignore[operator,union-attr]
    chunks: Iterator[Tensor] = iter(0.1 * torch.randn(steps, 1, 1, 160))
    state, seconds = None, []
    with torch.no_grad():
        for chunk in chunks:
            began = time.perf_counter()
            _, state = encoder.step(chunk, state)
            seconds.append(time.perf_counter() - began)
    hundredths = statistics.quantiles(seconds[20:], n=100)
    median, late = 1e3 * hundredths[49], 1e3 * hundredths[98]
    print(f"10 ms of sound, {threads} threads: median {median:.2f} ms, 99th percentile {late:.2f} ms")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--stream", action="store_true")
    options = parser.parse_args()
    measure(options.threads, options.batch_size, options.repeats)
    if options.stream:
        stream(options.threads)
