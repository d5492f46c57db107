"""What steps ask of a GPU, counted without one."""
