"""`ssd-torchrec plan`: does a catalogue, or a DLRM, fit these GPUs."""

import json
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import tyro

from ssd_torchrec.commands.options import value_of
from ssd_torchrec.commands.plan_options import gpus_asked, options_of_gpus, print_fit
from ssd_torchrec.commands.plan_ranking import plan_ranking
from ssd_torchrec.distributed.capacity import CapacityRequest, plan_capacity
from ssd_torchrec.distributed.fit import figures
from ssd_torchrec.errors import ConfigError
from ssd_torchrec.training.config import RunConfig
from ssd_torchrec.training.presets import presets
from ssd_torchrec.training.ranking_config import ranking_presets


def plan(words: list[str], about: str) -> int:
    """Answer as a table, or as JSON; starts no process and needs no GPU."""
    runs, rankings, preset = presets(), ranking_presets(), value_of("--preset", words) or "tim4rec"
    about = f"{about} Starts no process and needs no GPU."
    if preset in rankings:
        return plan_ranking(words, about, preset, rankings[preset][1])
    if preset not in runs:
        raise ConfigError(
            f"--preset must be a preset of `ssd-torchrec train --help`, got {preset!r}; take one of those"
        )
    run = runs[preset][1]
    asked = tyro.cli(_options(run), args=words, prog="ssd-torchrec plan", description=about)
    capacity = plan_capacity(_request(asked, run))
    if asked.json:
        print(json.dumps(figures(capacity)))
        return 0
    scored = "scored in place" if capacity.scored_in_place else f"{capacity.candidates_per_rank:,} candidates"
    print_fit(capacity, f"{capacity.events_per_rank:,} events, {scored}")
    return 0


def _options(run: RunConfig) -> Any:
    """Options whose defaults are those of a run."""

    @dataclass(frozen=True, kw_only=True)
    class Plan(options_of_gpus(run.sharding)):
        items: int
        """Items of the catalogue."""

        preset: str = "tim4rec"
        """Preset of `ssd-torchrec train`, which then is the default of the other options. Those of a ranking model are
        others: `ssd-torchrec plan --preset dlrm --help`."""

        batch: int = run.data.tokens_per_batch
        """Events of one global batch, over all ranks."""

        mean_length: float = min(50, run.max_length or 50)
        """Events of a history that the encoder sees, on average."""

        width: int = run.encoder.width
        """Channels of an event, and of the tables."""

        loss: Literal["softmax", "bce", "sampled_softmax"] = run.objective.loss
        """What candidates cost: softmax over a large catalogue scores it where it lies."""

        negatives: int = run.objective.num_negatives
        """Draws for a global batch, of sampled_softmax."""

        context: dict[str, int] = field(default_factory=dict)
        """Context features: name and number of ids of each, such as city 5000; its table has that name."""

        event_columns: dict[str, int] = field(default_factory=dict)
        """Event columns: name and number of ids of each, such as action 5; its table has that name."""

    return Plan


def _request(asked: Any, run: RunConfig) -> CapacityRequest:
    return CapacityRequest(
        **gpus_asked(asked, run.sharding),
        items=asked.items,
        encoder=replace(run.encoder, width=asked.width),
        objective=replace(run.objective, loss=asked.loss, num_negatives=asked.negatives),
        dense=run.dense,
        context=asked.context,
        event_columns=asked.event_columns,
        tokens_per_batch=asked.batch,
        mean_length=asked.mean_length,
    )
