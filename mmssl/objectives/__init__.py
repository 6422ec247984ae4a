"""Objectives: a batch in, a loss out. One file each, and one line here."""

from mmssl.config import ObjectiveConfig
from mmssl.objectives.classify import ClassifyConfig
from mmssl.objectives.mae import MAEConfig

OBJECTIVES: dict[str, type[ObjectiveConfig]] = {"mae": MAEConfig, "classify": ClassifyConfig}
