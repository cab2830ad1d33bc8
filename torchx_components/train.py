"""TorchX component that trains. It imports nothing of ours, as TorchX may have its own environment.

torchx run torchx_components/train.py:tim4rec -j 1x2 --data DIR -- --training.epochs 3
python -m torch.distributed.run --nproc-per-node 2 -m ssd_torchrec train tim4rec --data.path DIR --training.epochs 3
"""

import shlex
import sys

import torchx.specs as specs
from torchx.components import dist


def tim4rec(
    *script_args: str,
    j: str = "1x2",
    preset: str = "tim4rec",
    data: str = "",
    output: str = "./runs",
    name: str = "",
    gpu: bool = False,
    cpu: int = 0,
    memory_gib: int = 0,
    h: str = "",
    image: str = "",
    python: str = "",
) -> specs.AppDef:
    """Train TiM4Rec.

    Args:
        script_args: overrides of the run, after a bare --, as `ssd-torchrec train tim4rec --help` lists them
        j: hosts x processes on each, one process a GPU where there are GPUs
        preset: run to start from, such as tim4rec-ml-1m-64d; `ssd-torchrec train --help` lists them
        data: folder of a data set; empty for the generated one, made on the spot
        output: folder that holds the runs
        name: folder of this run in it; empty for the job's id
        gpu: ask the scheduler for a GPU a process
        cpu: cores of a host to ask for; 0 for 2 a process, or 8 a process with a GPU
        memory_gib: memory of a host to ask for; 0 for 4 GiB a process, or 32 a process with a GPU
        h: named resource to ask for instead of gpu, cpu and memory_gib
        image: container image that holds ssd_torchrec, for schedulers that run containers
        python: interpreter on the hosts; empty for the one that runs TorchX, or the image's own
    """
    processes = dist.parse_nnodes(j)[2]
    words = ["train", preset, "--output", output]
    words += ["--data.path", data] if data else []
    words += ["--name", name] if name else []
    app = dist.ddp(
        *words,
        *script_args,
        m="ssd_torchrec",
        name="tim4rec",
        j=j,
        h=h or None,
        gpu=processes if gpu else 0,
        cpu=cpu or processes * (8 if gpu else 2),
        memMB=1024 * (memory_gib or processes * (32 if gpu else 4)),
        image=image,
        tee=0,
    )
    role = app.roles[0]
    role.name = "trainer"
    # torchrun is called by module, so that no environment has to be active; $$ is a $ that is left to the host's shell
    torchrun = shlex.quote(python or ("python" if image else sys.executable)) + " -m torch.distributed.run "
    threads = f"$${{OMP_NUM_THREADS:-$$(($$(nproc) > {processes} ? $$(nproc) / {processes} : 1))}}"
    command = role.args[1].removeprefix("torchrun ")
    role.args[1] = f"export OMP_NUM_THREADS={threads}; exec {torchrun}{command}"
    return app
