"""What can be kept beside an encoder, by name: how each is written into its folder."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from modalities import classifier, joint

SAVE: dict[str, Callable[[Path, Mapping[str, Any], Mapping[str, Tensor]], None]] = {
    classifier.NAME: classifier.save_classifier,
    joint.NAME: joint.save_joint,
}
