"""Speculative decoding with distilled drafts (DistillSpec, arXiv 2310.08461) in JAX."""

__version__ = "0.1.0"
