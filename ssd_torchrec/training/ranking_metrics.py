"""How well probabilities of a click are: AUC, normalised entropy and calibration, by torchrec.metrics.

ne             cross-entropy over that of the share of clicks alone: below 1 is better than knowing only the share
calibration    predicted clicks over clicks: 1 is right on average
auc            probability that a click is scored above what was not clicked
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torchrec.datasets.utils import Batch
from torchrec.metrics.metric_module import RecMetricModule, generate_metric_module
from torchrec.metrics.metrics_config import MetricsConfig, RecMetricDef, RecMetricEnum, RecTaskInfo

from ssd_torchrec.data.ranking.rows import FILLER
from ssd_torchrec.distributed.collectives import word_of_rank_0
from ssd_torchrec.distributed.process import World

SELECTION = "auc"
_KEYS = {  # of what torchrec.metrics computes for a task
    "auc": "auc-click|window_auc",
    "ne": "ne-click|lifetime_ne",
    "calibration": "calibration-click|lifetime_calibration",
}


def assess(
    model: nn.Module,
    batches: Iterator[Batch],
    *,
    rows_per_rank: int,
    num_rows: int,
    shift: float,
    world: World,
) -> dict[str, float]:
    """Figures of a DLRM on all rows of a part, the same on every rank. Collective.

    Args:
        batches: this rank's shares of the same global batches; rows of label -1 do not count.
        rows_per_rank: the most rows of a share.
        num_rows: of the part.
        shift: added to every logit, log of the share of negatives that training saw.
    """
    module = _metrics(rows_per_rank, num_rows, world)
    was_training = model.training
    model.eval()
    with torch.no_grad():  # FBGEMM's lookups on CPU are hidden from inference_mode
        for batch in batches:
            here = batch.to(world.device)
            logits = model(here.dense_features, here.sparse_features).squeeze(-1)
            module.update(_as_metrics_take_them(logits + shift, here.labels, rows_per_rank))
    model.train(was_training)
    computed = dict(module.compute())
    figures = {name: float(computed[key]) for name, key in _KEYS.items()} if world.rank == 0 else {}
    return word_of_rank_0(figures)


def _metrics(rows_per_rank: int, num_rows: int, world: World) -> RecMetricModule:
    task = RecTaskInfo(name="click", label_name="label", prediction_name="prediction", weight_name="weight")
    whole = RecMetricDef(rec_tasks=[task], window_size=max(num_rows + world.size * rows_per_rank, 1))
    kinds = (RecMetricEnum.AUC, RecMetricEnum.NE, RecMetricEnum.CALIBRATION)
    config = MetricsConfig(rec_tasks=[task], rec_metrics=dict.fromkeys(kinds, whole))
    return generate_metric_module(
        RecMetricModule,
        metrics_config=config,
        batch_size=rows_per_rank,
        world_size=world.size,
        my_rank=world.rank,
        state_metrics_mapping={},
        device=world.device,
        process_group=torch.distributed.GroupMember.WORLD,
    )


def _as_metrics_take_them(logits: Tensor, labels: Tensor, rows_per_rank: int) -> dict[str, Tensor]:
    """As many rows on every rank: those that are missing, and fillers, weigh nothing."""
    missing = rows_per_rank - len(logits)
    labels = torch.nn.functional.pad(labels, (0, missing), value=FILLER)
    prediction = torch.nn.functional.pad(torch.sigmoid(logits.float()), (0, missing), value=0.5)
    weight = (labels != FILLER).float()
    return {"label": labels.clamp(min=0).float(), "prediction": prediction, "weight": weight}
