"""A checkpoint as one safetensors file of whole tensors, under the names of `state`, and what reads it again.

    model.NAME  tables.NAME.WHAT  dense.NAME.WHAT     as in the checkpoint, optimizers and all
    __metadata__["ssd_torchrec"]                      checkpoint.json without its files, and of every tensor its dtype,
                                                      shape and SHA-256, under a sum over all of it

A tensor goes from the checkpoint to its place in the file, so that memory holds one tensor at most, and of a checkpoint
of more than two ranks less. Sums are against damage, not against forgery; no foreign file is unpickled.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ssd_torchrec.data.scratch import scratch_folder
from ssd_torchrec.distributed import checkpoint_files as files
from ssd_torchrec.distributed.checkpoint import CheckpointInfo, info_of, read_info, signature_of
from ssd_torchrec.distributed.whole_file import Entry, WholeFile
from ssd_torchrec.errors import CheckpointError

KEY = "ssd_torchrec"
_UNKNOWN = "0" * 64  # stands where a SHA-256 will


def unshard(checkpoint: Path, file: Path, *, replace: bool = False) -> CheckpointInfo:
    """Write all of a checkpoint into one safetensors file; `reshard` makes a checkpoint of it again.

    Args:
        checkpoint: of any world size and split; its files are checked against their sums first.
        file: written beside and renamed when it is whole.
        replace: put it in the place of a file that is there, which stays until then.

    Returns:
        What the checkpoint says of itself.

    Raises:
        CheckpointError: the checkpoint is damaged, of a newer format, or does not hold the model that it names; `file`
            is there, or cannot be written. No file is left then, and one that was there is as it was.
    """
    if file.is_dir() or (file.exists() and not replace):
        raise CheckpointError(f"{file} must not be there yet, it is; give another name, or --replace for a file")
    info = intact_info(checkpoint)
    layout = layout_of(checkpoint, info)
    unknown = _described(info, layout, dict.fromkeys(layout, _UNKNOWN))
    with writing(file), scratch_folder(file, "unshard") as scratch:
        whole = gather(checkpoint, info, layout, scratch / "whole", unknown)
        whole.finish(_described(info, layout, {name: whole.sha256(name) for name in layout}))
        files.sync(whole.path)
        os.replace(whole.path, file)
        files.sync(file.parent)
    return info


def read_unsharded(file: Path) -> tuple[WholeFile, CheckpointInfo]:
    """Open a file that `unshard` wrote; every byte of it is checked.

    Returns:
        Its tensors, and what the checkpoint said of itself, without files.

    Raises:
        CheckpointError: it is no such file, cut short or edited, of a newer format, or lacks a tensor that the
            checkpoint had, optimizer state as well as weights, or has another in its place: the message names it.
    """
    whole = WholeFile.open(file)
    if KEY not in whole.metadata:
        raise CheckpointError(
            f"{file} must be written by ssd-torchrec unshard, got a safetensors file of something else; "
            "ssd-torchrec import-weights takes the weights of published programs"
        )
    content = files.checked_json(whole.metadata[KEY], file)
    info = info_of({**content["checkpoint"], "files": {}}, file)
    saved = content["tensors"]
    _check_model(file, info, whole.entries)
    _check_names(file, saved, whole.entries)
    for name, entry in whole.entries.items():
        if (now := signature_of(entry.dtype, entry.shape)) != (then := saved[name]["signature"]):
            raise CheckpointError(f"{file} must hold {name} as {then}, got {now}; unshard the checkpoint again")
        if whole.sha256(name) != saved[name]["sha256"]:
            raise CheckpointError(
                f"{name} in {file} is not what was saved: its SHA-256 differs; unshard the checkpoint again"
            )
    return whole, info


def intact_info(checkpoint: Path) -> CheckpointInfo:
    """What a checkpoint says of itself, with every file checked.

    Raises:
        CheckpointError: it is damaged, or of a newer format.
    """
    info = read_info(checkpoint)
    for name, expected in sorted(info.files.items()):
        files.check_file(checkpoint, name, expected)
    return info


def layout_of(checkpoint: Path, info: CheckpointInfo) -> dict[str, Entry]:
    """By name, what tensors a checkpoint holds.

    Raises:
        CheckpointError: they are not those of the model that it names.
    """
    layout = {}
    for name, entry in files.read_metadata(checkpoint, info.files).state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata)  # read_metadata refuses the rest
        layout[name] = Entry(dtype=entry.properties.dtype, shape=tuple(entry.size))
    _check_model(checkpoint, info, layout)
    return layout


def gather(
    checkpoint: Path, info: CheckpointInfo, layout: Mapping[str, Entry], path: Path, metadata: Mapping[str, str]
) -> WholeFile:
    """Fill a new file with the tensors of a checkpoint.

    Raises:
        CheckpointError: the checkpoint does not hold what it says.
        OSError: the disk is full or cannot be written.
    """
    whole = WholeFile.create(path, layout, metadata)
    files.read_tensors(checkpoint, {name: whole.tensor(name) for name in whole.entries}, info.files)
    return whole


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Raise what goes wrong with the disk as ours."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{target} must be writable, with room for all of the checkpoint, got {type(error).__name__}: {error}; "
            "make room or give another place"
        ) from error


def _described(info: CheckpointInfo, layout: Mapping[str, Entry], sums: Mapping[str, str]) -> dict[str, str]:
    """The metadata of the file; as long whatever the sums."""
    content: dict[str, Any] = {
        "checkpoint": {name: value for name, value in asdict(info).items() if name != "files"},
        "tensors": {
            name: {"signature": signature_of(entry.dtype, entry.shape), "sha256": sums[name]}
            for name, entry in sorted(layout.items())
        },
    }
    return {"format": "pt", KEY: json.dumps(files.with_sum(content))}


def _check_model(path: Path, info: CheckpointInfo, layout: Mapping[str, Entry]) -> None:
    for name, expected in info.tensors.items():
        entry = layout.get(f"model.{name}")
        got = "none" if entry is None else signature_of(entry.dtype, entry.shape)
        if got != expected:
            raise CheckpointError(
                f"{path} must be of one model, but model.{name} is to be {expected}, got {got}; take another checkpoint"
            )


def _check_names(file: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    if missing := sorted(saved.keys() - now.keys()):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{file} must hold {missing[0]}{more} as the checkpoint did, it does not; unshard the checkpoint again"
        )
    if strays := sorted(now.keys() - saved.keys()):
        raise CheckpointError(
            f"{file} must hold what the checkpoint did, got {strays[0]} besides; unshard the checkpoint again"
        )
