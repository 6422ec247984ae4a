"""Label propagation with several encoders on the same sequences: a table, differences in pairs, and what features hold.

``python benchmarks/following.py DIR NAME=RUN ... [--short-side 240] [--kind masks|keypoints] --out OUT``; DIR is laid
out as DAVIS-2017. Raw patches and random weights, in the shape of the first run, are measured too. A difference is of
the first score (J&F, or PCK@0.1), its interval from bootstrap resamples of the sequences, the same for both sides. The
share of position is that of the features' variance, over the first and the middle frame of every sequence, which
depends on the token's place alone.
"""

import argparse
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from modalities.encoder import Encoder, load
from modalities.image_read import decode
from tasks.following import Follower, checked, fresh
from tasks.propagate import PropagateResult, propagate
from tasks.segments import draws
from tasks.sequences import find_sequences


def position_share(encoder: Encoder, data: Path, kind: str, short_side: int | None) -> float:
    """Return the share of the last block's variance that the token's place explains, freed of what chance explains."""
    settings = checked(encoder, {"short_side": short_side})
    parts: list[Tensor] = []
    for sequence in find_sequences(data, kind):  # type: ignore[arg-type]
        follower = Follower(encoder, settings, sequence.size)
        chosen = sequence.frames[0], sequence.frames[len(sequence.frames) // 2]
        frames = np.stack([np.asarray(decode(str(path))) for path in chosen])
        parts.append(normalize(follower.features(frames), dim=-1))
    features = torch.cat(parts)
    count, place = len(features), features.mean(0)
    within = (features - place).square().sum(-1).mean() * count / (count - 1)
    between = (place - place.mean(0)).square().sum(-1).mean() - within / count
    return float(between / (features - features.mean((0, 1))).square().sum(-1).mean())


def row(name: str, result: PropagateResult, share: float | None) -> str:
    """Return a line of the table."""
    first, *others = result.scores.values()
    cells = [name, f"{100 * first.value:.1f} ({100 * first.low:.1f}-{100 * first.high:.1f})"]
    cells += [f"{100 * score.value:.1f}" for score in others]
    return f"| {' | '.join([*cells, '' if share is None else f'{100 * share:.0f} %'])} |"


def sums(result: PropagateResult) -> np.ndarray:  # type: ignore[type-arg]
    """Return the sum over each sequence's objects of its first score, and their number: [sequences, 2]."""
    first = next(iter(result.scores))
    tables = [list(one.scored.parts.values()) for one in result.sequences if one.scored is not None]
    return np.array([[sum(part[first] for part in parts), len(parts)] for parts in tables])


def difference(one: PropagateResult, other: PropagateResult) -> str:
    """Return how much better the one is, per object, in per cent, with its interval."""
    ours, theirs = sums(one), sums(other)
    drawn = draws(len(ours), seed=0, resamples=2000)
    values = 100 * (drawn @ (ours[:, 0] - theirs[:, 0])) / (drawn @ ours[:, 1])
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return f"{values[0]:+.1f} ({low:.1f} to {high:.1f})"


def main(words: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("runs", nargs="+", help="NAME=RUN")
    parser.add_argument("--short-side", type=int)
    parser.add_argument("--kind", default="masks", choices=["masks", "keypoints"])
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(words)
    loaded = {name: load(run) for name, _, run in (word.partition("=") for word in given.runs)}
    first = next(iter(loaded.values()))
    found: dict[str, PropagateResult] = {}

    def measure(name: str, encoder: Encoder, layer: int | str | None = None) -> None:
        found[name] = propagate(
            encoder, given.data, given.kind, given.out / name.replace(" ", "-"), films=False, layer=layer,
            short_side=given.short_side,
        )  # fmt: skip
        share = None if layer == "patches" else position_share(encoder, given.data, given.kind, given.short_side)
        if len(found) == 1:
            names = ["", *found[name].scores, "position"]
            print(f"| {' | '.join(names)} |\n|---|{'--:|' * (len(names) - 1)}")
        print(row(name, found[name], share), flush=True)

    measure("raw patches", first, "patches")
    measure("random weights", fresh(first, 0))
    for name, encoder in loaded.items():
        measure(name, encoder)
    print()
    for one, other in combinations(reversed(found), 2):
        print(f"{one} - {other}: {difference(found[one], found[other])}")


if __name__ == "__main__":
    main()
