"""The training loop and what it needs: objective, validation, checkpoints, log, progress."""
