"""mmssl: self-supervised learning on images, video, sound and text.

The public API of all three packages, imported when it is first used:

- ``load(path)`` and ``Encoder``: what a run leaves behind, files in and vectors out.
- ``pretrain(recipe, data, out)``, ``finetune(encoder, train, test, out)``: training; ``finetune_seeds`` does it with
  several seeds.
- ``Classifier(path)``: what fine-tuning leaves behind, files in and class names out; ``predict`` does whole folders.
- ``ZeroShotClassifier(run, classes)``: files in, names and scores out, of classes that nobody has trained on;
  ``zero_shot`` measures one on labels, ``retrieve`` whether modalities find each other. ``JointEncoder`` is one tower,
  ``Document`` a text to embed.
- ``SearchIndex(encoder, folder)``: files of a folder by words or by example, ``search`` with a contact sheet.
- ``knn``, ``linear_probe``, ``probe`` (by protocol), ``embed``: frozen evaluation; ``list_files`` makes the listings.
- ``frame_probe``: single moments of sounds (``SoundFrames``) by the labels that ``read_segments`` reads.
- ``ContrastivePrediction``: the contrastive loss of steps ahead, for objectives of one's own.
- ``propagate``: masks, keypoints and parts of a first frame, followed through videos and scored;
  ``propagate_source`` follows what a mask marks through one's own video.
- ``show``: pictures of what was learned.
- ``MmsslError`` and its kinds: what can go wrong, in a sentence.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmssl.data.listing import Listing, list_files
    from mmssl.errors import MmsslError, UnusableData, UserError
    from mmssl.heads.prediction import ContrastivePrediction
    from modalities.classifier import Classifier
    from modalities.encoder import Encoder, load
    from modalities.joint import JointEncoder
    from modalities.text_read import Document
    from tasks.build import load_recipe
    from tasks.embed import embed
    from tasks.finetune import finetune, finetune_seeds
    from tasks.frame_probe import frame_probe
    from tasks.frames import SoundFrames
    from tasks.knn import knn
    from tasks.linear_probe import linear_probe
    from tasks.predict import predict
    from tasks.pretrain import pretrain
    from tasks.probe_protocols import probe
    from tasks.propagate import propagate
    from tasks.propagate_source import propagate_source
    from tasks.retrieve import retrieve
    from tasks.search import search
    from tasks.search_index import SearchIndex
    from tasks.segment_labels import read_segments
    from tasks.show import show
    from tasks.zero_shot import zero_shot
    from tasks.zero_shot_classifier import ZeroShotClassifier

_HOME = {
    "Classifier": "modalities.classifier",
    "ContrastivePrediction": "mmssl.heads.prediction",
    "Document": "modalities.text_read",
    "Encoder": "modalities.encoder",
    "JointEncoder": "modalities.joint",
    "Listing": "mmssl.data.listing",
    "MmsslError": "mmssl.errors",
    "SearchIndex": "tasks.search_index",
    "SoundFrames": "tasks.frames",
    "UnusableData": "mmssl.errors",
    "UserError": "mmssl.errors",
    "ZeroShotClassifier": "tasks.zero_shot_classifier",
    "embed": "tasks.embed",
    "finetune": "tasks.finetune",
    "finetune_seeds": "tasks.finetune",
    "frame_probe": "tasks.frame_probe",
    "knn": "tasks.knn",
    "linear_probe": "tasks.linear_probe",
    "list_files": "mmssl.data.listing",
    "load": "modalities.encoder",
    "load_recipe": "tasks.build",
    "predict": "tasks.predict",
    "pretrain": "tasks.pretrain",
    "probe": "tasks.probe_protocols",
    "propagate": "tasks.propagate",
    "propagate_source": "tasks.propagate_source",
    "read_segments": "tasks.segment_labels",
    "retrieve": "tasks.retrieve",
    "search": "tasks.search",
    "show": "tasks.show",
    "zero_shot": "tasks.zero_shot",
}

__all__ = [
    "Classifier",
    "ContrastivePrediction",
    "Document",
    "Encoder",
    "JointEncoder",
    "Listing",
    "MmsslError",
    "SearchIndex",
    "SoundFrames",
    "UnusableData",
    "UserError",
    "ZeroShotClassifier",
    "embed",
    "finetune",
    "finetune_seeds",
    "frame_probe",
    "knn",
    "linear_probe",
    "list_files",
    "load",
    "load_recipe",
    "predict",
    "pretrain",
    "probe",
    "propagate",
    "propagate_source",
    "read_segments",
    "retrieve",
    "search",
    "show",
    "zero_shot",
]

try:
    __version__ = version("mmssl")
except PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'mmssl' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
