"""What `experiments.benchmark` measures, one module each."""
