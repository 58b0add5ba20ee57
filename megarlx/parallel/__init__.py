"""Pipelines, data parallelism, and where each parameter lies."""
