"""`ssd-torchrec plan --preset dlrm`: does a ranking model fit these GPUs."""

import json
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any

import tyro

from ssd_torchrec.commands.plan_options import gpus_asked, options_of_gpus, print_fit
from ssd_torchrec.data.ranking.schema import RankingMeta
from ssd_torchrec.distributed.fit import figures
from ssd_torchrec.encoders.registry import AnyEncoderConfig
from ssd_torchrec.errors import ConfigError, DataError
from ssd_torchrec.training.ranking_capacity import RankingCapacityRequest, plan_ranking_capacity
from ssd_torchrec.training.ranking_config import RankingModelConfig, RankingRunConfig

MEAN_LENGTH = 50.0  # where neither option nor data set says otherwise
DENSE_FEATURES = 13


def plan_ranking(words: list[str], about: str, preset: str, run: RankingRunConfig) -> int:
    """Answer for a DLRM, as a table or as JSON."""
    asked = tyro.cli(
        _options(preset, run),
        args=words,
        prog="ssd-torchrec plan",
        description=about,
        config=(tyro.conf.AvoidSubcommands,),
    )
    capacity = plan_ranking_capacity(_request(asked, run))
    if asked.json:
        print(json.dumps(figures(capacity)))
        return 0
    print_fit(capacity, f"{capacity.rows_per_rank:,} rows, {capacity.events_per_rank:,} events")
    return 0


def _options(of: str, run: RankingRunConfig) -> Any:
    """Options whose defaults are those of a run."""

    @dataclass(frozen=True, kw_only=True)
    class PlanRanking(options_of_gpus(run.sharding)):
        preset: str = of
        """Preset of `ssd-torchrec train`, which then is the default of the other options."""

        data: str = ""
        """Ranking data set that says which features, histories and targets there are, and the longest history of each.
        Empty: the next five options say it."""

        categorical: dict[str, int] = field(default_factory=dict)
        """Categorical features: name and number of ids of each, such as city 5000; the table of city is t_city."""

        histories: dict[str, int] = field(default_factory=dict)
        """Histories: name and number of ids of each one's items, such as clicked 10000000."""

        targets: dict[str, str] = field(default_factory=dict)
        """For --model.target: history, and the categorical feature that holds the item shown, such as clicked shown."""

        longest: int | None = None
        """Events of a history at most, with which training's planner counts lookups. None: the mean."""

        dense_features: int | None = None
        """Dense features. None: 13."""

        batch: int = run.data.rows_per_batch
        """Impressions of one global batch, over all ranks: a multiple of their number."""

        mean_length: float | None = None
        """Events of each history, on average. None: 50, or the longest if that is less."""

        model: RankingModelConfig = run.model
        """The DLRM."""

        encoder: AnyEncoderConfig = run.encoder
        """What reads histories; its width is the width of all tables."""

    return PlanRanking


def _request(asked: Any, run: RankingRunConfig) -> RankingCapacityRequest:
    meta = RankingMeta.read(Path(asked.data)) if _said_by_data(asked) else _said_by_options(asked)
    mean_length = asked.mean_length
    if mean_length is None:
        mean_length = min(MEAN_LENGTH, max(meta.longest.values()))
    return RankingCapacityRequest(
        **gpus_asked(asked, run.sharding),
        meta=meta,
        model=asked.model,
        encoder=asked.encoder,
        dense=run.dense,
        rows_per_batch=asked.batch,
        mean_length=mean_length,
    )


def _said_by_data(asked: Any) -> bool:
    told = ("categorical", "histories", "targets", "longest", "dense_features")
    twice = [f"--{name.replace('_', '-')}" for name in told if getattr(asked, name) not in (None, {})]
    if asked.data and twice:
        raise ConfigError(f"features must be said by --data or by options, got both: {', '.join(twice)}; drop one")
    return bool(asked.data)


def _said_by_options(asked: Any) -> RankingMeta:
    if not asked.categorical:
        raise ConfigError(
            "--categorical must name the features that a DLRM crosses, got none; give name and number of ids of each, "
            "such as city 5000, or a data set by --data"
        )
    if bool(asked.targets) != asked.model.target:
        raise ConfigError(
            f"--targets must name the item shown where --model.target reads it, and only there, got {asked.targets} "
            f"with {asked.model.target}; give both, or none"
        )
    unread = {"unread": 1} if asked.model.history == "none" else {}  # a data set has one, read or not
    histories = asked.histories or unread
    longest = asked.longest
    if longest is None:
        longest = ceil(max(1.0, MEAN_LENGTH if asked.mean_length is None else asked.mean_length))
    dense_features = DENSE_FEATURES if asked.dense_features is None else asked.dense_features
    try:
        return RankingMeta(
            name="planned",
            dense=[f"dense_{n}" for n in range(dense_features)],
            categorical=asked.categorical,
            histories=histories,
            targets=asked.targets,
            longest=dict.fromkeys(histories, longest),
            num_rows={},
            num_positives={},
        )
    except DataError as error:
        raise ConfigError(str(error)) from error
