"""Measuring drafts: acceptance, latency and task quality."""
