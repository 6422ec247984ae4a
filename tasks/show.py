"""What was learned, to look at and to listen to.

Reconstructions, attention, components, a map of vectors, nearest neighbours.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypedDict, Unpack, get_args

from rich.console import Console
from torch import Tensor, nn

from mmssl.backbones.vit import ViT
from mmssl.contracts import Media, Modality, Reconstructs
from mmssl.data.listing import list_files
from mmssl.errors import UserError, nearest, sibling
from mmssl.files import legible, replacing_file
from modalities.abilities import Moves, Sounds
from modalities.encoder import MODALITIES, EncoderConfig, encoder_folder, load
from modalities.looks import FramePair
from tasks.build import EncoderRecipe
from tasks.panels import Files, Panel, read_example, read_rate, read_signal
from tasks.panels_masks import read_masks
from tasks.panels_media import animate
from tasks.panels_neighbours import neighbours_panel
from tasks.panels_page import write_panel
from tasks.panels_reconstruction import (
    Attempts,
    attempts,
    audible,
    reconstruction_film,
    reconstruction_panel,
    sound_note,
    target_note,
)
from tasks.panels_tokens import attention_panel, pca_panel
from tasks.panels_tsne import tsne_panel
from tasks.writer import load_objective

Name = Literal["reconstruction", "attention", "pca", "tsne", "neighbours"]
PANELS: tuple[Name, ...] = get_args(Name)
MOST = {".png": 16, ".html": 200, ".gif": 4, ".webp": 4, ".wav": 1}
"""How many files one output shows at most, by its suffix: what a person can still look at."""
PAGES = {".png", ".html"}
FASTEST = 50
"""Frames per second of a GIF: players slow faster ones down."""
RATIOS = (0.75, 0.85, 0.95)

Run: TypeAlias = tuple[EncoderRecipe, nn.Module]
"""What a run folder holds: its recipe and its trained objective."""


class ShowOptions(TypedDict, total=False):
    """The options of the panels. One that is given to a panel which does not use it is a mistake."""

    ratios: Sequence[float]
    """reconstruction: which shares of the tokens are masked; of a .wav, one (by default that of the training)."""
    gaps: Sequence[float]
    """reconstruction, of a run trained on pairs of frames: how far apart they are, in the unit of its training."""
    mass: float
    """attention: the share of a head's attention that the marked patches hold."""
    signal: Mapping[str, Any]
    """attention, pca, neighbours: settings to read files otherwise than in training, such as {"size": [224, 400]}."""
    masks: Path | str
    """attention: what is to be found, a PNG or a folder of PNGs named as the files; everything but 0 counts."""
    foreground: bool
    """pca: leave out the background, found by the first component, and start again without it."""
    color_by: str
    """tsne: the column that gives the colours, label or split."""
    most: int
    """tsne: how many vectors are drawn at most."""
    data: Path | str
    """neighbours: the folder or manifest in which to look."""
    k: int
    """neighbours: how many."""
    skip_broken: bool
    """neighbours: leave out broken files of the folder."""
    seed: int
    """reconstruction, tsne: of the masks, of the map and of which vectors are drawn."""


USED_BY: dict[str, tuple[Name, ...]] = {
    "ratios": ("reconstruction",),
    "gaps": ("reconstruction",),
    "mass": ("attention",),
    "signal": ("attention", "pca", "neighbours"),
    "masks": ("attention",),
    "foreground": ("pca",),
    "color_by": ("tsne",),
    "most": ("tsne",),
    "data": ("neighbours",),
    "k": ("neighbours",),
    "skip_broken": ("neighbours",),
    "seed": ("reconstruction", "tsne"),
}


@dataclass(frozen=True)
class ShowResult:
    """What was drawn where."""

    out: Path
    panel: Name
    files: list[str]
    note: str
    facts: dict[str, Any] = field(default_factory=dict)
    """What the panel found besides pictures."""

    def as_dict(self) -> dict[str, Any]:
        """Return the result for JSON."""
        facts = {"out": str(self.out), "panel": self.panel, "files": self.files, **self.facts}
        return {"task": "show", **facts, "note": self.note}

    def render(self, console: Console) -> None:
        """Print what a person wants to know."""
        count = f" of {len(self.files)} file{'' if len(self.files) == 1 else 's'}" if self.files else ""
        for text in (f"{self.out}: {self.panel}{count}", self.note):
            console.print(legible(text), markup=False, highlight=False, soft_wrap=True)


def show(
    source: Path | str,
    files: Sequence[Path | str] = (),
    *,
    out: Path | str,
    panel: str | None = None,
    **options: Unpack[ShowOptions],
) -> ShowResult:
    """Draw a panel into ``out``, a .png or .html file, whose folder is made if there is none.

    Reconstructions of videos are also written as an animation, .gif or .webp, and of a sound as a .wav.

    ``source`` is a run, an encoder folder or file, or a parquet file that ``mmssl embed`` wrote; ``files`` are media
    files or folders of them. Without ``panel``, a run whose objective reconstructs shows that, another ViT its
    attention, any other encoder its components (pca), and a parquet file t-SNE. Raises UserError for what does not fit
    together, before anything is computed, and UnusableData naming the first file that is broken.
    """
    source, out = Path(source), Path(out)
    _check_out(out)
    chosen, run = _choose(source, panel)
    _check_options(chosen, options)
    if chosen == "reconstruction":
        assert run is not None
        return _reconstruction(source, run, files, out, options)
    if out.suffix.lower() not in PAGES:
        raise UserError(f"{out}: {chosen} is shown as a picture or as a page, so the name must end in .png or .html")
    if chosen == "tsne":
        _check_vectors(source, files)
        drawn, facts = tsne_panel(
            source, options.get("color_by", "label"), options.get("most", 5000), options.get("seed", 0)
        )
        found = Files([], [])
    else:
        found, drawn, facts = _of_encoder(source, files, out, chosen, options)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_panel(out, drawn)
    return ShowResult(out, chosen, found.paths, drawn.note, facts)


def _of_encoder(
    source: Path, files: Sequence[Path | str], out: Path, panel: Name, options: ShowOptions
) -> tuple[Files, Panel, dict[str, Any]]:
    encoder = load(source, options.get("signal"))
    found = _files(files, encoder.kind, out)
    folder = list_files(options["data"], encoder.kind) if panel == "neighbours" else None
    signals = [read_signal(encoder.config, path) for path in found.paths]
    facts: dict[str, Any]
    if folder is not None:
        k, skip = options.get("k", 8), options.get("skip_broken", False)
        drawn, facts = neighbours_panel(encoder, found, signals, folder, k, skip)
    elif panel == "attention":
        truths = read_masks(encoder, found, Path(options["masks"])) if "masks" in options else []
        drawn, facts = attention_panel(encoder, found.names, signals, options.get("mass", 0.6), truths)
    else:
        drawn, facts = pca_panel(encoder, found.names, signals, options.get("foreground", False))
    return found, replace(drawn, note=drawn.note + _views_note(signals, encoder.axes)), facts


def _reconstruction(source: Path, run: Run, files: Sequence[Path | str], out: Path, options: ShowOptions) -> ShowResult:
    recipe, objective = run
    assert isinstance(objective, Reconstructs)
    kind, suffix = MODALITIES[recipe.modality], out.suffix.lower()
    _check_media(out, kind)
    own = (getattr(recipe.objective, "mask_ratio", RATIOS[0]),)
    ratios, seed = options.get("ratios", own if suffix == ".wav" else RATIOS), options.get("seed", 0)
    if suffix == ".wav" and len(ratios) > 1:
        raise UserError(f"{out} holds one sound, but {len(ratios)} --ratios were given; give one, or an .html page")
    found = _files(files, kind.source(recipe.signal), out)
    shown = _configured(found, recipe, options.get("gaps"))
    names, examples = [name for _, name, _ in shown], [read_example(config, path) for path, _, config in shown]
    rates = None if suffix == ".png" else [read_rate(recipe, path) for path, _, _ in shown]
    places = [found.paths.index(path) for path, _, _ in shown]  # the same mask for every gap
    made = attempts(recipe, objective, source, names, examples, ratios, seed, rates, places)
    axes = len(next(iter(objective.encoders().values())).tokenizer.size)
    note = _write(out, recipe, made, _views_note([example["signal"] for example in examples], axes))
    return ShowResult(out, "reconstruction", found.paths, note, {"ratios": list(ratios), "seed": seed})


def _configured(
    found: Files, recipe: EncoderRecipe, gaps: Sequence[float] | None
) -> list[tuple[str, str, EncoderConfig]]:
    """Return each file, what it is called and the configuration by which it is read; with ``gaps`` once for each."""
    if gaps is None:
        return [(path, name, recipe) for path, name in zip(*found, strict=True)]
    look = getattr(recipe.signal, "look", None)
    if not isinstance(look, FramePair):
        raise UserError("--gaps are for runs that were trained on pairs of frames")
    shown: list[tuple[str, str, EncoderConfig]] = []
    for path, name in zip(*found, strict=True):
        for gap in gaps:
            signal = recipe.signal.model_copy(update={"look": look.model_copy(update={"gap": (gap, gap)})})
            words = f"{name}, {gap:g} {look.unit} apart"
            shown.append((path, words, recipe.model_copy(update={"signal": signal})))
    return shown


def _write(out: Path, recipe: EncoderRecipe, made: Sequence[Attempts], more: str) -> str:
    """Write reconstructions as the suffix says, and return what must be said of them, ``more`` included."""
    kind, suffix = MODALITIES[recipe.modality], out.suffix.lower()
    if suffix in PAGES:
        panel = reconstruction_panel(recipe, made, suffix == ".html")
        panel = replace(panel, note=panel.note + more)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_panel(out, panel)
        return panel.note
    if isinstance(kind, Sounds):
        _, content = audible(kind, recipe, made[0].at[0], "WAV")
        note = f"{made[0].at[0].words}.{target_note(recipe)}{sound_note(kind)}".replace("\n", ", ")
    else:
        pages, rate = reconstruction_film(recipe, made, out)
        if suffix == ".gif" and rate > FASTEST:
            raise UserError(
                f"{out}: a GIF has at most {FASTEST} frames per second, but these have {rate:.4g}; take .webp"
            )
        content = animate(pages, rate, suffix[1:].upper())
        note = f"{rate:.3g} frames per second: the file's own pace.{target_note(recipe)}"
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(out) as aside:
        aside.write_bytes(content)
    return note + more


def _views_note(signals: Sequence[Tensor], axes: int) -> str:
    several = any(signal.ndim > axes + 1 for signal in signals)
    return " Of a file that is looked at several times, the middle part is shown." if several else ""


# What was asked for


def _choose(source: Path, panel: str | None) -> tuple[Name, Run | None]:
    """Return the panel to draw, and the run where it was looked at; UserError for one that does not fit the source."""
    chosen = next((name for name in PANELS if name == panel), None)
    if panel is not None and chosen is None:
        raise UserError(f"'{panel}' is not a panel{nearest(panel, PANELS)}")
    if not source.exists():
        raise UserError(f"{source} does not exist{sibling(source)}")
    if source.suffix.lower() == ".parquet" and source.is_file():
        if chosen not in (None, "tsne"):
            raise UserError(f"{source} holds vectors, of which tsne is shown; give the encoder for {chosen}")
        return "tsne", None
    if chosen == "tsne":
        raise UserError(f"tsne is shown of a .parquet file: write one first with mmssl embed {source} PATH --out FILE")
    if chosen is not None and chosen != "reconstruction":
        return chosen, None
    run = _run(source)
    reconstructs = run is not None and isinstance(run[1], Reconstructs)
    if chosen is None:
        return ("reconstruction" if reconstructs else "attention" if _attends(source) else "pca"), run
    if run is None:
        folder = encoder_folder(source).parent  # where there is no encoder either, that is the mistake
        hint = f" {folder}" if (folder / "objective").is_dir() else ""
        raise UserError(f"{source} is an encoder without its objective, which reconstructs: give the run{hint}")
    if not reconstructs:
        others = "attention or pca" if _attends(source) else "pca or neighbours"
        raise UserError(f"{source}: {run[0].objective.name} reconstructs nothing; give --panel {others}")
    return chosen, run


def _attends(source: Path) -> bool:
    return isinstance(load(source).backbone, ViT)


def _run(source: Path) -> Run | None:
    if not (source / "objective" / "model.safetensors").is_file():
        return None
    recipe, objective = load_objective(source)
    # A run of several modalities shows nothing by itself: it is asked for one of its encoders.
    return (recipe, objective) if isinstance(recipe, EncoderRecipe) else None


def _check_out(out: Path) -> None:
    if out.suffix.lower() not in MOST:
        raise UserError(
            f"{out}: the name must end in .png or .html, or for reconstructions of videos in .gif or .webp, of sounds "
            "in .wav"
        )
    if out.is_dir():
        raise UserError(f"{out} is a folder")


def _check_media(out: Path, kind: Modality) -> None:
    """Raise UserError for an animation of what does not move, or a sound of what cannot be heard."""
    suffix = out.suffix.lower()
    if suffix in (".gif", ".webp") and not isinstance(kind, Moves):
        raise UserError(f"{out}: modality {kind.name} does not move, so the name must end in {_forms(kind)}")
    if suffix == ".wav" and not isinstance(kind, Sounds):
        raise UserError(f"{out}: modality {kind.name} cannot be heard, so the name must end in {_forms(kind)}")


def _forms(kind: Modality) -> str:
    moving, sounding = isinstance(kind, Moves), isinstance(kind, Sounds)
    *others, last = [".png", ".html", *([".gif", ".webp"] if moving else []), *([".wav"] if sounding else [])]
    return f"{', '.join(others)} or {last}"


def _check_options(panel: Name, options: ShowOptions) -> None:
    for name in options:
        if panel not in USED_BY[name]:
            raise UserError(
                f"--{name.replace('_', '-')} is for the panel {' or '.join(USED_BY[name])}, not for {panel}"
            )
    ratios, mass = options.get("ratios", RATIOS), options.get("mass", 0.6)
    if not ratios or not all(0 < ratio < 1 for ratio in ratios):
        raise UserError(f"--ratios are shares between 0 and 1, such as 0.75,0.95, but got {','.join(map(str, ratios))}")
    if not all(gap > 0 for gap in options.get("gaps", ())):
        raise UserError(f"--gaps are above 0, such as 4,16, but got {','.join(map(str, options['gaps']))}")
    if not 0 < mass < 1:
        raise UserError(f"--mass is a share between 0 and 1, but got {mass}")
    for name, count in (("k", options.get("k", 1)), ("most", options.get("most", 4))):
        least = 1 if name == "k" else 4
        if count < least:
            raise UserError(f"--{name} must be at least {least}, but got {count}")
    if options.get("color_by", "label") not in ("label", "split"):
        raise UserError(f"--color-by '{options['color_by']}'{nearest(options['color_by'], ('label', 'split'))}")
    if not 0 <= options.get("seed", 0) < 2**32:
        raise UserError(f"--seed must be from 0 to 2^32 - 1, but got {options['seed']}")
    if panel == "neighbours" and "data" not in options:
        raise UserError("neighbours are looked for in a folder: give --data")


def _check_vectors(source: Path, files: Sequence[Path | str]) -> None:
    if files:
        raise UserError(f"{source} holds vectors, so no further file is shown: leave out {files[0]}")


def _files(given: Sequence[Path | str], kind: Media, out: Path) -> Files:
    """Return the files to show, folders opened; UserError for none, too many, or one that ``out`` would overwrite."""
    if not given:
        raise UserError(
            f"name at least one file to show, of modality {kind.name} ({', '.join(sorted(kind.suffixes))}), "
            "or a folder of them"
        )
    paths = [path for item in given for path in list_files(item, kind).paths]
    most = MOST[out.suffix.lower()]
    if len(paths) > most:
        other = "" if out.suffix.lower() == ".html" else f", or an .html page, which shows up to {MOST['.html']}"
        raise UserError(
            f"{out} shows at most {most} file{'' if most == 1 else 's'}, but {len(paths)} were given; give fewer{other}"
        )
    if os.path.realpath(out) in map(os.path.realpath, paths):
        raise UserError(f"{out} is one of the files to show; give another name")
    # As short as tells them apart: the parts of the paths below what all have in common.
    base = os.path.commonpath([os.path.dirname(path) for path in paths])  # noqa: PTH120
    return Files(paths, [legible(os.path.relpath(path, base)) for path in paths])
