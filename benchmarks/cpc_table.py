"""The paper's table of CPC in miniature: phones and speakers from single frames, by a linear probe of frozen features.

``python benchmarks/cpc_table.py DATA NAME=RUN ... [--baselines] [--supervised STEPS] [--max-frames N] [--threads N]``

DATA has a ``manifest.csv`` with the columns path, split and speaker, and a ``phones.csv`` (path, start, end, phone).
Every RUN is one of ``cpc-audio-tiny`` or the like; baselines and the supervised network have the shape and the sample
rate of the first. Random: its network as initialised. MFCC: 13 cepstra and their first and second differences over
time, every 10 ms at the frame's middle. Supervised: its network and a linear layer trained from scratch on the labels
of single frames, then probed as the others are.
"""

import argparse
import csv
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchaudio.functional import compute_deltas, create_dct

from mmssl.data.listing import Listing, list_files
from mmssl.engine.optim import adamw, param_groups, set_lr
from mmssl.engine.schedule import WarmupCosine
from modalities.audio_settings import AudioSignal, filterbank
from modalities.encoder import Encoder, load
from tasks.following import fresh
from tasks.frame_probe import frame_probe
from tasks.frames import FrameExtractor, SoundFrames
from tasks.segment_labels import SegmentLabels, read_segments

CEPSTRA, MELS, PEAK = 13, 40, 1e-3
Labels = dict[str, SegmentLabels]


class Cepstra:
    """MFCC and their differences, a frame for each of the encoder's."""

    def __init__(self, frames: SoundFrames, settings: AudioSignal) -> None:
        self.decode, self.transform, self.seconds_per_step = frames.decode, frames.transform, frames.seconds_per_step
        hop_ms = 1000 * frames.seconds_per_step
        self._log_mel = filterbank(settings.model_copy(update={"mels": MELS, "hop_ms": hop_ms}))
        self._cosines = create_dct(CEPSTRA, MELS, "ortho")

    def frames(self, signal: Tensor) -> Tensor:
        """Return [T, 39] of a sound [1, samples]; windows lie around the middle of their frames."""
        window, hop = self._log_mel.window, self._log_mel.hop
        count, before = signal.shape[1] // hop, (window - hop) // 2
        padded = F.pad(signal, (before, window - hop - before))[:, : (count - 1) * hop + window]
        cepstra = self._cosines.T @ self._log_mel(padded)[0]
        first = compute_deltas(cepstra)
        return torch.cat([cepstra, first, compute_deltas(first)]).T

    def fingerprint(self) -> str:
        """Return a name."""
        return "cepstra"


def speakers(data: Path, listing: Listing, folder: Path) -> Path:
    """Write a table that says who speaks in every file, from its beginning to beyond its end."""
    path = folder / "speakers.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "start", "end", "speaker"])
        writer.writerows(
            [name, 0, 3600, who] for name, who in zip(listing.paths, listing.labels("speaker"), strict=True)
        )
    return path


def supervised(encoder: Encoder, train: Listing, labels: SegmentLabels, steps: int, batch_size: int = 16) -> Encoder:
    """Train an encoder of the same shape and a linear layer on the labels of its frames, from scratch."""
    torch.manual_seed(0)
    learner, rng = Encoder(encoder.config), np.random.default_rng(0)
    classes, reader = labels.classes(train), SoundFrames(learner)
    seconds, (samples,) = reader.seconds_per_step, learner.tokenizer.size
    hop = samples // learner.tokenizer.grid[0]
    sounds = [reader.transform(reader.decode(path)) for path in train.paths]
    targets = [
        torch.from_numpy(labels.of_frames(path, sound.shape[1] // hop, seconds, classes))
        for path, sound in zip(train.paths, sounds, strict=True)
    ]
    network = nn.ModuleDict({"encoder": learner, "head": nn.Linear(learner.dim, len(classes))}).train()
    optimizer = adamw(param_groups(network, 0.0), (0.9, 0.999), 1e-8)
    schedule = WarmupCosine(PEAK, steps, steps // 20, 0.0)
    long = [i for i, sound in enumerate(sounds) if sound.shape[1] > samples]
    for step in range(steps):
        picks = rng.choice(long, batch_size)
        starts = [int(rng.integers(sounds[i].shape[1] // hop - samples // hop + 1)) for i in picks]
        signal = torch.stack([sounds[i][:, a * hop : a * hop + samples] for i, a in zip(picks, starts, strict=True)])
        truth = torch.stack([targets[i][a : a + samples // hop] for i, a in zip(picks, starts, strict=True)])
        context = learner(learner.tokenizer.patches({"signal": signal}))
        loss = F.cross_entropy(network["head"](context).flatten(0, 1), truth.flatten(), ignore_index=-1)
        set_lr(optimizer, schedule(step))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    return learner.eval()


def row(
    name: str, extractors: dict[str, FrameExtractor], halves: tuple[Listing, Listing], labels: Labels, most: int
) -> None:
    """Print one row of the table: top-1 of each kind of label, with the interval over test files."""
    cells = []
    for kind, extractor in extractors.items():
        result = frame_probe(extractor, *halves, labels[kind], most)
        cells.append(str(result.scores["top1"]))
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN")
    parser.add_argument("--baselines", action="store_true")
    parser.add_argument("--supervised", type=int, metavar="STEPS")
    parser.add_argument("--phones-only", action="store_true")
    parser.add_argument("--max-frames", type=int, default=20_000)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    runs = {name: load(path) for name, _, path in (word.partition("=") for word in options.runs)}
    first = next(iter(runs.values()))
    train, test = (list_files(options.data, first.kind, split=split) for split in ("train", "test"))
    everything = list_files(options.data, first.kind)
    labels: Labels = {"phones": read_segments(options.data / "phones.csv", first.kind, "phone")}
    if not options.phones_only:
        with tempfile.TemporaryDirectory() as folder:
            table = speakers(options.data, everything, Path(folder))
            labels["speakers"] = read_segments(table, first.kind, "speaker")
    print(f"| features | {' | '.join(labels)} |\n|---|{'--:|' * len(labels)}")

    def measured(name: str, extractor: FrameExtractor) -> None:
        row(name, dict.fromkeys(labels, extractor), (train, test), labels, options.max_frames)

    if options.baselines:
        settings = first.config.signal
        assert isinstance(settings, AudioSignal)
        measured("random weights", SoundFrames(fresh(first, 1)))
        measured("MFCC", Cepstra(SoundFrames(first), settings))
    for name, encoder in runs.items():
        measured(name, SoundFrames(encoder))
    if options.supervised:
        trained = {kind: SoundFrames(supervised(first, train, labels[kind], options.supervised)) for kind in labels}
        row("supervised", trained, (train, test), labels, options.max_frames)


if __name__ == "__main__":
    main()
