"""Tasks: what a person runs."""
