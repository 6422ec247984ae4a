"""Objectives: a batch in, a loss out. One file each, and one line here."""

from mmssl.config import ObjectiveConfig
from mmssl.objectives.classify import ClassifyConfig
from mmssl.objectives.clip import CLIPConfig
from mmssl.objectives.cpc import CPCConfig
from mmssl.objectives.mae import MAEConfig
from mmssl.objectives.siam_mae import SiamMAEConfig

OBJECTIVES: dict[str, type[ObjectiveConfig]] = {
    "mae": MAEConfig,
    "siam_mae": SiamMAEConfig,
    "cpc": CPCConfig,
    "clip": CLIPConfig,
    "classify": ClassifyConfig,
}
