"""csrc as a C++ compiler takes it: launches, shared memory and PTX become calls of the engine.

    k<…><<<grid, block, bytes, stream>>>(…)   emulated::launch("k", …, [&] { k<…>(…); })
    __shared__ T name[n];                     memory that is fresh, and poisoned, in each block
    asm("ex2.approx.ftz.f32 …")               a function of the engine, see PTX
    bindings: is_cpu() and is_cuda() trade places, and the ops are registered in NAMESPACE

All else stays as it is, and so do line numbers: what the engine or a sanitizer reports is a place
in csrc. What cannot be rewritten stops with its file, line and name.
"""

from __future__ import annotations

import re
from pathlib import Path

NAMESPACE = "megarlx_emulated"

# PTX instructions and the functions of emulated_cuda.h that stand for them. It grows with csrc.
PTX = {
    "ex2.approx.ftz.f32": "ex2_approx_ftz",
    "max.NaN.f32": "max_nan",
    "fma.rn.bf16x2": "fma_bf16x2",
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": "mma_m16n8k16",
    # blocks run one after another here, and a launch behind what was launched before it
    "griddepcontrol.launch_dependents": "nothing",
    "griddepcontrol.wait": "nothing",
    "max.NaN.bf16x2": "max_nan_bf16x2",
    "max.bf16x2": "max_bf16x2",
    "cvt.rn.bf16x2.f32": "to_bf16x2",
}

# Bindings without a CUDA half.
CPU_ONLY = {"decode.cpp", "attention.cpp", "linear.cpp"}


class CannotRewrite(ValueError):
    """Something in a source for which the emulation has no counterpart."""


def refuse(name: str, text: str, at: int, what: str) -> CannotRewrite:
    line = text.count("\n", 0, at) + 1
    return CannotRewrite(f"{name}:{line}: {what}")


def end_of_group(text: str, at: int) -> int:
    """The index behind the parenthesis that closes the one at `at`."""
    depth = 0
    for i in range(at, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i + 1
    raise ValueError(f"no end of {text[at : at + 80]!r}")


def split_at_top(text: str, separator: str) -> list[str]:
    """The parts of `text` between separators that stand in no bracket."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(character, 0)
        if character == separator and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    return [*parts, text[start:].strip()]


def in_parentheses(operand: str) -> str:
    """x of an operand `"f"(x)`."""
    return operand[operand.index("(") + 1 : -1]


def rewrite_ptx(name: str, text: str) -> str:
    while found := re.search(r"\basm\b(?:\s+volatile)?\s*\(", text):
        end = end_of_group(text, found.end() - 1)
        template, *operands = split_at_top(text[found.end() : end - 1], ":")
        instruction = template.strip('"').split()[0].rstrip(";")
        if instruction not in PTX:
            known = ", ".join(sorted(PTX))
            what = f"the PTX instruction {instruction} has no function in the emulation; it knows "
            raise refuse(name, text, found.start(), f"{what}{known} (tools/cuda_emulation)")
        outputs, inputs = (
            [in_parentheses(operand) for operand in split_at_top(part, ",") if operand]
            for part in (*operands, "", "")[:2]
        )
        # one result is returned, several are given as references
        into = f"{outputs.pop()} = " if len(outputs) == 1 else ""
        call = f"{into}::emulated::{PTX[instruction]}({', '.join([*outputs, *inputs])})"
        text = text[: found.start()] + kept_lines(call, text[found.start() : end]) + text[end:]
    return text


def kept_lines(new: str, old: str) -> str:
    """`new` with as many lines as `old`."""
    return new + "\n" * (old.count("\n") - new.count("\n"))


def start_of_kernel(text: str, at: int) -> int:
    """Where the kernel's name, template arguments included, begins that ends before `at`."""
    i = len(text[:at].rstrip())
    if text[i - 1] == ">":
        depth = 0
        while i > 0:
            i -= 1
            depth += {">": 1, "<": -1}.get(text[i], 0)
            if depth == 0:
                break
    while i > 0 and re.match(r"[\w:]", text[i - 1]):
        i -= 1
    return i


def launch_bounds(text: str) -> dict[str, str]:
    """The threads that __launch_bounds__ allows, for each kernel that has them."""
    found = re.finditer(r"__launch_bounds__\(([^(),]+)(?:,[^;{]*?)?\)\s+(\w+)\s*\(", text)
    return {kernel: threads.strip() for threads, kernel in (m.groups() for m in found)}


def rewrite_dependent_launches(text: str) -> str:
    """A launch through dependent.h as a plain one."""
    while found := re.search(r"(?<!void )\blaunch_dependent\(", text):
        end = end_of_group(text, found.end() - 1)
        _, kernel, grid, block, stream, *values = split_at_top(text[found.end() : end - 1], ",")
        call = f"{kernel}<<<{grid}, {block}, 0, {stream}>>>({', '.join(values)})"
        text = text[: found.start()] + kept_lines(call, text[found.start() : end]) + text[end:]
    return text


def rewrite_launches(name: str, text: str) -> str:
    text = rewrite_dependent_launches(text)
    bounds = launch_bounds(text)
    while (at := text.find("<<<")) >= 0:
        close = re.compile(r">>>\s*\(").search(text, at)
        if close is None:
            raise refuse(name, text, at, "a launch without >>>(")
        start, end = start_of_kernel(text, at), end_of_group(text, close.end() - 1)
        kernel = text[start:at].strip()
        grid, block, *others = split_at_top(text[at + 3 : close.start()], ",")
        shared, stream = (*others, *("0", "nullptr")[len(others) :])
        plain = re.sub(r"<.*", "", kernel, flags=re.DOTALL)
        if variable := re.findall(rf"\bauto {plain} = (\w+)<", text[:start]):
            plain = variable[-1]
        most = bounds.get(plain, "0")
        call = (
            f'::emulated::launch("{plain}", ::emulated::address({kernel}), {most}, '
            f"{grid}, {block}, {shared}, "
            f"[&, on_stream = {stream}] {{ (void)on_stream; {kernel}({text[close.end() : end]}; }})"
        )
        text = text[:start] + kept_lines(call, text[start:end]) + text[end:]
    return text


def rewrite_shared(name: str, text: str) -> str:
    text = re.sub(
        r"extern __shared__ (?:__align__\(\d+\) )?unsigned char (\w+)\[\];",
        r"unsigned char* const \1 = ::emulated::dynamic_shared();",
        text,
    )
    text = re.sub(
        r"__shared__\s+([^;=,()]+?(?:<[^;=]*?>)?)\s+(\w+)((?:\[[^\]]+\])*);",
        r"static ::emulated::Shared<\1\3> shared_\2; auto& \2 = shared_\2.get();",
        text,
    )
    if (at := text.find("__shared__")) >= 0:
        raise refuse(name, text, at, f"shared memory of an unknown form: {text[at : at + 60]!r}")
    return text


def rewrite_kernels(name: str, text: str) -> str:
    """A .cu file, or a header that one includes; `name` is what reports call it."""
    return f'#line 1 "{name}"\n' + rewrite_shared(
        name, rewrite_launches(name, rewrite_ptx(name, text))
    )


def rewrite_binding(text: str) -> str:
    """The CUDA half of a binding, for tensors of the CPU, in NAMESPACE."""
    text = re.sub(r"TORCH_LIBRARY_IMPL\(megarlx, CPU, m\) \{[^}]*\}", "", text)
    text = text.replace("(megarlx, CUDA, m)", f"({NAMESPACE}, CPU, m)")
    text = re.sub(r"\(megarlx, (\w*Autograd), m\)", rf"({NAMESPACE}, \1, m)", text)
    text = text.replace("TORCH_LIBRARY(megarlx, m)", f"TORCH_LIBRARY({NAMESPACE}, m)")
    text = text.replace('"megarlx::', f'"{NAMESPACE}::')
    text = trade_devices(text)
    # bf16 products with fp32 results, which torch has on CUDA only
    return re.sub(r"\bat::((?:add)?mm_out\()", r"::emulated::\1", text)


def trade_devices(text: str) -> str:
    trade = {"is_cpu()": "is_cuda()", "is_cuda()": "is_cpu()"}
    return re.sub(r"\bis_(?:cpu|cuda)\(\)", lambda found: trade[found[0]], text)


def bindings(csrc: Path) -> list[Path]:
    return [path for path in sorted(csrc.glob("*.cpp")) if path.name not in CPU_ONLY]


def operators(csrc: Path, key: str = "CPU") -> list[str]:
    """The ops that have a CUDA kernel, or with the key "Autograd" a derivative, by name."""
    found: set[str] = set()
    for path in bindings(csrc):
        text = rewrite_binding(path.read_text())
        if f"({NAMESPACE}, {key}, m)" in text:
            found |= set(re.findall(r'm\.impl\("(\w+)"', text))
    return sorted(found)


def kernels(csrc: Path) -> list[str]:
    """The __global__ functions, by name."""
    text = "\n".join(path.read_text() for path in sorted((csrc / "cuda").iterdir()))
    pattern = r"__global__\s+void\s+(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s+)?(\w+)\s*\("
    return sorted(set(re.findall(pattern, text)))


def write_if_new(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def rewrite_tree(csrc: Path, out: Path) -> None:
    """csrc as `out`: the same tree, .cu files as .cu.cpp, without what has no CUDA half."""
    for path in bindings(csrc):
        write_if_new(
            out / path.name, f'#line 1 "csrc/{path.name}"\n' + rewrite_binding(path.read_text())
        )
    for pattern in ("*.h", "cpu/kernels.h", "math/*.h", "cuda/*"):
        for path in sorted(csrc.glob(pattern)):
            inside = path.relative_to(csrc)
            target = out / (f"{inside}.cpp" if path.suffix == ".cu" else inside)
            of_bindings = path.parent == csrc and path.suffix == ".h"
            text = trade_devices(path.read_text()) if of_bindings else path.read_text()
            write_if_new(target, rewrite_kernels(f"csrc/{inside}", text))
