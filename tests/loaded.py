"""What the server of ranks imports in tests: with all that their functions need, a start is a fork and no more."""

import mmssl.preload  # noqa: F401
import tasks.verify_ranks  # noqa: F401
from tasks import drill_ground, drill_ranks
from tasks.build import load_recipe
from tasks.monitor import cost_of

# What rank 0 of every run would measure anew: a fork has it, and what it takes to measure it.
for recipe, settings in ((drill_ranks.RECIPE, drill_ground.SETTINGS),):
    cost_of(load_recipe(recipe, settings))
