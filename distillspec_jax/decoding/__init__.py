"""Autoregressive and speculative decoding."""
