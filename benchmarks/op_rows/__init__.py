"""Rows of ops.py, one module an op."""
