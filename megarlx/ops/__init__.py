"""The ops: Python faces of the native kernels."""

from megarlx.ops.native import load

load()
