"""The command line: `ssd-torchrec COMMAND` or `python -m ssd_torchrec COMMAND`.

The only module that looks at the environment: torchrun's variables tell a process its place, TorchX's job id names a
run that has no name.
"""

import argparse
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from ssd_torchrec.errors import ConfigError, SSDTorchRecError

if TYPE_CHECKING:
    from ssd_torchrec.distributed.capacity import Capacity


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 doctor found something, 2 refused with a message of ours."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if words[0] not in COMMANDS:
        print(f"ssd-torchrec: no command {words[0]!r}\n\n{_overview()}", file=sys.stderr)
        return 2
    _hush_dependencies()
    try:
        return COMMANDS[words[0]].run(words[1:])
    except SSDTorchRecError as error:
        print(f"ssd-torchrec {words[0]}: {type(error).__name__}: {error}", file=sys.stderr)
        return 2


def _hush_dependencies() -> None:
    """Leave out what torch, torchrec and fbgemm say to their own developers: users can do nothing about it."""
    warnings.filterwarnings("ignore", module=r"(torch|torchrec|fbgemm_gpu|tensordict)(\.|$)")
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)


def _generate(words: list[str]) -> int:
    from ssd_torchrec.data.generate import generate
    from ssd_torchrec.data.lifelong import LifelongConfig
    from ssd_torchrec.data.synthetic import SyntheticConfig

    laws = {"gaps": SyntheticConfig(), "lifelong": LifelongConfig()}

    @dataclass(frozen=True, kw_only=True)
    class Generate:
        folder: tyro.conf.Positional[str]
        """Where the data set goes; one that is there is replaced."""

        preset: Literal["gaps", "lifelong"] = "gaps"
        """gaps: short histories whose next item hangs on the time between events; lifelong: histories of thousands of
        events whose last items hang on an event more than a thousand back. It decides the options of the law."""

        law: SyntheticConfig | LifelongConfig = field(default_factory=SyntheticConfig)
        """Sizes and probabilities."""

    asked = tyro.cli(
        Generate,
        args=words,
        default=Generate(folder=tyro.MISSING, law=laws.get(_value_of("--preset", words), laws["gaps"])),
        prog="ssd-torchrec generate",
        description=COMMANDS["generate"].about,
        config=(tyro.conf.AvoidSubcommands,),
    )
    meta = generate(asked.law, Path(asked.folder))
    print(f"{asked.folder}: {meta.num_users} users, {meta.num_items} items, {meta.num_events} events")
    return 0


def _prepare(words: list[str]) -> int:
    from ssd_torchrec.data.prepare.presets import PRESETS
    from ssd_torchrec.data.prepare.report import print_outcome, print_step
    from ssd_torchrec.data.prepare.run import PrepareConfig, prepare

    @dataclass(frozen=True, kw_only=True)
    class Prepare:
        log: tyro.conf.Positional[str]
        """File of the log, or folder of its files."""

        output: str
        """Where the data set goes; one that is there is replaced."""

        preset: str = ""
        """Official layout of the log, which then is the default of the options below; one of those listed above."""

        config: PrepareConfig = field(default_factory=PrepareConfig)

    preset = _value_of("--preset", words)
    if preset and preset not in PRESETS:
        raise ConfigError(f"--preset must be one of {', '.join(PRESETS)}, got {preset!r}; without it, name the columns")
    chosen = PrepareConfig(log=PRESETS[preset].log, name=preset) if preset else PrepareConfig()
    listed = _listed({name: of.about for name, of in PRESETS.items()})
    asked = tyro.cli(
        Prepare,
        args=words,
        default=Prepare(log=tyro.MISSING, output=tyro.MISSING, config=chosen),
        prog="ssd-torchrec prepare",
        description=f"{COMMANDS['prepare'].about}\n\npresets:\n{listed}",
        config=(tyro.conf.OmitArgPrefixes,),
    )
    meta = prepare(asked.log, Path(asked.output), asked.config, on_step=print_step)
    print_outcome(meta, Path(asked.output))
    return 0


def _prepare_ranking(words: list[str]) -> int:
    from ssd_torchrec.data.prepare.report import print_step
    from ssd_torchrec.data.ranking.prepare import prepare_ranking
    from ssd_torchrec.data.ranking.prepare_config import PrepareRankingConfig
    from ssd_torchrec.data.ranking.prepare_report import print_prepared

    @dataclass(frozen=True, kw_only=True)
    class PrepareRanking(PrepareRankingConfig):
        impressions: tyro.conf.Positional[str]
        """File of the impressions, or folder of its files."""

        events: str
        """File of the log of events, or folder of its files; how it is read is said by --log.user and the like."""

        output: str
        """Where the data set goes; one that is there is replaced."""

    asked = tyro.cli(
        PrepareRanking, args=words, prog="ssd-torchrec prepare-ranking", description=COMMANDS["prepare-ranking"].about
    )
    prepared = prepare_ranking(asked.impressions, asked.events, asked.output, asked, on_step=print_step)
    print_prepared(prepared, Path(asked.output))
    return 0


def _listed(about: Mapping[str, str]) -> str:
    """A line each, name and what it is."""
    widest = max(map(len, about))
    return "\n".join(f"  {name:<{widest}} {words}" for name, words in about.items())


def _value_of(option: str, words: list[str]) -> str:
    """The value of an option that decides the defaults of others."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(option, dest="value", default="")
    return parser.parse_known_args(words)[0].value


def _train(words: list[str]) -> int:
    from ssd_torchrec.distributed.collectives import word_of_rank_0
    from ssd_torchrec.distributed.process import launched, process_group
    from ssd_torchrec.training.config import RunConfig
    from ssd_torchrec.training.presets import presets
    from ssd_torchrec.training.ranking_config import RankingRunConfig, ranking_presets
    from ssd_torchrec.training.ranking_run import train_ranking
    from ssd_torchrec.training.run import train

    rankings = ranking_presets()
    runs, about = presets() | rankings, COMMANDS["train"].about
    listed = _listed({name: words for name, (words, _) in runs.items()})
    if words[:1] in ([], ["-h"], ["--help"]):
        print(f"usage: ssd-torchrec train PRESET [--help]\n\n{about}\n\npresets:\n{listed}")
        sys.exit(0 if words else 2)
    if words[0] not in runs:
        raise ConfigError(f"the preset must be one of those below, got {words[0]!r}\n{listed}")
    config = tyro.cli(
        RankingRunConfig if words[0] in rankings else RunConfig,
        args=words[1:],
        default=runs[words[0]][1],
        prog=f"ssd-torchrec train {words[0]}",
        description=about,
        config=(tyro.conf.AvoidSubcommands,),
    )
    world = launched(os.environ)
    with process_group(world):
        config = replace(config, name=word_of_rank_0(config.name or _default_name()))
        if isinstance(config, RankingRunConfig):
            train_ranking(config, world)
        else:
            train(config, world)
    return 0


def _plan(words: list[str]) -> int:
    from ssd_torchrec.distributed.capacity import CapacityRequest, figures, plan_capacity
    from ssd_torchrec.distributed.plan import BagSplit
    from ssd_torchrec.training.presets import presets

    runs, preset = presets(), _value_of("--preset", words) or "tim4rec"
    if preset not in runs:
        raise ConfigError(
            f"--preset must be a preset of `ssd-torchrec train --help`, got {preset!r}; take one of those"
        )
    run = runs[preset][1]

    @dataclass(frozen=True, kw_only=True)
    class Plan:
        items: int
        """Items of the catalogue."""

        ranks: int
        """GPUs, one a process."""

        memory_gib: float
        """Memory of a GPU in GiB."""

        preset: str = "tim4rec"
        """Preset of `ssd-torchrec train`, which then is the default of the options below."""

        batch: int = run.data.tokens_per_batch
        """Events of one global batch, over all ranks."""

        mean_length: float = min(50, run.max_length or 50)
        """Events of a history that the encoder sees, on average."""

        width: int = run.encoder.width
        """Channels of an event, and of the tables."""

        sharding: Literal["auto", "none", "row_wise", "table_wise", "column_wise", "data_parallel"] = (
            run.sharding.sharding
        )
        """Split of every table. auto: by rows; whole on one rank. data_parallel is refused."""

        by_table: dict[str, BagSplit] = field(default_factory=dict)
        """Tables that are split differently, such as city table_row_wise: a context feature's table has its name."""

        optimizer: Literal["auto", "sgd", "adagrad", "rowwise_adagrad", "adam"] = run.sharding.optimizer
        """What updates the tables. auto: adam."""

        compute_kernel: Literal["fused", "fused_uvm", "fused_uvm_caching", "dense"] = run.sharding.compute_kernel
        """Where split tables lie: on the GPU, in the machine's memory, or there behind a cache on the GPU.
        dense is refused."""

        loss: Literal["softmax", "bce", "sampled_softmax"] = run.objective.loss
        """What candidates cost: softmax over a large catalogue scores it where it lies."""

        negatives: int = run.objective.num_negatives
        """Draws for a global batch, of sampled_softmax."""

        context: dict[str, int] = field(default_factory=dict)
        """Context features: name and number of ids of each, such as city 5000."""

        ranks_per_machine: int = 8
        """GPUs that share a machine."""

        host_memory_gib: float | None = None
        """Memory of a machine in GiB, to judge what fused_uvm keeps there; without it, the need is told."""

        json: bool = False
        """Print one JSON object, with all bytes and ms."""

    asked = tyro.cli(
        Plan,
        args=words,
        prog="ssd-torchrec plan",
        description=f"{COMMANDS['plan'].about} Starts no process and needs no GPU.",
    )
    objective = replace(run.objective, loss=asked.loss, num_negatives=asked.negatives)
    sharding = replace(
        run.sharding,
        sharding=asked.sharding,
        by_table=asked.by_table,
        optimizer=asked.optimizer,
        compute_kernel=asked.compute_kernel,
    )
    capacity = plan_capacity(
        CapacityRequest(
            items=asked.items,
            ranks=asked.ranks,
            memory_gib=asked.memory_gib,
            encoder=replace(run.encoder, width=asked.width),
            objective=objective,
            sharding=sharding,
            dense=run.dense,
            context=asked.context,
            tokens_per_batch=asked.batch,
            mean_length=asked.mean_length,
            ranks_per_machine=asked.ranks_per_machine,
            host_memory_gib=asked.host_memory_gib,
        )
    )
    if asked.json:
        print(json.dumps(figures(capacity)))
    else:
        _print_capacity(capacity)
    return 0


def _print_capacity(capacity: "Capacity") -> None:
    heaviest, step_ms = capacity.heaviest, capacity.step_ms
    for table in capacity.tables:
        first = table.shards[0]
        part = f"{first.num_rows:,} rows x {first.num_columns}"
        ranks = sorted(shard.rank for shard in table.shards)
        over = f"up to {part} on each of ranks 0-{ranks[-1]}" if len(ranks) > 1 else f"on rank {ranks[0]}"
        how = f"{table.sharding} {capacity.compute_kernel}".strip() if table.sharding != "none" else "whole"
        print(f"{table.name}: {table.num_rows:,} rows x {table.width}, {how}, {capacity.optimizer}; {over}")
    scored = "scored in place" if capacity.scored_in_place else f"{capacity.candidates_per_rank:,} candidates"
    print(f"a rank's batch: {capacity.events_per_rank:,} events, {scored}\n")
    print(f"rank {heaviest.rank}, the heaviest{'GiB':>14}")
    for name in (
        "weights",
        "optimizer",
        "gradient",
        "cache",
        "lookups",
        "activations",
        "dense",
        "loss",
        "total",
        "host",
    ):
        if (size := getattr(heaviest, f"{name}_bytes")) or name == "total":
            print(f"  {name:<18}{size / 2**30:>14,.3f}")
    if step_ms is not None:
        print(
            f"\ntables, a step: {step_ms:,.3f} ms on the slowest rank, by TorchRec's estimate for its default hardware"
        )
    print(f"\n{capacity.verdict}")


def _models(words: list[str]) -> int:
    from rich.console import Console
    from rich.table import Table

    from ssd_torchrec.encoders.registry import SYSTEMS

    tyro.cli(_no_options, args=words, prog="ssd-torchrec models", description=COMMANDS["models"].about)
    table = Table("name", "what it is", "paper", "sees", "time", "streams", "longest", "presets, as NAME-PRESET")
    for name, system in SYSTEMS.items():
        config = system.small
        table.add_row(
            name,
            system.about,
            config.paper,
            "the past" if config.causal else "both ways",
            "yes" if config.reads_time else "no",
            "yes" if config.streams else "no",
            f"{config.length_cap:,}" if config.length_cap else "any",
            ", ".join(system.presets),
        )
    console = Console()
    Console(width=max(console.width, 160)).print(table)
    return 0


def _import_weights(words: list[str]) -> int:
    from ssd_torchrec.encoders.registry import AnyEncoderConfig
    from ssd_torchrec.training.import_weights import import_weights
    from ssd_torchrec.training.presets import presets

    runs, model = presets(), _value_of("--model", words)
    if model and model not in runs:
        raise ConfigError(f"--model must be a preset of `ssd-torchrec train --help`, got {model!r}")
    run = runs[model or "tim4rec"][1]

    @dataclass(frozen=True, kw_only=True)
    class Import:
        file: tyro.conf.Positional[str]
        """State dict of a published program, as .safetensors or as torch.save wrote it."""

        model: str
        """Preset in the shape of the weights, such as tim4rec-window-ml-1m-64d; what differs, say below."""

        data: str
        """Data set whose items the weights know."""

        items: str
        """Text file of a raw item id a line: the items of the published table from its row 1 on."""

        output: str
        """Folder of the run to make, such as runs/published."""

        encoder: AnyEncoderConfig
        """Shape of the encoder."""

    missing: dict[str, Any] = dict.fromkeys(("file", "model", "data", "items", "output"), tyro.MISSING)
    asked = tyro.cli(
        Import,
        args=words,
        default=Import(**missing, encoder=run.encoder),
        prog="ssd-torchrec import-weights",
        description=COMMANDS["import-weights"].about,
        config=(tyro.conf.AvoidSubcommands,),
    )
    folder = Path(asked.output)
    run = replace(run, encoder=asked.encoder, data=replace(run.data, path=asked.data))
    run = replace(run, output=str(folder.parent), name=folder.name)
    print(f"{import_weights(Path(asked.file), Path(asked.items), run)}/ holds the weights; evaluate or train on it")
    return 0


def _evaluate(words: list[str]) -> int:
    from ssd_torchrec.distributed.process import launched, process_group
    from ssd_torchrec.training.config import EvaluationConfig
    from ssd_torchrec.training.run import evaluate_checkpoint

    @dataclass(frozen=True, kw_only=True)
    class Evaluate:
        checkpoint: tyro.conf.Positional[str]
        """A checkpoint folder, or a run folder for its best one."""

        data: str = ""
        """Data set to rank on; empty: the one the checkpoint was trained on."""

        evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
        """Protocol."""

    asked = tyro.cli(Evaluate, args=words, prog="ssd-torchrec evaluate", description=COMMANDS["evaluate"].about)
    world = launched(os.environ)
    with process_group(world):
        evaluate_checkpoint(Path(asked.checkpoint), asked.data, asked.evaluation, world)
    return 0


def _recommend(words: list[str]) -> int:
    from ssd_torchrec.distributed.process import launched, process_group
    from ssd_torchrec.training.recommend import RecommendConfig, recommend

    @dataclass(frozen=True, kw_only=True)
    class Recommend(RecommendConfig):
        checkpoint: tyro.conf.Positional[str]
        """A checkpoint folder, or a run folder for its best one."""

        users: tyro.conf.Positional[str]
        """Parquet, CSV or JSON lines of whom to recommend to: user_id, or user_id, item, timestamp and context."""

        output: str
        """Parquet file to write: user_id, item, score; one that is there is replaced."""

    asked = tyro.cli(Recommend, args=words, prog="ssd-torchrec recommend", description=COMMANDS["recommend"].about)
    world = launched(os.environ)
    with process_group(world):
        written = recommend(Path(asked.checkpoint), Path(asked.users), Path(asked.output), asked, world)
    if world.rank == 0:
        print(f"{asked.output}: {written}")
    return 0


def _unshard(words: list[str]) -> int:
    from ssd_torchrec.distributed.unshard import unshard
    from ssd_torchrec.training.job import checkpoint_at

    @dataclass(frozen=True, kw_only=True)
    class Unshard:
        checkpoint: tyro.conf.Positional[str]
        """A checkpoint folder, or a run folder for its best one."""

        file: tyro.conf.Positional[str]
        """The file to write, such as whole.safetensors."""

        replace: bool = False
        """Put it in the place of a file that is there, once it is whole."""

    asked = tyro.cli(
        Unshard,
        args=words,
        prog="ssd-torchrec unshard",
        description=f"{COMMANDS['unshard'].about} Weights, state of the optimizers, and what the run was; `reshard` "
        "makes a checkpoint of it again, and refuses a file that lacks any of it.",
    )
    info = unshard(checkpoint_at(Path(asked.checkpoint)), Path(asked.file), replace=asked.replace)
    print(f"{asked.file}: step {info.state.step}, {_optimizers(info)}")
    return 0


def _reshard(words: list[str]) -> int:
    from ssd_torchrec.distributed.reshard import reshard
    from ssd_torchrec.training.job import checkpoint_at

    @dataclass(frozen=True, kw_only=True)
    class Reshard:
        source: tyro.conf.Positional[str]
        """A checkpoint folder, a run folder for its best one, or a file that `unshard` wrote."""

        folder: tyro.conf.Positional[str]
        """Folder of the new checkpoint, to train on (--training.resume) or to evaluate."""

        ranks: int = 1
        """Ranks that each get a file, with their rows of every table."""

    asked = tyro.cli(
        Reshard,
        args=words,
        prog="ssd-torchrec reshard",
        description=f"{COMMANDS['reshard'].about} Any number of ranks loads any checkpoint as it is: this saves them "
        "reading and memory, since a rank reads whole each piece that holds a row of its own. The optimizers and their "
        "state stay as they are.",
    )
    source = Path(asked.source)
    info = reshard(source if source.is_file() else checkpoint_at(source), Path(asked.folder), ranks=asked.ranks)
    print(f"{asked.folder}: step {info.state.step}, world size {info.world_size}, {_optimizers(info)}")
    return 0


def _grow(words: list[str]) -> int:
    from ssd_torchrec.models.next_item import ITEM_WEIGHT
    from ssd_torchrec.training.grow import grow
    from ssd_torchrec.training.job import checkpoint_at

    @dataclass(frozen=True, kw_only=True)
    class Grow:
        checkpoint: tyro.conf.Positional[str]
        """A checkpoint folder, or a run folder for its best one."""

        folder: tyro.conf.Positional[str]
        """Folder of the new checkpoint, to train on (--training.resume) or to evaluate."""

        data: str
        """Data set that was prepared with --extends."""

    asked = tyro.cli(
        Grow,
        args=words,
        prog="ssd-torchrec grow",
        description=f"{COMMANDS['grow'].about} A new item starts as the out-of-vocabulary row that its id was read as, "
        "so the grown model encodes every history as the old one did. Optimizer state stays, epochs count anew.",
    )
    info = grow(checkpoint_at(Path(asked.checkpoint)), Path(asked.folder), Path(asked.data))
    print(f"{asked.folder}: {info.tensors[ITEM_WEIGHT][1]:,} rows of items, {_optimizers(info)}")
    return 0


def _optimizers(info: Any) -> str:
    """What a checkpoint's optimizer state is of."""
    return f"tables with the state of {info.table_optimizer}, the rest with that of {info.dense_optimizer}"


def _inspect(words: list[str]) -> int:
    from ssd_torchrec.data.inspect import inspect_dataset

    @dataclass(frozen=True, kw_only=True)
    class Inspect:
        dataset: tyro.conf.Positional[str]
        """Folder of a data set."""

        plot: str = ""
        """File for a figure of lengths and gaps, such as gaps.png; empty: none."""

    asked = tyro.cli(Inspect, args=words, prog="ssd-torchrec inspect", description=COMMANDS["inspect"].about)
    inspect_dataset(Path(asked.dataset), Path(asked.plot) if asked.plot else None)
    return 0


def _doctor(words: list[str]) -> int:
    from ssd_torchrec.doctor import run_doctor

    tyro.cli(_no_options, args=words, prog="ssd-torchrec doctor", description=COMMANDS["doctor"].about)
    return run_doctor()


def _no_options() -> None:
    """Takes no options."""


@dataclass(frozen=True)
class Command:
    """One word after `ssd-torchrec`."""

    run: Callable[[list[str]], int]
    about: str


COMMANDS = {
    "generate": Command(
        _generate, "Write a generated data set, in which gaps between events matter, or events long past."
    ),
    "prepare": Command(_prepare, "Make a data set of a raw log: k-core, order, vocabulary, in bounded memory."),
    "prepare-ranking": Command(
        _prepare_ranking, "Join impressions with the histories of their users as of then, for models of clicks."
    ),
    "train": Command(_train, "Train a preset; every field of the run can be overridden."),
    "plan": Command(_plan, "Does a catalogue fit these GPUs, and how many does it take? Tables, bytes and a verdict."),
    "models": Command(_models, "What can be trained: paper, direction, time, streaming, presets."),
    "import-weights": Command(_import_weights, "Make a run of the weights of a published program."),
    "evaluate": Command(_evaluate, "Rank the full catalogue with a checkpoint."),
    "recommend": Command(_recommend, "Write the best items of each user, from a checkpoint and a file of users."),
    "unshard": Command(_unshard, "Write all of a checkpoint into one safetensors file."),
    "reshard": Command(
        _reshard, "Make a checkpoint for another number of ranks, of a checkpoint or of an unsharded file."
    ),
    "grow": Command(_grow, "Give a checkpoint rows for the items that a data set has got since."),
    "inspect": Command(_inspect, "What is in a data set: counts, lengths, gaps, files."),
    "doctor": Command(_doctor, "Is this installation sound? Versions, what does not fit, and the mend."),
}


def _overview() -> str:
    commands = _listed({name: command.about for name, command in COMMANDS.items()})
    return f"usage: ssd-torchrec COMMAND [--help]\n\n{commands}"


def _default_name() -> str:
    job = os.environ.get("TORCHX_JOB_ID", "").rsplit("/", 1)[-1]
    return job or time.strftime("%Y%m%d-%H%M%S")


if __name__ == "__main__":
    sys.exit(main())
