"""Backbones: tokens in, representations out. They know no modality and no mask."""

from mmssl.backbones.causal import CausalConfig
from mmssl.backbones.gru import GRUConfig, LSTMConfig
from mmssl.backbones.pixelcnn import PixelCNNConfig
from mmssl.backbones.vit import ViTConfig
from mmssl.config import BackboneConfig

BACKBONES: tuple[type[BackboneConfig], ...] = (ViTConfig, GRUConfig, LSTMConfig, CausalConfig, PixelCNNConfig)
