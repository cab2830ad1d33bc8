"""Every encoder there is, by the name it has on the command line."""

from collections.abc import Mapping
from dataclasses import dataclass

from ssd_torchrec.encoders import (
    bert4rec,
    bi_tim4rec,
    caser,
    gru4rec,
    lrurec,
    mamba4rec,
    recmamba,
    sasrec,
    ssd4rec,
    tim4rec,
    tisasrec,
)
from ssd_torchrec.encoders.bert4rec import BERT4RecConfig
from ssd_torchrec.encoders.bi_tim4rec import BiTiM4RecConfig
from ssd_torchrec.encoders.caser import CaserConfig
from ssd_torchrec.encoders.encoder import EncoderConfig
from ssd_torchrec.encoders.gru4rec import GRU4RecConfig
from ssd_torchrec.encoders.lrurec import LRURecConfig
from ssd_torchrec.encoders.mamba4rec import Mamba4RecConfig
from ssd_torchrec.encoders.recmamba import RecMambaConfig
from ssd_torchrec.encoders.sasrec import SASRecConfig
from ssd_torchrec.encoders.ssd4rec import SSD4RecConfig
from ssd_torchrec.encoders.tim4rec import TiM4RecConfig
from ssd_torchrec.encoders.tisasrec import TiSASRecConfig

AnyEncoderConfig = (
    TiM4RecConfig
    | SSD4RecConfig
    | BiTiM4RecConfig
    | RecMambaConfig
    | Mamba4RecConfig
    | SASRecConfig
    | TiSASRecConfig
    | BERT4RecConfig
    | GRU4RecConfig
    | CaserConfig
    | LRURecConfig
)
_STAR = "ssd4rec-star-"


@dataclass(frozen=True, kw_only=True)
class System:
    """An encoder as the papers' tables have it."""

    about: str
    """What it is, in a line."""

    small: AnyEncoderConfig
    """A shape for data that takes a minute to learn."""

    presets: Mapping[str, AnyEncoderConfig]
    """Its published shapes, by the data they are for."""


SYSTEMS: dict[str, System] = {
    "tim4rec": System(
        about="SSD with steps gated by the time between events",
        small=TiM4RecConfig(dropout=0.1, time_dropout=0.1),
        presets={name: config for name, config in tim4rec.PRESETS.items() if not name.startswith(_STAR)},
    ),
    "ssd4rec": System(
        about="SSD both ways with one set of weights",
        small=SSD4RecConfig(width=64, head_width=32, state=32, dropout=0.1),
        presets=ssd4rec.PRESETS,
    ),
    "ssd4rec_star": System(
        about="TiM4Rec without time, its paper's ablation",
        small=TiM4RecConfig(time_mode="none", dropout=0.1),
        presets={n.removeprefix(_STAR): config for n, config in tim4rec.PRESETS.items() if n.startswith(_STAR)},
    ),
    "bi_tim4rec": System(
        about="SSD both ways, steps gated by the time to either side",
        small=BiTiM4RecConfig(dropout=0.1, time_dropout=0.1),
        presets=bi_tim4rec.PRESETS,
    ),
    "recmamba": System(
        about="one Mamba block for whole lives of events",
        small=RecMambaConfig(positions="none", init="mamba", dropout=0.1),
        presets=recmamba.PRESETS,
    ),
    "mamba4rec": System(
        about="Mamba blocks and feed-forwards",
        small=Mamba4RecConfig(layers=2, init="mamba", dropout=0.1),
        presets=mamba4rec.PRESETS,
    ),
    "sasrec": System(
        about="causal attention",
        small=SASRecConfig(dropout=0.1, attention_dropout=0.0),
        presets=sasrec.PRESETS,
    ),
    "tisasrec": System(
        about="causal attention that knows the time between events",
        small=TiSASRecConfig(dropout=0.1, attention_dropout=0.0),
        presets=tisasrec.PRESETS,
    ),
    "bert4rec": System(
        about="attention both ways, on masked items",
        small=BERT4RecConfig(dropout=0.1, attention_dropout=0.0),
        presets=bert4rec.PRESETS,
    ),
    "gru4rec": System(
        about="gated recurrent units",
        small=GRU4RecConfig(dropout=0.1),
        presets=gru4rec.PRESETS,
    ),
    "caser": System(
        about="convolutions over the last events",
        small=CaserConfig(dropout=0.1),
        presets=caser.PRESETS,
    ),
    "lrurec": System(
        about="linear recurrent units",
        small=LRURecConfig(dropout=0.1, recurrence_dropout=0.1),
        presets=lrurec.PRESETS,
    ),
}


def name_of(config: EncoderConfig) -> str:
    """The name of the system that a config shapes."""
    if isinstance(config, TiM4RecConfig) and config.time_mode == "none":
        return "ssd4rec_star"
    return next(name for name, system in SYSTEMS.items() if type(system.small) is type(config))
