"""What the doctor tries on a GPU, and what it says that `auto` becomes."""

from __future__ import annotations

from pathlib import Path

import pytest
from doctor_machines import Machine, ill

FUSED = """
import os
import torch

class DotProductAttention:
    def __init__(self, heads, head_dim, **options):
        self.options = options

    def __call__(self, q, k, v, **options):
        assert os.environ["NVTE_FLASH_ATTN"] == "0", "another kernel than cuDNN's is asked for"
        {body}
        return q
"""


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def whole_gpu(machine: Machine, fused: str = "pass", **torch: str) -> None:
    """A machine with everything, whose fused attention runs `fused`."""
    machine.gpu()
    machine.cuda_torch(**torch)
    machine.cuda_build("9.0")
    machine.package("transformer_engine", "", "2.12.0", "transformer-engine")
    machine.package("transformer_engine.pytorch", FUSED.format(body=fused))
    flash = "def flash_attn_func(q, k, v, causal):\n    return q\n"
    machine.package("flash_attn", flash, "2.8.3", "flash-attn")
    machine.package("flash_attn.flash_attn_interface", "")


def test_what_a_run_would_use_is_tried_on_the_card(machine):
    whole_gpu(machine)
    found = machine.findings()
    assert ill(found) == {}
    assert found["fused attention"].detail == "computes on the GPU, with cuDNN 91900"
    assert (
        found["FlashAttention call"].detail == found["CUDA kernel"].detail == "computes on the GPU"
    )


def test_a_cudnn_that_torch_would_not_take_is_told_beside_the_attention_that_it_computed(machine):
    unfit = "(_ for _ in ()).throw(RuntimeError('9.14 and not 9.19'))"
    whole_gpu(machine, f"torch.backends.cudnn.version = lambda: {unfit}")
    found = machine.findings()
    assert ill(found) == {}
    said = "computes on the GPU, with a cuDNN that torch would not take: 9.14 and not 9.19"
    assert found["fused attention"].detail == said


def test_a_package_whose_folder_another_one_ships_is_absent(machine):
    whole_gpu(machine)
    machine.package("flash_attn.cute", "import cutlass")
    assert machine.findings()["flash-attn-4"].state == "absent"


def test_nothing_is_tried_where_there_is_no_gpu(machine):
    found = machine.findings()
    assert not {"fused attention", "FlashAttention call", "CUDA kernel"} & set(found)


NO_SUBLIBRARY = "raise RuntimeError('CUDNN_STATUS_SUBLIBRARY_LOADING_FAILED')"


def test_two_cudnns_that_a_library_path_mixes_are_told_by_trying_without_it(machine):
    whole_gpu(machine, f"if 'LD_LIBRARY_PATH' in os.environ: {NO_SUBLIBRARY}")
    assert ill(machine.findings()) == {}
    found = machine.findings(LD_LIBRARY_PATH="/opt/cudnn/lib")
    assert ill(found) == {"fused attention": "broken"}
    said = "LOADING_FAILED; without LD_LIBRARY_PATH=/opt/cudnn/lib it computes: there are two"
    assert said in found["fused attention"].detail
    assert found["fused attention"].mend == "unset LD_LIBRARY_PATH"


@pytest.mark.parametrize("path", [{}, {"LD_LIBRARY_PATH": "/opt/cudnn/lib"}], ids=str)
def test_two_cudnns_that_do_not_fit_at_all_leave_another_attention(machine, path):
    whole_gpu(machine, NO_SUBLIBRARY)
    found = machine.findings(**path)
    assert ill(found) == {"fused attention": "broken"}
    assert "another one of this machine" in found["fused attention"].detail
    assert found["fused attention"].mend.endswith("--set training.attention=sdpa")


def test_a_computation_that_hangs_or_is_wrong_is_told(machine):
    wrong = "lambda *arguments: [types.SimpleNamespace(tolist=lambda: [0, 0])]"
    whole_gpu(machine, "import time; time.sleep(60)", sample=wrong)
    found = machine.findings("--time-limit-seconds", "4")
    assert ill(found) == {"fused attention": "broken", "CUDA kernel": "broken"}
    assert found["fused attention"].detail == "it did not end within 4 seconds"
    assert found["CUDA kernel"].detail.endswith("megarlx.sample drew [0, 0]; right is [0, 7]")


def test_what_auto_becomes_here_is_told_with_the_reason(machine):
    found = machine.findings()
    assert found["training.precision"].detail == "auto: fp32: this is a CPU"
    machine.gpu()
    machine.cuda_torch()
    machine.cuda_build("9.0")
    found = machine.findings()
    assert found["training.precision"].detail.startswith("auto: bf16: NVIDIA H100 80GB HBM3")
    assert found["training.layers"].detail == "auto: torch: Transformer Engine is not installed"
    whole_gpu(machine)
    found = machine.findings()
    assert found["training.layers"].detail == "auto: te: Transformer Engine 2.12.0 is here"
    assert found["training.attention"].detail == "auto: cudnn: through Transformer Engine 2.12.0"
