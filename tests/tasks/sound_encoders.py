"""Tiny encoders of sounds with random weights, for whoever looks at their frames."""

from modalities.encoder import Encoder, EncoderConfig, typed

RATE = 8000


def recurrent(name="gru", **signal):
    """Return an encoder that streams: 80 samples, 10 ms, make a token."""
    tokenizer = {"name": "wave", "kernels": (10, 8, 4), "strides": (5, 4, 4)}
    width = {"num_heads": 2} if name == "causal" else {}
    return _encoder(signal, {"tokenizer": tokenizer, "backbone": {"name": name, "dim": 16, "depth": 1, **width}})


def transformer(**signal):
    """Return an encoder of whole sounds, of 4 frequencies x 4 times in 0.32 s."""
    backbone = {"dim": 16, "depth": 1, "num_heads": 2}
    return _encoder({"mels": 32, **signal}, {"tokenizer": {"patch_size": (8, 8)}, "backbone": backbone})


def _encoder(signal, model):
    config = typed(EncoderConfig, "audio", "test")
    signal = {"sample_rate": RATE, "seconds": 0.32, **signal}
    return Encoder(config(modality="audio", signal=signal, model={"cls_token": False, **model})).eval()
