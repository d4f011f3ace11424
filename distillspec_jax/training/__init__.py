"""The training loop: state, optimisers, checkpoints and metrics."""
