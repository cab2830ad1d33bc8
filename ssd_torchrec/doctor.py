"""Is this installation sound? Looks at versions, runs what usually breaks, and names the mend.

Judging is apart from looking: each `check_*` is a function of what was found, and `look` finds it. What may crash or
hang (shared libraries of two releases, a host that cannot reach itself) runs in processes of its own, the `*_probe`s.
"""

import importlib.metadata
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

STACKS = {  # torch, torchrec, fbgemm-gpu
    ("2.13", "1.8", "1.8"): "a supported stack",
    ("2.11", "1.6", "1.6"): "a supported stack",
    ("2.13", "1.6", "1.8"): "the older torchrec on the newer torch, tested on CPU",
}
PACKAGES = ("numpy", "pyarrow", "duckdb", "tyro", "rich", "tensorboard", "matplotlib")
REINSTALL = "pip install -r requirements/cpu.txt, or requirements/cuda.txt with an NVIDIA GPU"
ONE_FBGEMM = f"pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu, then {REINSTALL}"
PROBE_TIMEOUT_S = 120


@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    name: str
    ok: bool
    detail: str
    mend: str = ""
    """What to do about it; empty where nothing is to be done."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the GPUs are, and what torch can do with them."""

    driver: str | None
    """Version of the NVIDIA driver, None where none answers."""

    cuda: str | None
    """CUDA version torch was built for, None for a CPU build."""

    gpus: Sequence[tuple[str, tuple[int, int]]]
    """Name and compute capability of each GPU that torch can use."""

    built_for: Sequence[str]
    """Architectures in torch's build, such as sm_90."""

    nccl: bool
    """Whether torch was built with NCCL."""


@dataclass(frozen=True, kw_only=True)
class Probed:
    """How a probe ended."""

    ok: bool
    output: str
    """Last line of what it printed, or why it failed."""


def check_python(version: str) -> Finding:
    """3.11 to 3.13: the older lack what we use, TorchX does not run on newer ones."""
    ok = release(version) in ("3.11", "3.12", "3.13")
    mend = "make clean, then make train PYTHON=/path/to/python3.11 (or 3.12, 3.13)"
    return Finding("Python", ok, version, "" if ok else mend)


def check_stack(torch: str | None, torchrec: str | None, fbgemm: str | None) -> Finding:
    """torch, torchrec and FBGEMM are released together; a wrong one of the three fails late and far from the cause."""
    found = f"torch {torch or 'missing'}, torchrec {torchrec or 'missing'}, fbgemm-gpu {fbgemm or 'missing'}"
    about = STACKS.get((release(torch), release(torchrec), release(fbgemm)))
    if about:
        return Finding("Stack", True, f"{found}: {about}")
    wanted = " or ".join(" / ".join(stack) for stack in list(STACKS)[:2])
    mend = f"torch / torchrec / fbgemm-gpu must be {wanted}: {REINSTALL}"
    return Finding("Stack", False, f"{found}: these do not fit", mend)


def check_fbgemm(builds: Sequence[str], probed: Probed, gpus: int) -> Finding:
    """One build of FBGEMM, which loads, and the CUDA one where torch has GPUs.

    Args:
        builds: distributions that hold files of the fbgemm_gpu package. The shim of that name holds none.
        probed: what `fbgemm_probe` printed, the variant.
        gpus: GPUs that torch can use.
    """
    if not builds:
        return Finding("FBGEMM", False, "not installed", REINSTALL)
    if len(builds) > 1:
        return Finding("FBGEMM", False, f"{' and '.join(builds)} overwrite each other's files", ONE_FBGEMM)
    if not probed.ok:
        return Finding("FBGEMM", False, f"{builds[0]} does not load: {probed.output}", ONE_FBGEMM)
    if gpus and probed.output == "cpu":
        return Finding("FBGEMM", False, f"{builds[0]} has no CUDA operators, torch has {gpus} GPUs", ONE_FBGEMM)
    return Finding("FBGEMM", True, f"{builds[0]}, variant {probed.output}, its operators load")


def check_packages(versions: Mapping[str, str | None]) -> list[Finding]:
    """The other packages, by name; TorchX may be missing, as torchrun stands beside it."""
    torchx = versions.get("torchx")
    launcher = Finding("torchx", True, torchx or "not installed; it comes with pip install -e .[torchx]")
    needed = [(name, versions.get(name)) for name in PACKAGES]
    return [Finding(name, bool(found), found or "missing", "" if found else REINSTALL) for name, found in needed] + [
        launcher
    ]


def check_gpu(machine: Machine) -> Finding:
    """GPUs that torch can use and has code for; none at all is fine."""
    if machine.gpus:
        shown = ", ".join(f"{name} (sm_{major}{minor})" for name, (major, minor) in machine.gpus)
        detail = f"{shown}; driver {machine.driver or 'unknown'}, CUDA {machine.cuda}"
        bare = [name for name, arch in machine.gpus if not runs_on(arch, machine.built_for)]
        if bare:
            return Finding(
                "GPU", False, f"{detail}; torch has no code for {bare[0]}", "install a torch built for this GPU"
            )
        return Finding("GPU", True, detail)
    if machine.driver is None:
        return Finding("GPU", True, "none; everything runs on the CPU")
    found = f"driver {machine.driver} answers"
    if machine.cuda is None:
        return Finding(
            "GPU", False, f"{found}, torch is a CPU build", "make clean; pip install -r requirements/cuda.txt"
        )
    mend = f"update the driver to one for CUDA {machine.cuda}, and see that CUDA_VISIBLE_DEVICES hides none"
    return Finding("GPU", False, f"{found}, torch (CUDA {machine.cuda}) sees no GPU", mend)


def check_triton(version: str | None, probed: Probed, gpus: int) -> Finding:
    """Kernels compile for the GPU; without one they run in Triton's interpreter, in tests only."""
    if version is None:
        return Finding("Triton", not gpus, "not installed", REINSTALL if gpus else "")
    if not probed.ok:
        return Finding("Triton", False, f"{version}: {probed.output}", f"install a C compiler (gcc) and {REINSTALL}")
    where = "compiles for the GPU" if gpus else "interpreter only; without a GPU the PyTorch paths compute"
    return Finding("Triton", True, f"{version}, {where}")


def check_gloo(probed: Probed) -> Finding:
    """Two processes of this machine reach each other."""
    if probed.ok:
        return Finding("gloo", True, "two processes summed over the loopback")
    mend = "let the host's name resolve (hostname, /etc/hosts), or name an interface: export GLOO_SOCKET_IFNAME=lo"
    return Finding("gloo", False, probed.output, mend)


def check_nccl(machine: Machine) -> Finding:
    """GPUs exchange through NCCL, which comes with torch's CUDA builds."""
    if not machine.gpus:
        return Finding("NCCL", True, f"{'available' if machine.nccl else 'not in this torch'}; needed with GPUs only")
    mend = "" if machine.nccl else "install a CUDA build of torch: pip install -r requirements/cuda.txt"
    return Finding("NCCL", machine.nccl, "available" if machine.nccl else "not in this torch", mend)


def release(version: str | None) -> str:
    """Major and minor of a version, `2.13` of `2.13.0+cpu`; empty for None."""
    return ".".join((version or "").split("+")[0].split(".")[:2])


def runs_on(arch: tuple[int, int], built_for: Sequence[str]) -> bool:
    """Whether a GPU runs any of these: machine code of its generation and no newer than it, or PTX no newer than it.

    Args:
        arch: compute capability.
        built_for: as torch.cuda.get_arch_list(): sm_90, sm_90a (exactly that one), compute_90 (PTX).
    """
    for name in built_for:
        kind, _, digits = name.partition("_")
        exact, number = digits[-1:].isalpha(), int("".join(filter(str.isdigit, digits)) or 0)
        built = divmod(number, 10)
        same = built == arch if exact else built[0] == arch[0] and built[1] <= arch[1]
        if same or (kind == "compute" and not exact and built <= arch):
            return True
    return False


def fbgemm_probe() -> None:
    """Load FBGEMM, run an operator, print the variant."""
    import fbgemm_gpu
    import torch

    ends = torch.ops.fbgemm.asynchronous_complete_cumsum(torch.tensor([1, 2]))
    assert ends.tolist() == [0, 1, 3]
    print(fbgemm_gpu.__variant__)


def triton_probe() -> None:
    """Compile and run a kernel on the GPU, or run it in the interpreter without one."""
    import torch
    import triton
    import triton.language as tl
    from triton import knobs

    knobs.runtime.interpret = not torch.cuda.is_available()

    @triton.jit
    def double(x_ptr):
        cells = tl.arange(0, 16)
        tl.store(x_ptr + cells, 2 * tl.load(x_ptr + cells))

    x = torch.ones(16, device="cuda" if torch.cuda.is_available() else "cpu")
    double[(1,)](x)
    assert x.tolist() == [2.0] * 16


def gloo_probe(rank: int, store: str) -> None:
    """One of two processes that sum their ranks plus one; `store` is a file that both can reach."""
    import torch
    import torch.distributed as dist

    waits = timedelta(seconds=PROBE_TIMEOUT_S / 2)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=waits)
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    dist.destroy_process_group()
    assert total.item() == 3.0


def run_probes(calls: Mapping[str, str]) -> dict[str, Probed]:
    """Run probes side by side, each in a process of its own.

    Args:
        calls: calls of this module's functions, by a name for the answer: {"triton": "triton_probe()"}.
    """
    started = {
        name: subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", f"from ssd_torchrec import doctor; doctor.{call}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, call in calls.items()
    }
    return {name: _ended(process) for name, process in started.items()}


def look() -> list[Finding]:
    """Look at this installation and this machine; takes some seconds."""
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        calls = {"fbgemm": "fbgemm_probe()", "triton": "triton_probe()"}
        calls |= {f"gloo {rank}": f"gloo_probe({rank}, {store!r})" for rank in range(2)}
        probed = run_probes(calls)
    names = ("torch", "torchrec", "triton", "torchx", *PACKAGES)
    versions = {name: _version(name) for name in names}
    builds = fbgemm_builds()
    machine = _machine()
    gpus = len(machine.gpus)
    return [
        check_python(platform.python_version()),
        check_stack(versions["torch"], versions["torchrec"], _version(builds[0]) if builds else None),
        check_fbgemm(builds, probed["fbgemm"], gpus),
        check_gpu(machine),
        check_triton(versions["triton"], probed["triton"], gpus),
        check_gloo(probed["gloo 0"] if not probed["gloo 0"].ok else probed["gloo 1"]),
        check_nccl(machine),
        *check_packages(versions),
    ]


def fbgemm_builds() -> list[str]:
    """Installed distributions that hold files of the fbgemm_gpu package; the metadata-only shim is none of them."""
    return sorted(set(importlib.metadata.packages_distributions().get("fbgemm_gpu", [])))


def run_doctor() -> int:
    """Look, judge, print; 0 if all is well, else 1."""
    findings = look()
    console = Console()
    table = Table(box=None, show_header=False, pad_edge=False)
    for finding in findings:
        table.add_row("[green]ok[/]" if finding.ok else "[bold red]OFF[/]", finding.name, escape(finding.detail))
    console.print(table)
    for finding in findings:
        if not finding.ok:
            console.print(f"\n[bold red]{finding.name}:[/] {escape(finding.mend)}", soft_wrap=True)
    return 0 if all(finding.ok for finding in findings) else 1


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine() -> Machine:
    driver = _driver()
    try:
        import torch
    except (ImportError, OSError):  # missing, or its libraries are: the stack's finding says so
        return Machine(driver=driver, cuda=None, gpus=[], built_for=[], nccl=False)
    usable = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return Machine(
        driver=driver,
        cuda=torch.version.cuda,
        gpus=[(torch.cuda.get_device_name(gpu), torch.cuda.get_device_capability(gpu)) for gpu in usable],
        built_for=torch.cuda.get_arch_list() if usable else [],
        nccl=torch.distributed.is_available() and torch.distributed.is_nccl_available(),
    )


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.split("\n")[0].strip() or None if answer.returncode == 0 else None


def _ended(process: subprocess.Popen[str]) -> Probed:
    try:
        output, _ = process.communicate(timeout=PROBE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return Probed(ok=False, output=f"no answer within {PROBE_TIMEOUT_S} s")
    lines = output.strip().splitlines()
    last = lines[-1] if lines else f"ended with status {process.returncode}"
    return Probed(ok=process.returncode == 0, output=last)
