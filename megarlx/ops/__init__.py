"""The ops: Python faces of the native kernels."""

from megarlx.ops.averaging import average_adamw_, replica_average_
from megarlx.ops.distill_loss import Teacher, linear_distill_loss
from megarlx.ops.linear_token_loss import Head, linear_token_loss
from megarlx.ops.loss_spec import LossSpec, TokenLoss
from megarlx.ops.sample import Sample, sample, sample_reference
from megarlx.ops.token_inputs import LossInputs
from megarlx.ops.token_loss import token_loss

__all__ = [
    "Head",
    "LossInputs",
    "LossSpec",
    "Sample",
    "Teacher",
    "TokenLoss",
    "average_adamw_",
    "linear_distill_loss",
    "linear_token_loss",
    "replica_average_",
    "sample",
    "sample_reference",
    "token_loss",
]
