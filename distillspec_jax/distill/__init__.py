"""Distillation: divergences, data sources, losses, the step and the named recipes."""
