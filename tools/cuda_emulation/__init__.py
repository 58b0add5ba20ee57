"""CUDA kernels on a CPU: csrc/cuda compiled by a C++ compiler and run with CUDA's semantics.

See README.md.
"""
