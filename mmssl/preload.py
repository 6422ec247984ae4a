"""What the server of ``mmssl.launch`` imports before it forks ranks; nothing here starts a thread."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed decides at its import what it runs on

import deepspeed
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 (asked for by all of ZeRO; it imports torch's compiler)
