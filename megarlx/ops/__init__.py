"""The ops: Python faces of the native kernels."""

from megarlx.ops.native import load

load()

from megarlx.ops.sample import Sample, sample, sample_reference  # noqa: E402

__all__ = ["Sample", "sample", "sample_reference"]
