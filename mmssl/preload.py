"""What the server of ``mmssl.launch`` imports before it forks ranks; nothing here starts a thread."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed decides at its import what it runs on

import deepspeed  # noqa: F401
