"""What the server of ranks imports in tests: with all that their functions need, a start is a fork and no more."""

import mmssl.preload  # noqa: F401
import tasks.drill_ranks
import tasks.verify_ranks  # noqa: F401
