"""What the compiler is kept out of, and that it is not loaded before something is compiled.

Planted bugs that fail here: ``torch.compiler.disable`` at once, and no disabling at all.
"""

import subprocess
import sys

import torch

from mmssl.uncompiled import uncompiled

seen = []


@uncompiled
def noted(x):
    """Note whether the compiler traces this."""
    seen.append(torch.compiler.is_compiling())
    return x + 1


def test_compiled_code_calls_the_function_as_it_is():
    def doubled(x):
        return 2 * noted(2 * x)

    compiled = torch.compile(doubled, backend="eager")
    for _ in range(3):
        seen.clear()
        assert compiled(torch.ones(2)).tolist() == [6, 6]
        assert seen == [False]


def test_it_is_told_by_its_own_name():
    assert (noted.__name__, noted.__doc__) == ("noted", "Note whether the compiler traces this.")


def test_the_compiler_is_not_loaded_by_what_every_command_imports():
    words = (
        "import sys, tasks.cli, modalities.fbank, mmssl.losses.contrastive; sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", words], timeout=120).returncode == 0
