"""The comparisons of docs/experiments.md: ``python -m benchmarks.experiments --help``."""
