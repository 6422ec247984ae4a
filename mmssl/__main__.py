"""The console script, also ``python -m mmssl``."""

import sys
from pathlib import Path
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line, and end the process with its exit code."""
    import mmssl
    import modalities
    import tasks

    ours = Path(mmssl.__file__).resolve().parent.parent
    for package in (modalities, tasks):
        found = Path(package.__file__ or "").resolve()
        if found.parent.parent != ours:
            print(
                f"mmssl: '{package.__name__}' was imported from {found}, which hides mmssl's own; "
                "run the command from another folder or rename that file",
                file=sys.stderr,
            )
            sys.exit(2)
    from mmssl.distributed import leave
    from tasks.cli import main as run

    leave(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
