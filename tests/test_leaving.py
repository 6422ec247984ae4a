"""A process that has joined others ends with the code it was told, whatever its threads still do.

Planted bugs that fail here: sys.exit whatever was joined (the thread in the store aborts the process, every time), exit
handlers passed over, buffers lost.
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

BUSY = """
import atexit, sys, threading
import torch.distributed as dist
from mmssl.distributed import leave

entered = threading.Event()

def talk():
    # Nearly always outside the interpreter, and wants back in, as gloo's threads do now and then.
    while True:
        store.set("word", "x" * 100_000)
        entered.set()

store = dist.TCPStore("127.0.0.1", 0, 1, True)
dist.init_process_group("gloo", store=store, rank=0, world_size=1)
threading.Thread(target=talk, daemon=True).start()
entered.wait()
"""
SAYING = """
atexit.register(lambda: print("handled", end=""))
print("said", end=" ")
leave(3)
"""


def ends(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.distributed
def test_a_rank_leaves_whatever_its_threads_do():
    assert ends(BUSY + SAYING) == (3, "said handled", "")


def test_a_process_of_its_own_leaves_as_any_other():
    assert ends("import atexit\nfrom mmssl.distributed import leave\n" + SAYING) == (3, "said handled", "")


@pytest.mark.parametrize("script", ["tasks/pretrain.py", "tasks/finetune.py", "mmssl/__main__.py"])
def test_whatever_starts_a_rank_leaves_so(script):
    source = (ROOT / script).read_text()
    assert source.count(" leave(") == 1
    assert "sys.exit(main([" not in source
