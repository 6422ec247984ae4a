"""One optimiser step of VideoMAE ViT-S/16 on clips of 16 frames at 224 pixels: ours against transformers'.

As ``mae_step``: one process, the same weights and masks, taking turns. A third row is ours with half of the hidden
tokens decoded (VideoMAE V2, arXiv:2303.16727), which is another loss for less work.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from mae_step import Runner, make_batch, report, trained
from torch import Tensor
from transformers import VideoMAEConfig, VideoMAEForPreTraining

from mmssl.contracts import Batch
from mmssl.heads.decoder import DecoderConfig
from mmssl.masking import RunningCell, TubeMask
from mmssl.objectives.mae import MAE, MAEConfig
from modalities.encoder import Encoder, EncoderConfig, typed

RENAMES = {
    "videomae.embeddings.patch_embeddings.projection": "encoder._tokenizer.proj",
    "videomae.encoder.layer": "encoder.backbone.blocks",
    "videomae.layernorm": "encoder.backbone.norm",
    "encoder_to_decoder": "decoder.embed",
    "decoder.decoder_layers": "decoder.blocks",
    "mask_token": "decoder.mask_token",
    ".layernorm_before": ".norm1",
    ".layernorm_after": ".norm2",
    ".attention.output.dense": ".attn.proj",
    ".attention.attention.": ".attn.",
    ".intermediate.dense": ".mlp.fc1",
    ".output.dense": ".mlp.fc2",
}
HALF = "ours, half decoded"


def translate(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return transformers' VideoMAE tensors, weights or their gradients, under our names and in our layout.

    Queries, keys and values are fused, with a bias of zero for the keys, which have none there; the convolution
    [D, C, t, p, q] becomes our linear layer over (t, p, q, C). Their projection to the decoder has no bias either.
    """
    ours = {}
    for name, tensor in theirs.items():
        for old, new in RENAMES.items():
            name = name.replace(old, new)
        ours[name] = tensor
    for name in [name for name in ours if ".query." in name]:
        query, value = ours.pop(name), ours.pop(name.replace(".query.", ".value."))
        key = ours.pop(name.replace(".query.", ".key."), torch.zeros_like(query))
        ours[name.replace(".query.", ".qkv.")] = torch.cat([query, key, value])
    proj = "encoder._tokenizer.proj.weight"
    ours[proj] = ours[proj].permute(0, 2, 3, 4, 1).flatten(1)
    ours["decoder.embed.bias"] = torch.zeros(len(ours["decoder.embed.weight"]))
    return ours


@torch.no_grad()
def copy_weights(theirs: VideoMAEForPreTraining, ours: MAE) -> None:
    """Make ``ours`` compute what ``theirs`` does; raises KeyError where a weight has no counterpart."""
    own, translated = dict(ours.named_parameters()), translate(trained(theirs))
    if own.keys() != translated.keys():
        raise KeyError(f"no counterpart: {sorted(own.keys() ^ translated.keys())}")
    for name, parameter in own.items():
        parameter.copy_(translated[name].view_as(parameter))
    # Theirs count all tokens in one row, ours by time, height and width.
    ours.encoder.tokenizer.positions.table.copy_(theirs.videomae.embeddings.position_embeddings[0])
    ours.decoder.positions.table.copy_(theirs.position_embeddings[0])


class Shape(NamedTuple):
    """What is trained: a square clip, its tubes (frames, side), and encoder and decoder as width, depth and heads."""

    frames: int = 16
    size: int = 224
    tube: tuple[int, int] = (2, 16)
    encoder: tuple[int, int, int] = (384, 12, 6)
    decoder: tuple[int, int, int] = (192, 4, 3)


VIT_S16 = Shape()


def build(shape: Shape, target: str = "normalized_per_channel") -> tuple[MAE, VideoMAEForPreTraining]:
    """Return both models with the same weights."""
    (width, depth, heads), (decoder_width, decoder_depth, decoder_heads) = shape.encoder, shape.decoder
    model = {
        "tokenizer": {"patch_size": (shape.tube[0], shape.tube[1], shape.tube[1]), "target": target},
        "backbone": {"dim": width, "depth": depth, "num_heads": heads},
        "cls_token": False,
    }
    signal = {"frames": shape.frames, "size": shape.size}
    config = typed(EncoderConfig, "video", "benchmark")(modality="video", signal=signal, model=model)
    decoder = DecoderConfig(dim=decoder_width, depth=decoder_depth, num_heads=decoder_heads)
    ours = MAEConfig(mask="tube", mask_ratio=0.9, decoder=decoder).build({"video": Encoder(config)})
    theirs = VideoMAEForPreTraining(
        VideoMAEConfig(
            image_size=shape.size,
            patch_size=shape.tube[1],
            num_frames=shape.frames,
            tubelet_size=shape.tube[0],
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            decoder_hidden_size=decoder_width,
            decoder_num_hidden_layers=decoder_depth,
            decoder_num_attention_heads=decoder_heads,
            decoder_intermediate_size=4 * decoder_width,
            use_mean_pooling=False,
            layer_norm_eps=1e-6,
            norm_pix_loss=target != "raw",
            attn_implementation="sdpa",
        )
    )
    theirs.decoder.norm.eps = 1e-6  # the one that its configuration does not reach
    copy_weights(theirs, ours)
    return ours.train(), theirs.train()


def hidden(batch: Batch, tokens: int) -> Tensor:
    """Return transformers' mask, bool [B, N]: True where ``keep`` [B, K] does not show a token."""
    keep = batch["keep"]
    return torch.ones(len(keep), tokens, dtype=torch.bool).scatter(1, keep, False)


def runners_of(shape: Shape, batch_size: int) -> dict[str, Runner]:
    """Return the sides, all with the same weights, signals and visible tokens."""
    ours, theirs = build(shape)
    batch = make_batch(ours, batch_size)
    mask = hidden(batch, ours.encoder.tokenizer.positions.table.shape[0])
    pixels = batch["signal"].transpose(1, 2)  # theirs has time before the channels
    half = MAE(ours.encoder, ours.decoder, RunningCell(TubeMask(0.9), 0.5))
    fewer = make_batch(half, batch_size)
    return {
        "ours": Runner(ours, lambda: ours(batch).loss),
        "transformers": Runner(theirs, lambda: theirs(pixels, mask).loss),
        HALF: Runner(half, lambda: half(fewer).loss),
    }


def main(arguments: Sequence[str] | None = None, shape: Shape = VIT_S16) -> None:
    """Measure and print."""
    description = "VideoMAE ViT-S/16 16 x 224 training step: ours against transformers"
    report(description, lambda batch_size: runners_of(shape, batch_size), arguments, batch_size=2)


if __name__ == "__main__":
    main()
