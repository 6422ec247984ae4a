"""Predictors with weights: CPC's begin at zero, where all scores are equal and nothing else has a gradient."""

import torch

from mmssl.heads.prediction import LinearSteps, TransformerSteps


def roused(module, std=0.3):
    """Return the module with random weights in all of its predictors, as if it had been trained."""
    for part in module.modules():
        if isinstance(part, LinearSteps | TransformerSteps):
            for weight in part.project.parameters():
                torch.nn.init.normal_(weight, std=std)
    return module
