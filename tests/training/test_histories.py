import json
from dataclasses import replace

import pytest

from ssd_torchrec.data.schema import META_FILE, DatasetMeta
from ssd_torchrec.distributed.process import World, process_group
from ssd_torchrec.errors import DataError
from ssd_torchrec.training import histories
from ssd_torchrec.training.config import RunConfig


@pytest.fixture
def generated(monkeypatch):
    """How often the default data set was made; a small one stands in for it."""
    made = []
    generate = histories.generate

    def small(config, folder):
        made.append(folder)
        return generate(replace(config, num_users=20), folder)

    monkeypatch.setattr(histories, "generate", small)
    return made


def test_the_generated_default_is_made_once_and_anew_when_its_format_is_older(tmp_path, generated):
    config = replace(RunConfig(), output=str(tmp_path))
    with process_group(World()):
        for _ in range(2):
            folder = histories.data_folder(config, World())
            assert generated == [folder]
        meta = json.loads((folder / META_FILE).read_text())
        (folder / META_FILE).write_text(json.dumps(meta | {"format_version": 1}))
        histories.data_folder(config, World())
    assert generated == [folder, folder]
    assert DatasetMeta.read(folder).num_users == 20


def test_a_data_set_of_ones_own_is_never_made_anew(tmp_path, generated):
    config = replace(RunConfig(), data=replace(RunConfig().data, path=str(tmp_path)))
    (tmp_path / META_FILE).write_text(json.dumps({"format_version": 1}))
    with process_group(World()), pytest.raises(DataError, match="format_version must be 2, got 1"):
        histories.Histories.open(config, World())
    assert generated == []
