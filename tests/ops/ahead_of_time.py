"""Compiles what our launches launch, for a GPU that is not here, and reads registers, spills and shared memory off it.

A driver without a device takes the place of Triton's: the launches run as they are, on small tensors of the host, and
each kernel is compiled with the types, constants and options they chose, but never runs. Outputs hold garbage. Kernels
must have been imported without TRITON_INTERPRET, so this wants a process of its own:

    python -m tests.ops.ahead_of_time 90                      every launch of tests/ops/launches.py, as a table
    python -m tests.ops.ahead_of_time 80 ssd_scan short_conv  those of two operators
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget

from tests.ops.launches import LAUNCHES, RARE, Launch

SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
"""Shared memory that one program may take, by compute capability."""

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class Kernel:
    """One kernel as the GPU would get it."""

    name: str
    variant: str
    """Its compile-time constants, then its warps and stages."""

    launch: str
    """The first launch that asked for it."""

    arch: int

    registers: int
    spills: int
    """Instructions that store to local memory or load from it."""

    shared_bytes: int
    matrix_unit: str
    """The instruction its dots became: wgmma, mma, or none."""


@dataclass(frozen=True)
class Failure:
    """A launch that raised; kernels it would have come to later are unknown."""

    launch: str
    arch: int
    error: str


class DeviceFreeDriver:
    """What a launch asks of Triton's driver: claims to be a GPU of this compute capability, loads and runs nothing."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *launch: None

    @property
    def utils(self) -> SimpleNamespace:
        properties = {"max_shared_mem": sys.maxsize}  # too much of it is for the report, like all else
        return SimpleNamespace(
            get_device_properties=lambda device: properties,
            load_binary=lambda *cubin: (None, None, 0, 0, 1024),  # no handles; registers, spills; threads of a program
        )


def compile_launches(arch: int, launches: Iterable[Launch]) -> tuple[list[Kernel], list[Failure]]:
    """Run each launch once on a device-free driver, and read every kernel that was compiled.

    Args:
        arch: compute capability, a key of `SHARED_BYTES`.
    """
    assert not knobs.runtime.interpret, "interpreted kernels do not compile; unset TRITON_INTERPRET"
    driver: Any = DeviceFreeDriver(arch)
    triton.runtime.driver.set_active(driver)
    kernels: dict[str, Kernel] = {}
    failures = []
    for launch in launches:
        knobs.compilation.listener = partial(_keep, kernels, launch)
        try:
            launch.call()
        except Exception:  # whatever stops a launch is the finding; the others still count
            failures.append(Failure(launch.name, arch, traceback.format_exc(limit=-2)))
    return list(kernels.values()), failures


def _keep(
    kernels: dict[str, Kernel],
    launch: Launch,
    *,
    src: Any,
    metadata: dict[str, Any],
    metadata_group: dict[str, str],
    **_: Any,  # times, and whether the cache on disk had it
) -> None:
    if metadata["hash"] not in kernels:
        files = {Path(path).suffix: Path(path) for path in metadata_group.values()}
        kernels[metadata["hash"]] = _read(src, metadata, files, launch)


def _read(source: Any, metadata: dict[str, Any], files: dict[str, Path], launch: Launch) -> Kernel:
    ptx, cubin = files[".ptx"].read_text(), files[".cubin"]
    registers, stack, local = _usage(cubin)
    return Kernel(
        name=f"{source.fn.module.rpartition('.')[2]}.{metadata['name']}",
        variant=_variant(source, metadata),
        launch=launch.name,
        arch=metadata["target"].arch,
        registers=registers,
        spills=_count_spills(cubin) if stack or local else 0,
        shared_bytes=metadata["shared"],
        matrix_unit=next((unit for unit in ("wgmma", "mma") if re.search(rf"\b{unit}\.", ptx)), "none"),
    )


def _usage(cubin: Path) -> tuple[int, ...]:
    """Registers, bytes of stack, bytes of local memory."""
    usage = _cuobjdump("-res-usage", cubin)
    return tuple(max(map(int, re.findall(rf"\b{resource}:(\d+)", usage))) for resource in ("REG", "STACK", "LOCAL"))


def _count_spills(cubin: Path) -> int:
    """Slow: for kernels that have anything to spill to."""
    instructions = _cuobjdump("-sass", cubin)
    assert "EXIT" in instructions, f"no instructions to count in {cubin}"
    return len(re.findall(r"\b(?:STL|LDL)\b", instructions))


def _cuobjdump(what: str, cubin: Path) -> str:
    return subprocess.run([CUOBJDUMP, what, cubin], capture_output=True, text=True, check=True).stdout


def _variant(source: Any, metadata: dict[str, Any]) -> str:
    constants = {source.fn.arg_names[path[0]]: value for path, value in source.constants.items()}
    named = [
        name if value is True else f"{name}={value}" for name, value in constants.items() if value not in (None, False)
    ]
    return " ".join([*named, f"warps={metadata['num_warps']}", f"stages={metadata['num_stages']}"])


def compile_in_subprocess(arch: int, operators: Iterable[str]) -> tuple[list[Kernel], list[Failure]]:
    """`compile_launches` of these operators, whatever this process does with kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        command = [sys.executable, "-m", "tests.ops.ahead_of_time", str(arch), *operators, "--json", found]
        subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], check=True)
        kernels, failures = json.loads(found.read_text())
    return [Kernel(**kernel) for kernel in kernels], [Failure(**failure) for failure in failures]


def table(kernels: list[Kernel]) -> str:
    """One line a kernel, columns by the names of `Kernel`."""
    lines = [[f.name for f in fields(Kernel)], *(list(map(str, asdict(kernel).values())) for kernel in kernels)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def main() -> None:
    every = LAUNCHES | RARE
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arch", type=int, choices=list(SHARED_BYTES))
    parser.add_argument("operators", nargs="*", metavar="OPERATOR", help=f"all if none of {', '.join(every)}")
    parser.add_argument("--json", type=Path, help="write here instead of printing")
    arguments = parser.parse_args()
    launches = [launch for operator in arguments.operators or every for launch in every[operator]]
    kernels, failures = compile_launches(arguments.arch, launches)
    if arguments.json:
        arguments.json.write_text(json.dumps([[asdict(k) for k in kernels], [asdict(f) for f in failures]]))
        return
    print(f"triton {triton.__version__}, sm_{arguments.arch}")
    print(table(kernels))
    for failure in failures:
        print(f"\n{failure.launch} failed:\n{failure.error}")


if __name__ == "__main__":
    main()
