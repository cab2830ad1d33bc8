import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ssd_torchrec.encoders.registry import SYSTEMS

runner = pytest.importorskip("torchx.runner", reason="torchx is an extra")
file_linter = pytest.importorskip("torchx.specs.file_linter")

ROOT = Path(__file__).parents[1]
TRAIN = ROOT / "torchx_components" / "train.py"
COMPONENTS = {
    "tim4rec": (TRAIN, []),
    "evaluate": (ROOT / "torchx_components" / "evaluate.py", ["--checkpoint", "runs/with space"]),
}


def dryrun(component: str, *flags: str, scheduler: str = "local_cwd"):
    file, required = COMPONENTS[component]
    with runner.get_runner() as torchx:
        return torchx.dryrun_component(f"{file}:{component}", [*required, *flags], scheduler, cfg={})


def role(component: str, *flags: str):
    (only,) = dryrun(component, *flags)._app.roles
    return only


def command(component: str, *flags: str) -> list[str]:
    """The words that the first host's shell executes."""
    ((replicas),) = dryrun(component, *flags).request.role_params.values()
    return shlex.split(replicas[0].args[-1].partition("exec ")[2])


@pytest.mark.parametrize("component", COMPONENTS)
def test_torchx_accepts_the_component(component):
    assert file_linter.validate(str(COMPONENTS[component][0]), component) == []


@pytest.mark.parametrize("system", [*SYSTEMS, "dlrm"])
def test_every_system_has_a_component_of_its_name(system):
    assert file_linter.validate(str(TRAIN), system) == []
    with runner.get_runner() as torchx:
        app = torchx.dryrun_component(f"{TRAIN}:{system}", ["--name", "n"], "local_cwd", cfg={})._app
    assert f"-m ssd_torchrec train {system} --output ./runs --name n" in app.roles[0].args[1]


@pytest.mark.parametrize("component", COMPONENTS)
def test_command_needs_no_activated_environment(component):
    words = command(component)
    assert words[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert words[words.index("ssd_torchrec") - 1] == "-m"


@pytest.mark.parametrize("spelling", ["-j", "--j"])
def test_processes_and_overrides_reach_torchrun_and_the_run(spelling):
    words = command("tim4rec", spelling, "1x3", "--data", "with space", "--name", "n", "--", "--training.epochs", "1")
    assert words[words.index("--nproc_per_node") + 1] == "3"
    ours = ["train", "tim4rec", "--output", "./runs", "--data.path", "with space", "--name", "n"]
    assert words[words.index("ssd_torchrec") + 1 :] == [*ours, "--training.epochs", "1"]


def test_a_preset_takes_the_place_of_the_default():
    words = command("tim4rec", "--preset", "tim4rec-ml-1m-64d")
    assert words[words.index("train") + 1] == "tim4rec-ml-1m-64d"


def test_without_a_data_set_the_run_decides():
    assert "--data.path" not in command("tim4rec")


def test_checkpoint_and_data_reach_the_evaluation():
    words = command("evaluate", "--data", "d", "--", "--evaluation.filter-seen")
    ours = ["evaluate", "runs/with space", "--data", "d", "--evaluation.filter-seen"]
    assert words[words.index("ssd_torchrec") + 1 :] == ours


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize(
    ("flags", "hosts", "resource"),
    [
        pytest.param(["-j", "1x2"], 1, (4, 0, 8), id="two-processes"),
        pytest.param(["-j", "2x8", "--gpu", "True"], 2, (64, 8, 256), id="two-hosts-of-eight-gpus"),
        pytest.param(["-j", "1x1", "--cpu", "3", "--memory_gib", "5"], 1, (3, 0, 5), id="asked-for-by-hand"),
    ],
)
def test_resources_follow_from_the_processes(component, flags, hosts, resource):
    asked = role(component, *flags)
    assert asked.num_replicas == hosts
    assert (asked.resource.cpu, asked.resource.gpu, asked.resource.memMB / 1024) == resource


def test_an_image_brings_its_own_interpreter():
    assert command("tim4rec", "--image", "ours:1")[0] == "python"
    assert command("tim4rec", "--image", "ours:1", "--python", "/opt/python")[0] == "/opt/python"


def test_slurm_script_asks_for_hosts_gpus_and_memory_and_meets_at_the_first_host():
    script = str(dryrun("tim4rec", "-j", "2x8", "--gpu", "True", scheduler="slurm").request)
    hosts = [line for line in script.splitlines() if line.startswith("#SBATCH --job-name")]
    assert len(hosts) == 2
    for host in hosts:
        assert {"--ntasks-per-node=1", "--gpus-per-task=8", "--cpus-per-task=64", "--mem=262144"} <= set(host.split())
    assert script.count("--rdzv_endpoint ${SLURM_JOB_NODELIST_HET_GROUP_0:=localhost}:29500") == 2
    assert script.count("--nnodes 2 --nproc_per_node 8") == 2
    assert script.count('TORCHX_JOB_ID=slurm://torchx/"$SLURM_JOB_ID"') == 2


def test_a_job_runs_from_an_unactivated_shell_without_naming_a_scheduler(tmp_path):
    """The real launcher, with a stand-in for the package that prints what a rank is told."""
    for name in ("torchx_components", ".torchxconfig"):
        (tmp_path / name).symlink_to(ROOT / name)
    told = ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "TORCHX_JOB_ID")
    script = f"import os, sys; print('told', [os.environ[name] for name in {told}], sys.argv[1:])"
    (tmp_path / "ssd_torchrec").mkdir()
    (tmp_path / "ssd_torchrec" / "__main__.py").write_text(script)
    (tmp_path / "ssd_torchrec" / "__init__.py").touch()
    torchx = Path(sys.executable).with_name("torchx")
    finished = subprocess.run(
        [torchx, "run", "torchx_components/train.py:tim4rec", "--", "--training.epochs", "1"],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    told = sorted(line for line in finished.stderr.splitlines() if "told" in line)
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    for rank, line in enumerate(told):
        assert line.startswith(f"trainer/0 told ['{rank}', '2', '{threads}', 'local_cwd://torchx/tim4rec-")
        assert line.endswith("['train', 'tim4rec', '--output', './runs', '--training.epochs', '1']")
    assert len(told) == 2
