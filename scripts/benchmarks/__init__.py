"""Benchmarks of the optimizers, run by `./scripts/benchmark`."""
