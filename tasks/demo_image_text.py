"""The demo on pictures with names: emoji that are told by typed names, of another hand and of things never seen."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmssl.contracts import Media
from mmssl.data.listing import Listing, list_files
from mmssl.data.pairs import list_pairs
from modalities.joint import JointEncoder, joint_encoders
from tasks.demo import DATA, DATA_FOLDER, PRETRAINED, RUN_FOLDER, Demo, Findings, Rows, note
from tasks.features import Extractor, RawPixels
from tasks.knn import knn
from tasks.metrics import Score
from tasks.panels_page import write_panel
from tasks.panels_retrieval import gallery_panel, gallery_sections
from tasks.report import Section, Table, Words
from tasks.retrieve import Direction, Matches, direction, matches
from tasks.zero_shot import zero_shot
from tasks.zero_shot_classifier import ZeroShotClassifier

PRETRAINING = {
    # Both hands draw a thing at the same place in the same colours: what differs is fine detail.
    "towers.image.signal.size": [32, 32],
    "towers.image.signal.crop_scale": [0.7, 1.0],
    "towers.image.signal.resize_ratio": 1.0,  # a drawing reaches to the edge
    "towers.image.signal.augment": {
        "jitter": {"hue": 0.05},
        "grey": 0.1,
        "blur": {"probability": 0.3, "sigma": [0.1, 1.0]},
        "randaugment": {"magnitude": 4},
    },
    "towers.text.signal.context": 16,
    "train.epochs": 50,
    "data.workers": 1,
}
NAME = "caption"
"""The column of the manifest that holds a picture's name."""
FIRST, AMONG, NEAREST = "right name first", "right name among 5", "nearest known picture"
GUESSING, PIXELS = "guessing", "raw pixels"
TYPED = 5
"""Names in the command that is to be typed next."""


@dataclass(frozen=True)
class Pictures:
    """Test pictures that are to be named, each by one of the names that they have."""

    what: str
    """What they show: a column of the table."""
    split: str
    drawn: str | None = None
    """The split in which there are pictures of the same things that were trained on; None: there are none."""


@dataclass(frozen=True)
class Naming:
    """Accuracy of typed names, and retrieval both ways; the first pictures are those of the gallery."""

    pictures: Sequence[Pictures]

    def take(self, out: Path) -> Findings:
        """Measure the run; ``out`` gets a gallery."""
        data, towers = out / DATA_FOLDER, joint_encoders(out / RUN_FOLDER)
        kind = towers["image"].encoder.kind
        listings = {one.what: list_files(data, kind, split=one.split) for one in self.pictures}
        rows: Rows = {}
        note("2 of 3: naming test pictures by typed names")
        for one in self.pictures:
            test = listings[one.what]
            name(one, test, towers, rows)
            if one.drawn is not None:
                compare(one, known(test, data, one.drawn, kind), test, towers["image"], rows)
        note("3 of 3: finding pictures by names, and names by pictures")
        found = {one.what: pairs_of(towers, data, one.split) for one in self.pictures}
        ways = {
            what: {way.name: direction(way) for way in (match, match.turned())} for what, match in found.items()
        }  # fmt: skip
        columns = [*listings]
        command = typed(out, listings[columns[0]])
        return Findings(
            finding(columns, rows),
            rows,
            columns,
            " and ".join(f"{len(listing):,} pictures of {what}" for what, listing in listings.items()),
            "Then the names of the test pictures were typed, and each picture got the name whose vector is the most "
            "similar to its own.",
            listings[columns[0]],
            [
                retrieval(ways),
                *gallery(found[columns[0]], out / "gallery.png"),
                Words("Type this next", command, "With names of your own, and pictures too."),
            ],
            {
                "retrieval": {
                    what: {
                        name: {key: score.as_dict() for key, score in way.recall.items()} for name, way in both.items()
                    }
                    for what, both in ways.items()
                },
                "next": command,
            },
            command,
        )


def name(one: Pictures, test: Listing, towers: Mapping[str, JointEncoder], rows: Rows) -> None:
    """Add to ``rows`` how often the right one of all names is first, and among five, and how often by guessing."""
    names = sorted(set(test.labels(NAME)))
    scores = zero_shot(ZeroShotClassifier(towers, names), test, NAME).measured.scores
    for method, metric, count in ((FIRST, "top1", 1), (AMONG, "top5", 5)):
        if metric in scores:
            chance = count / len(names)
            rows.setdefault((method, PRETRAINED), {})[one.what] = scores[metric]
            rows.setdefault((method, GUESSING), {})[one.what] = Score(chance, chance, chance)


def known(test: Listing, data: Path, split: str, kind: Media) -> Listing:
    """Return the pictures of a split that have one of the names of ``test``."""
    drawn, names = list_files(data, kind, split=split), set(test.labels(NAME))
    return drawn.select([i for i, one in enumerate(drawn.labels(NAME)) if one in names])


def compare(one: Pictures, drawn: Listing, test: Listing, image: JointEncoder, rows: Rows) -> None:
    """Add to ``rows`` how often the nearest picture of ``drawn`` shows the same thing."""
    sides: dict[str, Extractor] = {PRETRAINED: image, PIXELS: RawPixels(image.encoder)}
    for start, extractor in sides.items():
        score = knn(extractor, drawn, test, NAME, k=(1,)).scores[1]["top1"]
        rows.setdefault((NEAREST, start), {})[one.what] = score


def pairs_of(towers: Mapping[str, JointEncoder], data: Path, split: str) -> Matches:
    """Return the test pictures and their names with their vectors."""
    image, text = towers["image"], towers["text"]
    listing = list_pairs(data, [image.encoder.kind, text.encoder.kind], split=split)
    return matches(image, text, listing)[0]


def retrieval(ways: Mapping[str, Mapping[str, Direction]]) -> Table:
    """Return the recalls both ways."""
    heads = next(iter(next(iter(ways.values())).values())).recall
    rows: list[list[str | Score]] = [
        [what, name.replace("_", " "), *way.recall.values()]
        for what, both in ways.items()
        for name, way in both.items()
    ]
    least = min(way.candidates for both in ways.values() for way in both.values())
    text = f"Share of the queries whose right answer is among so many of the best, of {least:,}; with 95 % intervals."
    return Table("Retrieval", text, ["pictures of", "way", *heads], rows)


def gallery(match: Matches, png: Path) -> list[Section]:
    """Write the gallery of a retrieval both ways, and return it for the report."""
    panel = gallery_panel([match.turned(), match])
    write_panel(png, panel)
    return gallery_sections(panel)


def typed(out: Path, test: Listing) -> str:
    """Return the command that tells one of the test pictures by its own name and those of a few others."""
    names = test.labels(NAME)
    short = [i for i, one in enumerate(names) if "," not in one and len(one.split()) <= 2]
    some = short[:: max(1, len(short) // TYPED)][:TYPED]
    classes = ",".join(names[i] for i in some)
    return shlex.join(["mmssl", "zero-shot", str(out / RUN_FOLDER), test.paths[some[0]], "--classes", classes])


def finding(columns: Sequence[str], rows: Rows) -> str:
    """Return in a sentence what names are good for: a difference counts where intervals do not overlap."""
    right, chance = rows[FIRST, PRETRAINED], rows[FIRST, GUESSING]
    told = [f"{right[what].value:.0%} of {what}" for what in columns if right[what].low > chance[what].value]
    guess = f"{chance[columns[0]].value:.1%}"
    head = (
        f"Named right: {', '.join(told)}; by guessing {guess}" if told else f"Named no better than by guessing {guess}"
    )
    others = rows.get((NEAREST, PIXELS), {})
    return "; ".join([head, *(_against(what, right[what], pixels) for what, pixels in others.items())])


def _against(what: str, right: Score, pixels: Score) -> str:
    unlike = pixels.low > right.high or pixels.high < right.low
    verdict = ("more" if pixels.value > right.value else "fewer") if unlike else "no clear difference"
    return f"by raw pixels {pixels.value:.0%} of {what}, {verdict}"


DEMO = Demo(
    "image-text",
    DATA / "pairs.tar.xz",
    "clip-tiny",
    PRETRAINING,
    Naming(
        [
            Pictures("known things redrawn", "test", drawn="train"),
            Pictures("new things", "test-new"),
            Pictures("new things redrawn", "test-new-redrawn"),
        ]
    ),
    "pictures",
    "All training pictures are of one hand (Noto). Known things are among them, and are tested as another hand draws "
    "them (Twemoji). Of new things, and of what only differs from them in gender or direction, neither picture nor "
    "name was seen. For the nearest known picture, the pictures of the known things are compared by their vectors, "
    "or pixel by pixel; that needs a picture of each thing, which names do not.",
    "with their names",
    "CLIP",
    "Two encoders, of pictures and of texts, learned by telling which of a batch belong together.",
)
