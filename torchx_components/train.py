"""TorchX components that train, one a system. They import nothing of ours, as TorchX may have its own environment.

torchx run torchx_components/train.py:tim4rec -j 1x2 --data DIR -- --training.epochs 3
python -m torch.distributed.run --nproc-per-node 2 -m ssd_torchrec train tim4rec --data.path DIR --training.epochs 3

All take the same arguments; `torchx run torchx_components/train.py:tim4rec --help` tells them.
"""

import shlex
import sys
from collections.abc import Callable

import torchx.specs as specs
from torchx.components import dist


def _trains(named: Callable[..., specs.AppDef]) -> Callable[..., specs.AppDef]:
    """The component that trains the system of this name; TorchX wants a `def` of each, and runs what that became."""
    model = named.__name__

    def component(
        *script_args: str,
        j: str = "1x2",
        preset: str = "",
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
        processes = dist.parse_nnodes(j)[2]
        words = ["train", preset or model, "--output", output]
        words += ["--data.path", data] if data else []
        words += ["--name", name] if name else []
        app = dist.ddp(
            *words,
            *script_args,
            m="ssd_torchrec",
            name=model,
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
        # torchrun is called by module, so that no environment has to be active; $$ is a $ left to the host's shell
        torchrun = shlex.quote(python or ("python" if image else sys.executable)) + " -m torch.distributed.run "
        threads = f"$${{OMP_NUM_THREADS:-$$(($$(nproc) > {processes} ? $$(nproc) / {processes} : 1))}}"
        command = role.args[1].removeprefix("torchrun ")
        role.args[1] = f"export OMP_NUM_THREADS={threads}; exec {torchrun}{command}"
        return app

    component.__name__ = component.__qualname__ = model
    component.__doc__ = f"""{named.__doc__}

    Args:
        script_args: overrides of the run, after a bare --, as `ssd-torchrec train {model} --help` lists them
        j: hosts x processes on each, one process a GPU where there are GPUs
        preset: run to start from, such as {model}-ml-1m-64d; `ssd-torchrec train --help` lists them; empty for {model}
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
    return component


@_trains
def tim4rec(*script_args: str) -> specs.AppDef:
    """Train TiM4Rec: SSD with steps gated by the time between events."""
    ...


@_trains
def ssd4rec(*script_args: str) -> specs.AppDef:
    """Train SSD4Rec: SSD in both directions, or forward only."""
    ...


@_trains
def ssd4rec_star(*script_args: str) -> specs.AppDef:
    """Train SSD4Rec*: TiM4Rec without time, as in its paper's ablation."""
    ...


@_trains
def bi_tim4rec(*script_args: str) -> specs.AppDef:
    """Train Bi-TiM4Rec: time-aware SSD in both directions."""
    ...


@_trains
def recmamba(*script_args: str) -> specs.AppDef:
    """Train RecMamba: one Mamba block over a whole life of events."""
    ...


@_trains
def mamba4rec(*script_args: str) -> specs.AppDef:
    """Train Mamba4Rec: Mamba blocks with feed-forwards."""
    ...


@_trains
def sasrec(*script_args: str) -> specs.AppDef:
    """Train SASRec: causal attention."""
    ...


@_trains
def tisasrec(*script_args: str) -> specs.AppDef:
    """Train TiSASRec: causal attention that knows the intervals."""
    ...


@_trains
def bert4rec(*script_args: str) -> specs.AppDef:
    """Train BERT4Rec: attention both ways, on masked items."""
    ...


@_trains
def gru4rec(*script_args: str) -> specs.AppDef:
    """Train GRU4Rec: gated recurrent units."""
    ...


@_trains
def caser(*script_args: str) -> specs.AppDef:
    """Train Caser: convolutions over the last events."""
    ...


@_trains
def lrurec(*script_args: str) -> specs.AppDef:
    """Train LRURec: linear recurrent units."""
    ...


@_trains
def dlrm(*script_args: str) -> specs.AppDef:
    """Train a DLRM whose histories an encoder reads, on impressions."""
    ...
