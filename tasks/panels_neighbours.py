"""The files of a folder that an encoder finds most like a given one."""

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from mmssl.data.listing import Listing
from mmssl.errors import UserError
from mmssl.files import legible
from modalities.encoder import Encoder
from tasks.embed import labels_of
from tasks.features import extract
from tasks.knn import neighbours
from tasks.panels import Block, Files, Line, Panel, Shot, arranged, read_signal
from tasks.panels_media import view_of


def neighbours_panel(
    encoder: Encoder, files: Files, signals: Sequence[Tensor], folder: Listing, k: int, skip_broken: bool
) -> tuple[Panel, dict[str, Any]]:
    """Return each file beside its ``k`` nearest in ``folder`` by cosine similarity, best first, and facts.

    Labels are written where the folder has them. A file that is itself in the folder is not its own neighbour. With
    fewer than ``k`` others, all are shown, and the note says so. Raises UnusableData for a broken file, unless
    ``skip_broken`` leaves those of the folder out, and UserError where there is no other file.
    """
    known = extract(encoder, folder, skip_broken=skip_broken)
    queries = F.normalize(encoder.embed(signals), dim=1)
    # By the file that a path leads to, not by its spelling.
    own = [os.path.realpath(folder.paths[i]) for i in known.kept]
    asked = [os.path.realpath(path) for path in files.paths]
    spare = max(Counter(own)[path] for path in asked)
    if len(own) <= spare:
        raise UserError(f"{folder.root} holds no other file than those that neighbours are asked of")
    found = neighbours(F.normalize(known.vectors, dim=1), queries, min(k + spare, len(own)))
    labels = labels_of(folder, known.kept)
    label_of = dict(zip(own, labels, strict=True))
    blocks, facts = [], []
    for name, signal, real, similarity, index in zip(files.names, signals, asked, *found, strict=True):
        others = [(float(s), int(i)) for s, i in zip(similarity, index, strict=True) if own[int(i)] != real][:k]
        shots = [Shot(_caption("query", label_of.get(real)), view_of(encoder, signal).shown())]
        for value, i in others:
            place = known.kept[i]
            shown = view_of(encoder, read_signal(encoder.config, folder.paths[place])).shown()
            shots.append(Shot(_caption(f"{value:.4f}", labels[i], folder.name(place)), shown))
        blocks.append(Block(name, [Line("", shots)]))
        facts.append(
            [{"path": folder.name(known.kept[i]), "label": labels[i], "similarity": value} for value, i in others]
        )
    skipped = [{"path": path, "reason": reason} for path, reason in known.skipped]
    note = (
        f"Cosine similarity to the nearest of {len(own):,} files in {legible(str(folder.root))}: all of them, whatever "
        "their split, but for the query itself."
    )
    fewest = min(len(found) for found in facts)
    note += f" There are no more than {fewest} others." if fewest < k else ""
    if skipped:
        note += f" {len(skipped)} broken file{' is' if len(skipped) == 1 else 's are'} left out."
    return Panel("Nearest neighbours", note, arranged(blocks)), {"neighbours": facts, "skipped": skipped}


def _caption(*lines: str | None) -> str:
    return "\n".join(legible(line) for line in lines if line is not None)
