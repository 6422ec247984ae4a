"""What pictures and names teach: zero-shot and retrieval, of known and new things, in the style seen and another.

``python benchmarks/clip_table.py DATA NAME=RUN ... [--style google] [--threads N]``

DATA has a ``manifest.csv`` with the columns path, caption, split and style; every picture of the split ``train`` in the
given style was trained on with its caption, and those of the split ``test`` show other things. Every RUN is one of
``clip-tiny`` or the like. Names are told among all names of the same pictures. Nearest: how often the nearest picture
in the given style shows the same thing as one in the other style, by the run's tower of pictures and by raw pixels.
Intervals of 95 % are bootstraps over pictures.
"""

import argparse
from pathlib import Path

import torch

from mmssl.data.listing import Listing, list_files
from mmssl.data.pairs import list_pairs
from modalities.joint import JointEncoder, joint_encoders
from tasks.features import Extractor, RawPixels
from tasks.knn import knn
from tasks.retrieve import direction, matches
from tasks.zero_shot import zero_shot
from tasks.zero_shot_classifier import ZeroShotClassifier

NAME = "caption"


def of_style(listing: Listing, style: str) -> Listing:
    """Return the files drawn in a style."""
    return listing.select([i for i, one in enumerate(listing.columns["style"]) if one == style])


def zero_shot_rows(name: str, towers: dict[str, JointEncoder], files: dict[tuple[str, str], Listing]) -> None:
    """Print a row per kind of pictures."""
    for (style, split), listing in files.items():
        names = sorted(set(listing.labels(NAME)))
        scores = zero_shot(ZeroShotClassifier(towers, names), listing, NAME).measured.scores
        found = f"{scores['top1']} | {scores['top5']}"
        print(f"| {name} | {style} {split} | {len(names):,} | {found} | {1 / len(names):.2%} |")


def retrieval_rows(name: str, towers: dict[str, JointEncoder], data: Path, styles: list[str]) -> None:
    """Print a row per direction: of the things that nobody saw, in each style, and of the known ones in the other."""
    image, text = towers["image"], towers["text"]
    for split, style in (("train", styles[1]), *(("test", style) for style in styles)):
        listing = list_pairs(data, [image.encoder.kind, text.encoder.kind], split=split)
        match = matches(image, text, of_style(listing, style))[0]
        for way in (match, match.turned()):
            found = direction(way)
            recalls = " | ".join(map(str, found.recall.values()))
            print(f"| {name} | {style} {split} | {way.name.replace('_', ' ')} | {recalls} |")


def nearest_row(name: str, extractor: Extractor, files: dict[tuple[str, str], Listing], styles: list[str]) -> None:
    """Print how often the nearest picture of the other style shows the same thing."""
    seen, other = styles
    scores = []
    for split in ("train", "test"):
        drawn, asked = files[seen, split], files[other, split]
        both = set(drawn.labels(NAME)) & set(asked.labels(NAME))
        drawn, asked = (
            one.select([i for i, label in enumerate(one.labels(NAME)) if label in both]) for one in (drawn, asked)
        )
        scores.append(knn(extractor, drawn, asked, NAME, k=(1,)).scores[1]["top1"])
    print(f"| {name} | {scores[0]} | {scores[1]} |")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN")
    parser.add_argument("--style", default="google")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    runs = {name: joint_encoders(run) for name, _, run in (one.partition("=") for one in asked.runs)}
    first = next(iter(runs.values()))["image"].encoder
    splits = {split: list_files(asked.data, first.kind, split=split) for split in ("train", "test")}
    styles = [asked.style, *sorted({str(one) for one in splits["test"].columns["style"]} - {asked.style})][:2]
    files = {(style, split): of_style(splits[split], style) for split in splits for style in styles}
    print("| run | pictures | names | top-1 | top-5 | chance |\n|---|---|--:|--:|--:|--:|")
    for name, towers in runs.items():
        zero_shot_rows(name, towers, files)
    print("\n| run | pictures | way | recall@1 | recall@5 | recall@10 |\n|---|---|---|--:|--:|--:|")
    for name, towers in runs.items():
        retrieval_rows(name, towers, asked.data, styles)
    print("\n| nearest picture of the other style | known things | new things |\n|---|--:|--:|")
    for name, towers in runs.items():
        nearest_row(name, towers["image"], files, styles)
    nearest_row("raw pixels", RawPixels(first), files, styles)


if __name__ == "__main__":
    main()
