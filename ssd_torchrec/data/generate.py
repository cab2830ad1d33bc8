"""A generated data set on disk, with the best scores it permits beside it."""

from pathlib import Path

import numpy as np

from ssd_torchrec.data.attainable import AttainableScores
from ssd_torchrec.data.lifelong import LifelongConfig, lifelong_rows
from ssd_torchrec.data.schema import DatasetMeta
from ssd_torchrec.data.synthetic import Law, SyntheticConfig, sample_users
from ssd_torchrec.data.vocabulary import Vocabulary
from ssd_torchrec.data.writer import DatasetWriter


def generate(config: SyntheticConfig | LifelongConfig, folder: Path | str) -> DatasetMeta:
    """Draw users by the law of `config` and write them; the same configuration gives the same fingerprint.

    Args:
        folder: where the data set goes; one that is there already is replaced.

    Returns:
        What was written; `attainable` and `attainable_without_time` are for the leave-one-out targets.

    Raises:
        DataError: `folder` holds something that is no data set.
    """
    if isinstance(config, LifelongConfig):
        return _generate_lifelong(config, folder)
    law = Law.draw(config)
    best, without_time = AttainableScores(law, timed=True), AttainableScores(law, timed=False)
    vocabulary = Vocabulary(np.arange(config.num_items), config.num_oov_buckets)
    context = {"segment": config.num_segments}
    with DatasetWriter(folder, name="generated", vocabulary=vocabulary, context=context) as writer:
        for sample in sample_users(law):
            writer.append(sample.rows(vocabulary.first_item))
            best.update(sample)
            without_time.update(sample)
        return writer.finish(attainable=best.scores(), attainable_without_time=without_time.scores())


def _generate_lifelong(config: LifelongConfig, folder: Path | str) -> DatasetMeta:
    vocabulary = Vocabulary(np.arange(config.num_items), config.num_oov_buckets)
    with DatasetWriter(folder, name="lifelong", vocabulary=vocabulary) as writer:
        for rows in lifelong_rows(config, vocabulary.first_item):
            writer.append(rows)
        best = config.attainable()
        return writer.finish(attainable=best, attainable_without_time=best)
