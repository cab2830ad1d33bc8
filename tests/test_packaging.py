"""What make, pip and the continuous check rely on."""

import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SHIM = tomllib.loads((ROOT / "packaging" / "fbgemm-gpu-shim" / "pyproject.toml").read_text())
OF_CLUSTERS = "spark"  # the extra whose version a cluster decides
ASKED = {
    canonicalize_name(requirement.name): requirement
    for asked in [
        PROJECT["dependencies"],
        *(asked for extra, asked in PROJECT["optional-dependencies"].items() if extra != OF_CLUSTERS),
    ]
    for requirement in map(Requirement, asked)
}


def pins(name: str) -> dict[str, str]:
    """Package to exact version of a requirements file and of those it includes."""
    found = {}
    for line in (ROOT / "requirements" / name).read_text().splitlines():
        if line.startswith("-r "):
            found |= pins(line.removeprefix("-r "))
        elif line and line[0].isalpha():
            requirement = Requirement(line)
            (exact,) = requirement.specifier
            assert exact.operator == "==", f"{line} is no exact version"
            found[canonicalize_name(requirement.name)] = exact.version
    return found


@pytest.mark.parametrize(
    "stack",
    [
        {"torch": "2.13.0", "torchrec": "1.8.0", "fbgemm-gpu": "1.8.0", "triton": "3.7.1"},
        {"torch": "2.11.0", "torchrec": "1.6.1", "fbgemm-gpu": "1.6.0", "triton": "3.6.0"},
    ],
    ids=["newer", "older"],
)
def test_both_supported_stacks_are_admitted(stack):
    for name, version in stack.items():
        assert ASKED[name].specifier.contains(version), f"{name} {version} is outside {ASKED[name]}"


def test_releases_that_were_never_tried_together_are_not_admitted():
    for name, version in {"torch": "2.14.0", "torchrec": "1.9.0", "fbgemm-gpu": "1.9.0"}.items():
        assert not ASKED[name].specifier.contains(version)


def test_cpu_and_cuda_pin_everything_that_the_project_asks_for():
    cpu, cuda = pins("cpu.txt"), pins("cuda.txt")
    assert set(cuda) == set(ASKED)
    assert set(cpu) == set(ASKED) - {"fbgemm-gpu"} | {"fbgemm-gpu-cpu"}
    for name, version in cuda.items():
        assert ASKED[name].specifier.contains(version), f"{name} {version} is outside {ASKED[name]}"


def test_the_shim_is_metadata_that_brings_the_pinned_cpu_build():
    version = pins("cpu.txt")["fbgemm-gpu-cpu"]
    assert SHIM["project"]["name"] == "fbgemm-gpu"
    assert SHIM["project"]["version"] == version == pins("cuda.txt")["fbgemm-gpu"]
    assert SHIM["project"]["dependencies"] == [f"fbgemm-gpu-cpu=={version}"]
    assert SHIM["tool"]["setuptools"]["packages"] == []


@pytest.fixture
def checkout(tmp_path):
    """A folder with what make looks at, where each file is as old as the others."""
    for name in ("Makefile", "pyproject.toml", "requirements", "packaging"):
        here = ROOT / name
        (shutil.copytree if here.is_dir() else shutil.copy)(here, tmp_path / name)
    return tmp_path


def planned(checkout: Path, target: str, *variables: str, stack: str = "cpu") -> str:
    """What make would do; a make that runs this test hands nothing down."""
    command = ["make", "--dry-run", f"STACK={stack}", *variables, target]
    path = {"PATH": os.environ["PATH"]}
    return subprocess.run(command, cwd=checkout, env=path, capture_output=True, text=True, check=True).stdout


def install(checkout: Path, stack: str = "cpu") -> Path:
    ready = checkout / ".venv" / ".ready"
    ready.parent.mkdir(exist_ok=True)
    ready.write_text(f"{stack} {checkout}\n")
    return ready


INSTALLS = "pip install --quiet --requirement"


@pytest.mark.parametrize("target", ["train", "test", "test-slow", "lint", "gpu-check"])
def test_a_bare_checkout_is_installed_first(checkout, target):
    assert f"{INSTALLS} requirements/cpu.txt" in planned(checkout, target)


def test_a_second_run_reuses_the_environment(checkout):
    install(checkout)
    assert INSTALLS not in planned(checkout, "train")
    assert "torchx run torchx_components/train.py:tim4rec" in planned(checkout, "train")


def test_an_interrupted_install_is_begun_anew(checkout):
    install(checkout).unlink()
    assert "-m venv --clear" in planned(checkout, "train")


@pytest.mark.parametrize("file", ["pyproject.toml", "requirements/common.txt", "requirements/cpu.txt"])
def test_changed_requirements_are_installed(checkout, file):
    ready = install(checkout)
    later_s = ready.stat().st_mtime + 1
    os.utime(checkout / file, (later_s, later_s))
    assert INSTALLS in planned(checkout, "train")


def test_a_driver_that_appears_and_a_folder_that_moves_are_noticed(checkout):
    install(checkout)
    assert f"{INSTALLS} requirements/cuda.txt" in planned(checkout, "train", stack="cuda")
    moved = checkout.rename(checkout.with_name("moved"))
    assert INSTALLS in planned(moved, "train")


def test_the_tests_run_once_more_with_the_older_torchrec(checkout):
    (checkout / "tests" / "data").mkdir(parents=True)
    plan = planned(checkout, "test")
    assert "--no-deps --target" in plan
    assert "torchrec==1.6.1" in plan
    assert "pytest -q -n auto --dist loadgroup tests/data" in plan


def test_a_gpu_host_checks_with_an_interpreter_of_its_own(checkout):
    plan = planned(checkout, "gpu-check", "PYTHON=/opt/python")
    assert INSTALLS not in plan
    assert "/opt/python -m benchmarks.gpu_check" in plan


@pytest.fixture
def find_python(tmp_path):
    """Runs packaging/find-python where the named interpreters are all there are; each is a shell script."""

    def find(interpreters: dict[str, str], python: str = "") -> subprocess.CompletedProcess[str]:
        for name, script in interpreters.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
            (tmp_path / name).chmod(0o755)
        environment = {"PATH": str(tmp_path), "PYTHON": python}
        return subprocess.run(
            ["/bin/sh", ROOT / "packaging" / "find-python"], env=environment, capture_output=True, text=True
        )

    return find


def pretends(version: str, old: int = 0, venv: int = 0) -> str:
    """An interpreter that answers the three questions put to it."""
    return f'case "$2" in *platform*) echo {version} ;; *version_info*) exit {old} ;; *) exit {venv} ;; esac'


def test_the_default_python_is_taken_if_it_will_do(find_python, tmp_path):
    found = find_python({"python3": pretends("3.12.1"), "python3.11": pretends("3.11.7")})
    assert found.stdout.strip() == str(tmp_path / "python3")


def test_another_python_is_taken_where_the_default_is_too_old_or_broken(find_python, tmp_path):
    broken = "echo 'not found' >&2; exit 127"
    found = find_python({"python3": pretends("3.9.2", old=1), "python3.13": broken, "python3.11": pretends("3.11.7")})
    assert found.stdout.strip() == str(tmp_path / "python3.11")


def test_no_fitting_python_is_a_message_that_says_what_was_found(find_python):
    found = find_python({"python3": pretends("3.9.2", old=1), "python3.12": pretends("3.12.1", venv=1)})
    assert found.returncode == 1
    assert "needs Python 3.11, 3.12 or 3.13" in found.stderr
    assert "python3 is Python 3.9.2" in found.stderr
    assert "apt install python3-venv" in found.stderr
    assert "make train PYTHON=" in found.stderr


def test_the_python_that_was_named_is_the_only_candidate(find_python):
    found = find_python({"python3": pretends("3.12.1"), "mine": pretends("3.10.4", old=1)}, python="mine")
    assert found.returncode == 1
    assert "mine is Python 3.10.4" in found.stderr
