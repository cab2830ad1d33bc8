"""TorchX component that evaluates a checkpoint. It imports nothing of ours, as TorchX may have its own environment.

torchx run torchx_components/evaluate.py:evaluate --checkpoint runs/NAME
python -m ssd_torchrec evaluate runs/NAME
"""

import shlex
import sys

import torchx.specs as specs
from torchx.components import dist


def evaluate(
    *script_args: str,
    checkpoint: str,
    j: str = "1x1",
    data: str = "",
    gpu: bool = False,
    cpu: int = 0,
    memory_gib: int = 0,
    h: str = "",
    image: str = "",
    python: str = "",
) -> specs.AppDef:
    """Rank the full catalogue with a checkpoint.

    Args:
        script_args: overrides of the protocol, after a bare --, as `ssd-torchrec evaluate --help` lists them
        checkpoint: folder of a checkpoint, or of a run for its best one
        j: hosts x processes on each, as many or as few as the table needs
        data: folder of a data set; empty for the one the checkpoint was trained on
        gpu: ask the scheduler for a GPU a process
        cpu: cores of a host to ask for; 0 for 2 a process, or 8 a process with a GPU
        memory_gib: memory of a host to ask for; 0 for 4 GiB a process, or 32 a process with a GPU
        h: named resource to ask for instead of gpu, cpu and memory_gib
        image: container image that holds ssd_torchrec, for schedulers that run containers
        python: interpreter on the hosts; empty for the one that runs TorchX, or the image's own
    """
    processes = dist.parse_nnodes(j)[2]
    words = ["evaluate", checkpoint, *(["--data", data] if data else [])]
    app = dist.ddp(
        *words,
        *script_args,
        m="ssd_torchrec",
        name="evaluate",
        j=j,
        h=h or None,
        gpu=processes if gpu else 0,
        cpu=cpu or processes * (8 if gpu else 2),
        memMB=1024 * (memory_gib or processes * (32 if gpu else 4)),
        image=image,
        tee=0,
    )
    role = app.roles[0]
    role.name = "evaluator"
    # torchrun is called by module, so that no environment has to be active; $$ is a $ that is left to the host's shell
    torchrun = shlex.quote(python or ("python" if image else sys.executable)) + " -m torch.distributed.run "
    threads = f"$${{OMP_NUM_THREADS:-$$(($$(nproc) > {processes} ? $$(nproc) / {processes} : 1))}}"
    command = role.args[1].removeprefix("torchrun ")
    role.args[1] = f"export OMP_NUM_THREADS={threads}; exec {torchrun}{command}"
    return app
