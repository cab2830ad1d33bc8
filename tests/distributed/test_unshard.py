"""A checkpoint as one file and back, or cut for other ranks: every bit stays, and what lacks one is refused by name."""

import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchrec.distributed.sharding_plan import calculate_shard_sizes_and_offsets

from ssd_torchrec.distributed import checkpoint_files
from ssd_torchrec.distributed import unshard as unshard_module
from ssd_torchrec.distributed.checkpoint import load_checkpoint, load_weights, read_info, save_checkpoint
from ssd_torchrec.distributed.process import World
from ssd_torchrec.distributed.reshard import reshard
from ssd_torchrec.distributed.shard import DenseOptimizerConfig, ShardingConfig, Trainable
from ssd_torchrec.distributed.state import dense_state, model_state, table_state
from ssd_torchrec.distributed.unshard import KEY, read_unsharded, unshard
from ssd_torchrec.distributed.whole_file import Entry, WholeFile
from ssd_torchrec.errors import CheckpointError, ConfigError
from tests.distributed.example import train, trainable, whole_weights
from tests.distributed.test_checkpoint import AFTER, BEFORE, DENSE, SPLITS, STATE, WHOLE, flip, no_space
from tests.distributed.world import spawn

ITEM = "items.embeddings.item.weight"
SPLIT = ("row_wise", "column_wise-adagrad")


def tensors_of(checkpoint: Path) -> dict[str, Tensor]:
    """All that a checkpoint holds, read as PyTorch reads it."""
    files = read_info(checkpoint).files
    metadata = checkpoint_files.read_metadata(checkpoint, files).state_dict_metadata
    values = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in metadata.items()}
    checkpoint_files.read_tensors(checkpoint, values, files)
    return values


def assert_the_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert got[name].shape == tensor.shape, name
        assert torch.equal(got[name], tensor), name


def continued(world: World, checkpoint: Path, sharding: ShardingConfig) -> list[float]:
    t = trainable(world, sharding, DENSE)
    assert load_checkpoint(checkpoint, t, vocabulary="words").state == STATE
    return train(t, world, AFTER)


def save_on_two(world: World, folder: Path) -> list[str]:
    paths = []
    for split in SPLIT:
        t = trainable(world, SPLITS[split], DENSE)
        train(t, world, BEFORE)
        paths.append(str(save_checkpoint(folder / split, t, STATE)))
    return paths


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints that two ranks saved."""
    paths, _ = spawn(save_on_two, 2, tmp_path_factory.mktemp("two-ranks"))
    return {split: Path(path) for split, path in zip(SPLIT, paths, strict=True)}


def saved_by_one(folder: Path, optimizer: str = "adam", dense: DenseOptimizerConfig = DENSE, **shape: Any) -> Path:
    t = trainable(World(), WHOLE[optimizer], dense, **shape)
    if not shape:
        train(t, World(), BEFORE)
    return save_checkpoint(folder, t, STATE)


@pytest.fixture(scope="module")
def once(tmp_path_factory) -> Path:
    return saved_by_one(tmp_path_factory.mktemp("one-rank") / "run")


@pytest.fixture
def saved(once, tmp_path) -> Path:
    """A checkpoint of whole tables, to be damaged."""
    return Path(shutil.copytree(once, tmp_path / "run"))


@pytest.fixture
def whole(saved, tmp_path) -> Path:
    unshard(saved, tmp_path / "whole.safetensors")
    return tmp_path / "whole.safetensors"


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("through", ["a file", "no file"])
@pytest.mark.parametrize("split", SPLIT)
def test_what_two_ranks_saved_comes_back_bit_for_bit(split, through, ranks, two_ranks, tmp_path):
    source = two_ranks[split]
    if through == "a file":
        source = tmp_path / "whole.safetensors"
        assert unshard(two_ranks[split], source) == read_info(two_ranks[split])
    info = reshard(source, tmp_path / "new", ranks=ranks)
    assert read_info(tmp_path / "new") == info
    assert_the_same(tensors_of(tmp_path / "new"), tensors_of(two_ranks[split]))
    before = read_info(two_ranks[split])
    assert info == replace(before, world_size=ranks, plan=info.plan, files=info.files)
    assert sorted(tmp_path.iterdir()) == sorted({tmp_path / "new", source} - {two_ranks[split]})


@pytest.mark.parametrize("ranks", [1, 3])
def test_it_goes_on_exactly_as_the_original_does(ranks, two_ranks, tmp_path, group_of_one):
    expected = continued(group_of_one, two_ranks["row_wise"], SPLITS["row_wise"])
    unshard(two_ranks["row_wise"], tmp_path / "whole")
    reshard(tmp_path / "whole", tmp_path / "back")
    reshard(two_ranks["row_wise"], tmp_path / "new", ranks=ranks)
    for folder in ("back", "new"):
        assert continued(group_of_one, tmp_path / folder, SPLITS["row_wise"]) == expected


def test_whole_tables_go_on_exactly_with_what_split_ones_saved(two_ranks, tmp_path, alone):
    reshard(two_ranks["row_wise"], tmp_path / "new", ranks=3)
    expected = continued(alone, two_ranks["row_wise"], WHOLE["rowwise_adagrad"])
    assert continued(alone, tmp_path / "new", WHOLE["rowwise_adagrad"]) == expected


OF_ONE = [kind if kind == "adam" else pytest.param(kind, marks=pytest.mark.slow) for kind in WHOLE]


@pytest.mark.parametrize("optimizer", OF_ONE)
def test_what_one_process_saved_comes_back_bit_for_bit(optimizer, tmp_path):
    saved = saved_by_one(tmp_path / "run", optimizer)
    unshard(saved, tmp_path / "whole")
    reshard(tmp_path / "whole", tmp_path / "back")
    assert_the_same(tensors_of(tmp_path / "back"), tensors_of(saved))
    before = read_info(saved)
    assert read_info(tmp_path / "back") == replace(before, files=read_info(tmp_path / "back").files)
    assert continued(World(), tmp_path / "back", WHOLE[optimizer]) == continued(World(), saved, WHOLE[optimizer])


@pytest.mark.parametrize("dense", ["adam", "muon"])
def test_the_state_of_both_optimizers_is_in_the_file_and_comes_back(dense, tmp_path):
    config = DenseOptimizerConfig(optimizer=dense, learning_rate=0.01)
    saved = saved_by_one(tmp_path / "run", "adam", config)
    t = trainable(World(), WHOLE["adam"], config)
    live = model_state(t) | table_state(t) | dense_state(t)
    unshard(saved, tmp_path / "whole")
    file, _ = read_unsharded(tmp_path / "whole")
    assert file.entries.keys() == live.keys()
    assert {name.rpartition(".")[2] for name in live if name.startswith("dense.")} >= {"exp_avg", "exp_avg_sq", "step"}
    assert file.tensor(f"tables.{ITEM}.exp_avg").any()
    reshard(tmp_path / "whole", tmp_path / "back", ranks=2)
    load_checkpoint(tmp_path / "back", t, vocabulary="words")
    for name, tensor in file.entries.items():
        assert live[name].shape == tensor.shape
        assert torch.equal(live[name], file.tensor(name)), name


def test_the_safetensors_library_reads_the_file(whole, saved):
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(whole, "pt") as file:
        assert_the_same({name: file.get_tensor(name) for name in sorted(file.keys())}, tensors_of(saved))
        content = json.loads(file.metadata()[KEY])
    info = asdict(read_info(saved))
    del info["files"]
    assert content["checkpoint"] == info


def rank_rows(rows: int, ranks: int) -> list[tuple[int, int]]:
    """First row and number of rows of each rank, as TorchRec cuts a table."""
    sizes, offsets = calculate_shard_sizes_and_offsets(torch.empty(rows, 4, device="meta"), ranks, ranks, "row_wise")
    return [(first, size) for (first, _), (size, _) in zip(offsets, sizes, strict=True)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_each_rank_finds_its_rows_in_its_own_file(ranks, saved, tmp_path):
    info = reshard(saved, tmp_path / "new", ranks=ranks)
    assert info.files.keys() == {".metadata", *(f"__{rank}_0.distcp" for rank in range(ranks))}
    places = checkpoint_files.read_metadata(tmp_path / "new", info.files)
    for name in (f"model.{ITEM}", f"tables.{ITEM}.exp_avg", "model.contexts.embedding_bags.segment.weight"):
        chunks = places.state_dict_metadata[name].chunks
        found = {
            (chunk.offsets[0], chunk.sizes[0]): places.storage_data[at].relative_path
            for chunk in chunks
            for at in places.storage_data
            if (at.fqn, at.offset) == (name, chunk.offsets)
        }
        rows = rank_rows(places.state_dict_metadata[name].size[0], ranks)
        assert found == {place: f"__{rank}_0.distcp" for rank, place in enumerate(rows) if place[1]}
    sizes = [of["bytes"] for name, of in info.files.items() if name != ".metadata"]
    assert max(sizes) < 1.3 * min(sizes)
    assert info.plan.keys() == (set() if ranks == 1 else {"item", "segment"})


@pytest.mark.parametrize("ranks", [0, -1])
def test_less_than_one_rank_is_refused(ranks, saved, tmp_path):
    with pytest.raises(ConfigError, match=f"at least 1 rank, got {ranks}"):
        reshard(saved, tmp_path / "new", ranks=ranks)


def rewritten(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write other tensors into an unsharded file and leave what it says of the checkpoint, as other programs do."""
    save_file = pytest.importorskip("safetensors.torch").save_file
    metadata = WholeFile.open(file).metadata if metadata is None else metadata
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, file, metadata)


def contents(file: Path) -> dict[str, Tensor]:
    whole = WholeFile.open(file)
    return {name: whole.tensor(name).clone() for name in whole.entries}


def refused(source: Path, message: str) -> None:
    target = source.with_name("refused")
    with pytest.raises(CheckpointError, match=message):
        reshard(source, target)
    assert not target.exists()


LACKS = ("dense.tower.encoder.layers.0.mixer.in_proj.weight.exp_avg", f"tables.{ITEM}.exp_avg_sq")


@pytest.mark.parametrize("name", LACKS)
def test_a_file_without_some_optimizer_state_is_refused_by_name(name, whole):
    tensors = contents(whole)
    del tensors[name]
    rewritten(whole, tensors)
    refused(whole, f"must hold {name} as the checkpoint did, it does not")


def test_a_file_without_any_dense_state_is_refused(whole):
    rewritten(whole, {name: tensor for name, tensor in contents(whole).items() if not name.startswith("dense.")})
    refused(whole, r"must hold dense\.\S+ and \d+ more as the checkpoint did")


def test_a_file_with_more_than_the_checkpoint_is_refused(whole):
    rewritten(whole, contents(whole) | {"dense.other.exp_avg": torch.zeros(3)})
    refused(whole, "got dense.other.exp_avg besides")


def test_a_file_of_another_model_is_refused_by_what_differs(whole, tmp_path):
    unshard(saved_by_one(tmp_path / "larger", items=46), tmp_path / "other")
    rewritten(whole, contents(tmp_path / "other"))
    refused(whole, r"model\S+ is to be \['float32', 48, 16\], got \['float32', 49, 16\]")
    rewritten(whole, {name: t for name, t in contents(tmp_path / "other").items() if name != f"model.{ITEM}"})
    refused(whole, f"model.{ITEM} is to be .*, got none")


def test_state_of_another_shape_is_refused(whole):
    name = f"tables.{ITEM}.exp_avg"
    tensors = contents(whole)
    rewritten(whole, tensors | {name: tensors[name].view(16, 48)})
    refused(whole, rf"must hold {name} as \['float32', 48, 16\], got \['float32', 16, 48\]")


def test_an_edited_tensor_is_refused_by_name(whole):
    name = LACKS[0]
    tensors = contents(whole)
    tensors[name].view(-1)[0] += 1e-6
    rewritten(whole, tensors)
    refused(whole, f"{name} in .* is not what was saved: its SHA-256 differs")


@pytest.mark.parametrize("part", ["header", "tensors"])
def test_a_flipped_bit_is_refused(part, whole):
    flip(whole, 60 if part == "header" else whole.stat().st_size - 3)
    refused(whole, "must be a safetensors file, got|SHA-256 differs" if part == "tensors" else "whole.safetensors")


@pytest.mark.parametrize("left", ["nothing", "half-a-length", "half-a-header", "all-but-a-byte"])
def test_a_file_cut_short_is_refused(left, whole):
    size = whole.stat().st_size
    os.truncate(whole, {"nothing": 0, "half-a-length": 4, "half-a-header": 1000, "all-but-a-byte": size - 1}[left])
    refused(whole, f"must have {size} bytes, got {size - 1}" if left == "all-but-a-byte" else "must be a safetensors")


def test_edited_words_on_the_checkpoint_are_refused(whole):
    metadata = WholeFile.open(whole).metadata
    rewritten(whole, contents(whole), metadata | {KEY: metadata[KEY].replace('"adam"', '"sgd"', 1)})
    refused(whole, "is not what was saved: it was edited")


def test_a_newer_format_is_refused(whole):
    content = checkpoint_files.checked_json(WholeFile.open(whole).metadata[KEY], whole)
    content["checkpoint"]["format"] = 2
    rewritten(whole, contents(whole), {KEY: json.dumps(checkpoint_files.with_sum(content))})
    refused(whole, "must have format 1, got 2; use the version")


def test_a_safetensors_file_of_somebody_else_is_refused(whole):
    rewritten(whole, {"weight": torch.zeros(3)}, {"format": "pt"})
    refused(whole, "must be written by ssd-torchrec unshard, .* import-weights takes")


def test_a_pickle_is_refused_unread(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "weights.pth")
    refused(tmp_path / "weights.pth", "must be a safetensors file")


@pytest.mark.parametrize("damage", ["truncated", "edited", "gone"])
def test_a_damaged_checkpoint_is_refused_and_leaves_no_file(damage, saved, tmp_path):
    file = saved / "__0_0.distcp"
    damages = {"truncated": lambda: os.truncate(file, 500), "edited": lambda: flip(file, 900), "gone": file.unlink}
    damages[damage]()
    before = sorted(tmp_path.iterdir())
    for attempt in (lambda: unshard(saved, tmp_path / "whole"), lambda: reshard(saved, tmp_path / "new")):
        with pytest.raises(CheckpointError, match=r"cut short or edited|SHA-256 differs|which is gone"):
            attempt()
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_there_is_not_overwritten(saved, whole, tmp_path):
    before = whole.read_bytes()
    with pytest.raises(CheckpointError, match="must not be there yet, it is; give another name, or --replace"):
        unshard(saved, whole)
    with pytest.raises(CheckpointError, match="must not be there yet"):
        unshard(saved, tmp_path / "run", replace=True)  # a folder
    with pytest.raises(CheckpointError, match="must not be there yet, it is; give another name"):
        reshard(whole, saved)
    assert whole.read_bytes() == before


def test_a_file_is_replaced_whole_or_not_at_all(saved, whole, tmp_path, monkeypatch):
    whole.write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(unshard_module, "gather", no_space)
        with pytest.raises(CheckpointError, match=r"with room for all .* No space left on device; make room"):
            unshard(saved, whole, replace=True)
    assert whole.read_text() == "old"
    unshard(saved, whole, replace=True)
    assert read_unsharded(whole)[1].state == STATE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "whole.safetensors"]


def test_a_full_disk_leaves_no_checkpoint(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_files.FileSystemWriter, "write_data", no_space)
    with pytest.raises(CheckpointError, match=r"new must be writable, .* No space left on device"):
        reshard(saved, tmp_path / "new", ranks=2)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_new_checkpoint_is_held_to_everything_that_a_saved_one_is(saved, tmp_path):
    reshard(saved, tmp_path / "new", ranks=2)
    with pytest.raises(CheckpointError, match="item vocabulary other, got words"):
        load_checkpoint(tmp_path / "new", fresh("adam"), vocabulary="other")
    with pytest.raises(CheckpointError, match="its tables with adam, now adagrad"):
        load_checkpoint(tmp_path / "new", fresh("adagrad"), vocabulary="words")
    other = fresh("adagrad")
    load_weights(tmp_path / "new", other, vocabulary="words")
    assert torch.equal(whole_weights(other)[ITEM], tensors_of(saved)[f"model.{ITEM}"])
    flip(tmp_path / "new" / "__1_0.distcp", 900)
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        load_weights(tmp_path / "new", other, vocabulary="words")


def fresh(optimizer: str) -> Trainable:
    return trainable(World(), WHOLE[optimizer], DENSE)


VALUES = {
    "matrix": torch.arange(6, dtype=torch.float32).view(2, 3),
    "no-rows": torch.empty(0, 4),
    "number": torch.tensor(7),
    "half": torch.tensor([1.5, -2.0, 3.0], dtype=torch.bfloat16),
    "flags": torch.tensor([True, False, True]),
}


def test_a_whole_file_holds_every_shape_and_dtype(tmp_path):
    layout = {name: Entry(dtype=value.dtype, shape=tuple(value.shape)) for name, value in VALUES.items()}
    file = WholeFile.create(tmp_path / "file", layout, {"words": "old"})
    for name, value in VALUES.items():
        file.tensor(name).copy_(value)
    file.finish({"words": "new"})
    again = WholeFile.open(tmp_path / "file")
    assert again.metadata == {"words": "new"}
    assert_the_same({name: again.tensor(name) for name in again.entries}, VALUES)
    assert torch.equal(again.rows("matrix", 1, 1), VALUES["matrix"][1:])
    assert again.rows("matrix", 1, 1).untyped_storage().nbytes() == 12  # a piece is saved without the rest
    assert_the_same(pytest.importorskip("safetensors.torch").load_file(tmp_path / "file"), VALUES)


def test_a_dtype_without_a_name_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"odd must be one of F64, .*, got torch.complex64"):
        WholeFile.create(tmp_path / "file", {"odd": Entry(dtype=torch.complex64, shape=(1,))}, {})


HEADERS = {
    "overlap": {"a": ["F32", [2], [0, 8]], "b": ["F32", [1], [4, 8]]},
    "gap": {"a": ["F32", [1], [0, 4]], "b": ["F32", [1], [8, 12]]},
    "wrong-length": {"a": ["F32", [3], [0, 8]]},
    "negative-shape": {"a": ["F32", [-1, -2], [0, 8]]},
    "unknown-dtype": {"a": ["F99", [1], [0, 4]]},
    "unaligned": {"a": ["U8", [1], [0, 1]], "b": ["F32", [1], [1, 5]]},
    "no-object": {"a": 3},
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies_is_refused(name, tmp_path):
    fields = ("dtype", "shape", "data_offsets")
    header = {
        key: dict(zip(fields, of, strict=True)) if isinstance(of, list) else of for key, of in HEADERS[name].items()
    }
    text = json.dumps(header).encode()
    (tmp_path / "file").write_bytes(len(text).to_bytes(8, "little") + text + bytes(12))
    with pytest.raises(CheckpointError, match="must be a safetensors file, got"):
        WholeFile.open(tmp_path / "file")
