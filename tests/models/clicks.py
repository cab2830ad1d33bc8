"""Small DLRMs, as torchrec.models.dlrm builds them, and batches for them with histories that only plugged ones read."""

import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.datasets.utils import Batch
from torchrec.models.dlrm import DLRM, DLRM_DCN, DLRM_Projection

from ssd_torchrec.encoders.tim4rec import TiM4Rec, TiM4RecConfig
from ssd_torchrec.models.history import History

WIDTH, DENSE, USERS, PLACES, ITEMS = 16, 5, 30, 7, 50
CLICKS = History(item_key="clicked", timestamp_key="clicked_at")
BUYS = History(item_key="bought", timestamp_key="bought_at")
SHOWN = History(item_key="clicked", timestamp_key="clicked_at", target_key="shown")
KINDS = ("DLRM", "DLRM_DCN", "DLRM_Projection")


def bags(device: str = "cpu") -> EmbeddingBagCollection:
    tables = [
        EmbeddingBagConfig(name=f"t_{name}", embedding_dim=WIDTH, num_embeddings=rows, feature_names=[name])
        for name, rows in {"user": USERS, "place": PLACES}.items()
    ]
    return EmbeddingBagCollection(tables=tables, device=torch.device(device))


def items(*features: str, width: int = WIDTH, device: str = "cpu") -> EmbeddingCollection:
    """One table for all of them."""
    table = EmbeddingConfig(
        name="t_item", embedding_dim=width, num_embeddings=ITEMS, feature_names=list(features or ["clicked"])
    )
    return EmbeddingCollection(tables=[table], device=torch.device(device))


def encoder(width: int = WIDTH) -> TiM4Rec:
    shape = TiM4RecConfig(width=width, layers=1, head_width=8, state=8, dropout=0.0, time_dropout=0.0, time_hidden=4)
    return TiM4Rec(shape)


def dlrm(kind: str = "DLRM", device: str = "cpu") -> DLRM:
    shared = {
        "embedding_bag_collection": bags(device),
        "dense_in_features": DENSE,
        "dense_arch_layer_sizes": [8, WIDTH],
        "over_arch_layer_sizes": [12, 1],
    }
    if kind == "DLRM_DCN":
        return DLRM_DCN(**shared, dcn_num_layers=2, dcn_low_rank_dim=6)
    if kind == "DLRM_Projection":
        branches = {f"interaction_branch{n}_layer_sizes": [3 * WIDTH, 2 * WIDTH] for n in (1, 2)}
        return DLRM_Projection(**shared, **branches)
    return DLRM(**shared)


def features(lengths: dict[str, list[int]], seed: int = 0, shown: list[int] | None = None) -> KeyedJaggedTensor:
    """Two bags a row, histories of these lengths by item key, one of them per row, and one shown item, or so many."""
    draw = torch.Generator().manual_seed(seed)
    rows = len(next(iter(lengths.values())))
    values = {
        "user": torch.randint(USERS, (rows,), generator=draw),
        "place": torch.randint(PLACES, (2 * rows,), generator=draw),
    }
    counts = {"user": [1] * rows, "place": [2] * rows}
    for key, of in lengths.items():
        events = sum(of)
        values[key] = torch.randint(ITEMS, (events,), generator=draw)
        values[f"{key}_at"] = 1_700_000_000 + torch.randint(1, 10**5, (events,), generator=draw).cumsum(0)
        counts |= {key: of, f"{key}_at": of}
    counts["shown"] = [1] * rows if shown is None else shown
    values["shown"] = torch.randint(ITEMS, (sum(counts["shown"]),), generator=draw)
    return KeyedJaggedTensor.from_lengths_sync(
        keys=list(values),
        values=torch.cat(list(values.values())),
        lengths=torch.tensor([count for of in counts.values() for count in of]),
    )


def batch(lengths: list[int], seed: int = 0) -> Batch:
    draw = torch.Generator().manual_seed(1000 + seed)
    rows = len(lengths)
    return Batch(
        dense_features=torch.randn(rows, DENSE, generator=draw),
        sparse_features=features({"clicked": lengths}, seed),
        labels=torch.randint(0, 2, (rows,), generator=draw),
    )


def with_raw_ids(kjt: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """Items named by ids that no table has rows for, some of them negative; all else as it was."""
    parts = [kjt[key].values() for key in kjt.keys()]  # noqa: SIM118  a KeyedJaggedTensor is no dict
    raw = [
        2**60 - part * 2**57 if key in ("clicked", "bought") else part
        for key, part in zip(kjt.keys(), parts, strict=True)
    ]
    return KeyedJaggedTensor(keys=kjt.keys(), values=torch.cat(raw), lengths=kjt.lengths())
