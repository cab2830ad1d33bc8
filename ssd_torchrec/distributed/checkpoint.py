"""Save a run so that it goes on as if it had never stopped, at any world size, or not at all.

    folder/
      step-00001200/     written as folder/.writing, renamed once every rank's part is on disk
      step-00001800/
      best -> step-00001200

A checkpoint loads into any number of ranks and any split of the tables, as long as the optimizers are the same; with
managed ids, into as many ranks as saved it, or into one process.
Another model, vocabulary or optimizer, a damaged file and a newer format are refused before any weight is touched.
Whatever goes wrong while saving, the checkpoints that were there before stay.

Nothing random is kept: the loop seeds what it draws from the seed, the step and the rank.
"""

import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ssd_torchrec.distributed import checkpoint_files as files
from ssd_torchrec.distributed.collectives import word_of_rank_0
from ssd_torchrec.distributed.id_maps import RANGES, check_ranges
from ssd_torchrec.distributed.process import all_or_none, from_all_ranks
from ssd_torchrec.distributed.shard import Trainable
from ssd_torchrec.distributed.state import Value, after_loading, dense_state, model_state, reset, table_state
from ssd_torchrec.distributed.tables import dtype_of, global_shape
from ssd_torchrec.errors import CheckpointError, ConfigError

FORMAT = 1
BEST = "best"
WRITING = ".writing"
DROPPING = ".dropping"
_NAME = re.compile(r"step-(\d{8,})(?:-(\d+))?")
_PACKAGES = ("ssd-torchrec", "torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "triton", "numpy", "pyarrow")


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """What a run is besides weights and optimizer state. All of it must be what JSON can hold."""

    step: int
    """Optimizer steps completed."""

    vocabulary: str
    """Hash of the item vocabulary: which item each row of the item table is."""

    position: dict[str, Any]
    """Where the loop is: epoch, batches completed, best metric and the like; given back as it was."""

    config: dict[str, Any]
    """The run's config, to build the same model from."""


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """The content of checkpoint.json."""

    format: int
    """Version of this layout."""

    state: TrainState
    """As it was saved."""

    tensors: dict[str, list[Any]]
    """By name of a weight its dtype and shape: which model this is of."""

    table_optimizer: str
    """What updated the tables."""

    dense_optimizer: str
    """What updated the rest."""

    world_size: int
    """Ranks that saved it; any number loads it."""

    plan: dict[str, str]
    """By table name who held which part; empty for whole tables."""

    versions: dict[str, str]
    """Versions of the packages that wrote it."""

    files: dict[str, dict[str, Any]]
    """By name of a file its size in bytes and SHA-256."""


def save_checkpoint(
    folder: Path, trainable: Trainable, state: TrainState, *, keep: int = 2, best: bool = False
) -> Path:
    """Write a checkpoint, then drop all but the newest `keep` and the best one. Collective.

    Args:
        folder: of the run's checkpoints; made if need be, on a disk that all ranks share.
        best: mark this one as the best.

    Returns:
        Where it lies.

    Raises:
        CheckpointError: on every rank, when a rank cannot write; the earlier checkpoints are as they were.
    """
    check_keep(keep)
    return write_checkpoint(folder, values_of(trainable), describe(trainable, state), keep=keep, best=best)


def check_keep(keep: int) -> None:
    """Refuse to drop what was just saved."""
    if keep < 1:
        raise ConfigError(f"at least 1 checkpoint must be kept, got keep={keep}")


def values_of(trainable: Trainable) -> dict[str, Value]:
    """All tensors of a checkpoint, live."""
    return model_state(trainable) | table_state(trainable) | dense_state(trainable)


def write_checkpoint(
    folder: Path,
    values: dict[str, Value],
    info: CheckpointInfo,
    *,
    keep: int,
    best: bool,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write what `values_of` and `describe` say, as `save_checkpoint`. Collective over `group`, a gloo group or all."""
    writing = folder / WRITING
    with all_or_none(f"saving to {folder}", CheckpointError, group):
        if _rank() == 0:
            _make_room(writing)
    files.write_tensors(writing, values, group)
    info = replace(info, files=_digests(writing, group))
    path: Path | None = None
    with all_or_none(f"saving to {folder}", CheckpointError, group):
        if _rank() == 0:
            files.write_json_with_sum(writing / files.INFO_FILE, asdict(info))
            path = _publish(writing, info.state.step, best)
            _drop_old(folder, keep)
    path = word_of_rank_0(path, group)
    assert path is not None
    return path


def load_checkpoint(
    path: Path, trainable: Trainable, *, vocabulary: str, reset_optimizer: bool = False
) -> CheckpointInfo:
    """Fill a model and its optimizer from a checkpoint, in place. Collective.

    Args:
        path: a checkpoint, as `save_checkpoint` or `latest_checkpoint` returned it.
        trainable: of any world size and split.
        vocabulary: hash of the vocabulary that the run uses.
        reset_optimizer: accept that the tables' or the dense optimizer is another; its state then starts anew.

    Returns:
        What the checkpoint says of itself; the position to go on from is in it.

    Raises:
        CheckpointError: the checkpoint is damaged, newer than this code, of another model, vocabulary or optimizer, or
            of managed ids that other ranks hold.
    """
    info = _checked_info(path, trainable, vocabulary)
    wanted = _weights(path, trainable, info)
    for part, live, saved_by, now in (
        ("tables", table_state(trainable), info.table_optimizer, trainable.sharding.optimizer),
        ("dense", dense_state(trainable), info.dense_optimizer, trainable.dense.optimizer),
    ):
        if saved_by == now:
            wanted |= live
        elif reset_optimizer:
            reset(live)
        else:
            raise CheckpointError(
                f"{path} must have been trained with the optimizer of this run, its {part} with {saved_by}, now {now}; "
                f"set the optimizer to {saved_by}, or start its state anew with --training.reset-optimizer"
            )
    _read(path, wanted, info)
    after_loading(trainable)
    return info


def load_weights(path: Path, trainable: Trainable, *, vocabulary: str) -> CheckpointInfo:
    """Fill a model's weights from a checkpoint and leave its optimizer alone, say to evaluate. Collective.

    Raises:
        CheckpointError: as `load_checkpoint`, whatever the optimizers.
    """
    info = _checked_info(path, trainable, vocabulary)
    _read(path, _weights(path, trainable, info), info)
    after_loading(trainable)
    return info


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None; what a killed run left half written is no checkpoint."""
    checkpoints = _checkpoints(folder)
    return checkpoints[-1] if checkpoints else None


def read_info(path: Path) -> CheckpointInfo:
    """What a checkpoint says of itself; its tensors are not looked at.

    Raises:
        CheckpointError: there is no checkpoint, or checkpoint.json is damaged or of a newer format.
    """
    return info_of(files.read_json_with_sum(path / files.INFO_FILE), path)


def info_of(content: dict[str, Any], path: Path) -> CheckpointInfo:
    """What a checkpoint says of itself, from the content of its checkpoint.json.

    Args:
        path: where it was found, for the message.

    Raises:
        CheckpointError: it is of a newer format.
    """
    if content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} must have format {FORMAT}, got {content.get('format')}; "
            "use the version of ssd_torchrec that wrote it"
        )
    return CheckpointInfo(**{**content, "state": TrainState(**content["state"])})


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _make_room(writing: Path) -> None:
    """An empty folder to write to, whatever a run that was killed has left there."""
    for leftover in (writing, writing.with_name(DROPPING)):
        if leftover.exists():
            shutil.rmtree(leftover)
    writing.mkdir(parents=True)


def _digests(writing: Path, group: dist.ProcessGroup | None) -> dict[str, dict[str, Any]]:
    """Sums of all files, each rank adding up a share of them."""
    share: dict[str, dict[str, Any]] = {}
    with all_or_none(f"saving to {writing.parent}", CheckpointError, group):
        share = {name: files.digest(writing / name) for name in files.files_of(writing)[_rank() :: _world_size()]}
    return {name: sums for shares in from_all_ranks(share, group) for name, sums in sorted(shares.items())}


def describe(trainable: Trainable, state: TrainState) -> CheckpointInfo:
    """What a checkpoint says of itself, but for its files."""
    return CheckpointInfo(
        format=FORMAT,
        state=state,
        tensors=_signature(trainable),
        table_optimizer=trainable.sharding.optimizer,
        dense_optimizer=trainable.dense.optimizer,
        world_size=_world_size(),
        plan=trainable.plan,
        versions=installed_versions(),
        files={},
    )


def _publish(writing: Path, step: int, best: bool) -> Path:
    """Rename the finished folder; a second checkpoint of a step stands beside the first until that is dropped."""
    folder = writing.parent
    name = f"step-{step:08d}"
    serial = 1
    while (folder / name).exists():
        serial += 1
        name = f"step-{step:08d}-{serial}"
    os.rename(writing, folder / name)
    if best:
        link = folder / f".{BEST}"
        link.unlink(missing_ok=True)
        link.symlink_to(name)
        os.replace(link, folder / BEST)
    _sync_folder(folder)
    return folder / name


def _sync_folder(folder: Path) -> None:
    files.sync(folder)


def _drop_old(folder: Path, keep: int) -> None:
    best = (folder / BEST).resolve()
    for path in _checkpoints(folder)[:-keep]:
        if path.resolve() != best:
            dropping = path.with_name(DROPPING)
            os.rename(path, dropping)  # first: half a folder must not look like a checkpoint
            shutil.rmtree(dropping)


def _checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    found = []
    for path in folder.iterdir():
        match = _NAME.fullmatch(path.name)
        if match and (path / files.INFO_FILE).is_file():
            found.append((int(match[1]), int(match[2] or 1), path))
    return [path for *_, path in sorted(found)]


def signature_of(dtype: torch.dtype, shape: Sequence[int]) -> list[Any]:
    """Dtype and shape as checkpoint.json notes them."""
    return [str(dtype).removeprefix("torch."), *shape]


def _signature(trainable: Trainable) -> dict[str, list[Any]]:
    return {
        name.removeprefix("model."): signature_of(dtype_of(value), global_shape(value))
        for name, value in model_state(trainable).items()
    }


def installed_versions() -> dict[str, str]:
    """Versions of the packages that weights and figures depend on; what is not installed is left out."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # one of the two fbgemm packages, or a checkout that is not installed
    return found


def _checked_info(path: Path, trainable: Trainable, vocabulary: str) -> CheckpointInfo:
    """Refuse before any weight is touched; each rank looks at a share of the files."""
    info: CheckpointInfo | None = None
    with all_or_none(f"loading {path}", CheckpointError):
        info = read_info(path)
        if info.state.vocabulary != vocabulary:
            raise CheckpointError(
                f"{path} must be of this data's item vocabulary {vocabulary}, got {info.state.vocabulary}: its table "
                "rows are other items; give the data set that it was trained on, or let ssd-torchrec grow make it one "
                "of a data set that extends that one"
            )
        _check_model(path, info.tensors, _signature(trainable))
        for name in sorted(info.files)[_rank() :: _world_size()]:
            files.check_file(path, name, info.files[name])
    assert info is not None
    return info


def _check_model(path: Path, saved: dict[str, list[Any]], now: dict[str, list[Any]]) -> None:
    if saved == now:
        return
    differences = [f"the checkpoint lacks {name}" for name in sorted(now.keys() - saved.keys())]
    differences += [f"the model lacks {name}" for name in sorted(saved.keys() - now.keys())]
    for name in sorted(saved.keys() & now.keys()):
        if saved[name] != now[name]:
            differences.append(
                f"{name} is {_shape(saved[name])} in the checkpoint and {_shape(now[name])} in the model"
            )
    more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
    raise CheckpointError(
        f"{path} must be of the same model, but {'; '.join(differences[:3])}{more}; build the model from the config in "
        f"{files.INFO_FILE}"
    )


def _weights(path: Path, trainable: Trainable, info: CheckpointInfo) -> dict[str, Value]:
    """What is to be filled of a model; where its id maps are cut is not, it must fit. Collective."""
    wanted = model_state(trainable)
    now = {name: wanted.pop(name) for name in list(wanted) if name.endswith(RANGES)}
    if now:
        saved = {name: torch.empty_like(ranges) for name, ranges in now.items()}
        _read(path, saved, info)
        check_ranges(path, saved, now)
    return wanted


def _shape(signature: list[Any]) -> str:
    dtype, *shape = signature
    return f"{dtype} ({', '.join(map(str, shape))})"


def _read(path: Path, wanted: dict[str, Value], info: CheckpointInfo) -> None:
    with all_or_none(f"loading {path}", CheckpointError):
        files.check_tensors(path, wanted, info.files)
    files.read_tensors(path, wanted, info.files)
