"""The pieces of gpu_suite.py by what they look at, their order, and what runs them."""
