"""What `./scripts/gpu-check` does: build, compare, test and time on one GPU."""
