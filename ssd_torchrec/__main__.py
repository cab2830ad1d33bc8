"""The command line: `ssd-torchrec COMMAND` or `python -m ssd_torchrec COMMAND`.

The only module that looks at the environment: torchrun's variables tell a process its place, TorchX's job id names a
run that has no name.
"""

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from ssd_torchrec.commands.options import value_of
from ssd_torchrec.errors import ConfigError, SSDTorchRecError

if TYPE_CHECKING:
    pass


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
        return COMMANDS[words[0]].run(words[1:], COMMANDS[words[0]].about)
    except SSDTorchRecError as error:
        print(f"ssd-torchrec {words[0]}: {type(error).__name__}: {error}", file=sys.stderr)
        return 2


def _hush_dependencies() -> None:
    """Leave out what torch, torchrec and fbgemm say to their own developers: users can do nothing about it."""
    warnings.filterwarnings("ignore", module=r"(torch|torchrec|fbgemm_gpu|tensordict)(\.|$)")
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)


def _generate(words: list[str], about: str) -> int:
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
        default=Generate(folder=tyro.MISSING, law=laws.get(value_of("--preset", words), laws["gaps"])),
        prog="ssd-torchrec generate",
        description=about,
        config=(tyro.conf.AvoidSubcommands,),
    )
    meta = generate(asked.law, Path(asked.folder))
    print(f"{asked.folder}: {meta.num_users} users, {meta.num_items} items, {meta.num_events} events")
    return 0


def _prepare(words: list[str], about: str) -> int:
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

    preset = value_of("--preset", words)
    if preset and preset not in PRESETS:
        raise ConfigError(f"--preset must be one of {', '.join(PRESETS)}, got {preset!r}; without it, name the columns")
    chosen = PrepareConfig(log=PRESETS[preset].log, name=preset) if preset else PrepareConfig()
    listed = _listed({name: of.about for name, of in PRESETS.items()})
    asked = tyro.cli(
        Prepare,
        args=words,
        default=Prepare(log=tyro.MISSING, output=tyro.MISSING, config=chosen),
        prog="ssd-torchrec prepare",
        description=f"{about}\n\npresets:\n{listed}",
        config=(tyro.conf.OmitArgPrefixes,),
    )
    meta = prepare(asked.log, Path(asked.output), asked.config, on_step=print_step)
    print_outcome(meta, Path(asked.output))
    return 0


def _prepare_ranking(words: list[str], about: str) -> int:
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

    asked = tyro.cli(PrepareRanking, args=words, prog="ssd-torchrec prepare-ranking", description=about)
    prepared = prepare_ranking(asked.impressions, asked.events, asked.output, asked, on_step=print_step)
    print_prepared(prepared, Path(asked.output))
    return 0


def _listed(about: Mapping[str, str]) -> str:
    """A line each, name and what it is."""
    widest = max(map(len, about))
    return "\n".join(f"  {name:<{widest}} {words}" for name, words in about.items())


def _train(words: list[str], about: str) -> int:
    from ssd_torchrec.distributed.collectives import word_of_rank_0
    from ssd_torchrec.distributed.process import launched, process_group
    from ssd_torchrec.training.config import RunConfig
    from ssd_torchrec.training.presets import presets
    from ssd_torchrec.training.ranking_config import RankingRunConfig, ranking_presets
    from ssd_torchrec.training.ranking_run import train_ranking
    from ssd_torchrec.training.run import train

    rankings = ranking_presets()
    runs, about = presets() | rankings, about
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


def _models(words: list[str], about: str) -> int:
    from rich.console import Console
    from rich.table import Table

    from ssd_torchrec.encoders.registry import SYSTEMS

    tyro.cli(_no_options, args=words, prog="ssd-torchrec models", description=about)
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


def _import_weights(words: list[str], about: str) -> int:
    from ssd_torchrec.encoders.registry import AnyEncoderConfig
    from ssd_torchrec.training.import_weights import import_weights
    from ssd_torchrec.training.presets import presets

    runs, model = presets(), value_of("--model", words)
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
        description=about,
        config=(tyro.conf.AvoidSubcommands,),
    )
    folder = Path(asked.output)
    run = replace(run, encoder=asked.encoder, data=replace(run.data, path=asked.data))
    run = replace(run, output=str(folder.parent), name=folder.name)
    print(f"{import_weights(Path(asked.file), Path(asked.items), run)}/ holds the weights; evaluate or train on it")
    return 0


def _evaluate(words: list[str], about: str) -> int:
    from ssd_torchrec.distributed.process import launched, process_group
    from ssd_torchrec.training.config import EvaluationConfig
    from ssd_torchrec.training.job import checkpoint_at, is_of
    from ssd_torchrec.training.ranking_config import RankingRunConfig
    from ssd_torchrec.training.ranking_run import evaluate_ranking
    from ssd_torchrec.training.run import evaluate_checkpoint

    @dataclass(frozen=True, kw_only=True)
    class Evaluate:
        checkpoint: tyro.conf.Positional[str]
        """A checkpoint folder, or a run folder for its best one."""

        data: str = ""
        """Data set to evaluate on; empty: the one the checkpoint was trained on."""

        evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
        """Protocol of next-item models."""

    asked = tyro.cli(Evaluate, args=words, prog="ssd-torchrec evaluate", description=about)
    world = launched(os.environ)
    with process_group(world):
        checkpoint = Path(asked.checkpoint)
        if is_of(RankingRunConfig, checkpoint_at(checkpoint)):
            evaluate_ranking(checkpoint, asked.data, world)
        else:
            evaluate_checkpoint(checkpoint, asked.data, asked.evaluation, world)
    return 0


def _recommend(words: list[str], about: str) -> int:
    from ssd_torchrec.distributed.process import launched, process_group
    from ssd_torchrec.training.recommend import RecommendConfig, recommend

    @dataclass(frozen=True, kw_only=True)
    class Recommend(RecommendConfig):
        checkpoint: tyro.conf.Positional[str]
        """A checkpoint folder, or a run folder for its best one."""

        users: tyro.conf.Positional[str]
        """Parquet, CSV or JSON lines of whom to recommend to: user_id, or user_id, item, timestamp, context and the
        event columns that the model is told."""

        output: str
        """Parquet file to write: user_id, item, score; one that is there is replaced."""

    asked = tyro.cli(Recommend, args=words, prog="ssd-torchrec recommend", description=about)
    world = launched(os.environ)
    with process_group(world):
        written = recommend(Path(asked.checkpoint), Path(asked.users), Path(asked.output), asked, world)
    if world.rank == 0:
        print(f"{asked.output}: {written}")
    return 0


def _inspect(words: list[str], about: str) -> int:
    from ssd_torchrec.data.inspect import inspect_dataset

    @dataclass(frozen=True, kw_only=True)
    class Inspect:
        dataset: tyro.conf.Positional[str]
        """Folder of a data set."""

        plot: str = ""
        """File for a figure of lengths and gaps, such as gaps.png; empty: none."""

    asked = tyro.cli(Inspect, args=words, prog="ssd-torchrec inspect", description=about)
    inspect_dataset(Path(asked.dataset), Path(asked.plot) if asked.plot else None)
    return 0


def _doctor(words: list[str], about: str) -> int:
    from ssd_torchrec.doctor import run_doctor

    tyro.cli(_no_options, args=words, prog="ssd-torchrec doctor", description=about)
    return run_doctor()


def _no_options() -> None:
    """Takes no options."""


@dataclass(frozen=True)
class Command:
    """One word after `ssd-torchrec`."""

    run: Callable[[list[str], str], int]
    about: str


def _kept_in(module: str, name: str) -> Callable[[list[str], str], int]:
    """A command of ssd_torchrec/commands, which is imported when it is run: torchrec takes seconds."""

    def run(words: list[str], about: str) -> int:
        return getattr(import_module(f"ssd_torchrec.commands.{module}"), name)(words, about)

    return run


COMMANDS = {
    "generate": Command(
        _generate, "Write a generated data set, in which gaps between events matter, or events long past."
    ),
    "prepare": Command(_prepare, "Make a data set of a raw log: k-core, order, vocabulary, in bounded memory."),
    "prepare-ranking": Command(
        _prepare_ranking, "Join impressions with the histories of their users as of then, for models of clicks."
    ),
    "train": Command(_train, "Train a preset; every field of the run can be overridden."),
    "plan": Command(
        _kept_in("plan", "plan"),
        "Does a catalogue or a DLRM fit these GPUs, and how many does it take? Tables, bytes, a verdict.",
    ),
    "models": Command(_models, "What can be trained: paper, direction, time, streaming, presets."),
    "import-weights": Command(_import_weights, "Make a run of the weights of a published program."),
    "evaluate": Command(_evaluate, "Rank the full catalogue with a checkpoint, or judge a ranking model's."),
    "recommend": Command(_recommend, "Write the best items of each user, from a checkpoint and a file of users."),
    "unshard": Command(
        _kept_in("checkpoints", "unshard_command"), "Write all of a checkpoint into one safetensors file."
    ),
    "reshard": Command(
        _kept_in("checkpoints", "reshard_command"),
        "Make a checkpoint for another number of ranks, of a checkpoint or of an unsharded file.",
    ),
    "grow": Command(
        _kept_in("checkpoints", "grow_command"), "Give a checkpoint rows for the items that a data set has got since."
    ),
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
