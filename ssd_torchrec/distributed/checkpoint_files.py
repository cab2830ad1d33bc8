"""The files of one checkpoint: tensors by torch.distributed.checkpoint, and checkpoint.json that vouches for them.

    step-00001200/
      __0_0.distcp ...   tensors, a file or more a rank
      .metadata          which part of which tensor lies where
      checkpoint.json    what the checkpoint is of, size and SHA-256 of every other file, and a sum over itself

Trust: .metadata is a pickle, and a sum does not make a stranger's file safe. It is read by an unpickler that knows the
few classes of such metadata and calls nothing else; tensors are read as weights only; entries that PyTorch would
unpickle freely ("bytes") are refused. The sums are there for damage, not against forgery.
"""

import hashlib
import json
import math
import os
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from ssd_torchrec.distributed.state import Value
from ssd_torchrec.distributed.tables import global_shape
from ssd_torchrec.errors import CheckpointError

INFO_FILE = "checkpoint.json"
METADATA_FILE = ".metadata"

_METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
}


def _member(kind: object, name: object) -> Any:
    """Stands in for getattr, by which Python before 3.11.4 pickles members of an enumeration; gives nothing else."""
    if not (isinstance(kind, type) and issubclass(kind, Enum) and isinstance(name, str) and name in kind.__members__):
        raise CheckpointError(
            f"{METADATA_FILE} must describe tensors only, got attribute {name} of {kind}; do not load this checkpoint"
        )
    return kind[name]


class _MetadataUnpickler(pickle.Unpickler):
    """Knows what torch.distributed.checkpoint writes about tensors, and refuses every other name."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        if global_name in _METADATA_CLASSES.get(module_name, ()):
            return super().find_class(module_name, global_name)
        if module_name == "torch" and isinstance(dtype := getattr(torch, global_name, None), torch.dtype):
            return dtype
        if module_name.partition(".")[0] == "pathlib" and global_name.endswith("Path"):
            return PurePath  # where it was written; not used
        if (module_name, global_name) == ("builtins", "getattr"):
            return _member
        raise CheckpointError(
            f"{METADATA_FILE} must describe tensors only, got a reference to {module_name}.{global_name}; "
            "do not load this checkpoint"
        )


class _Reader(FileSystemReader):
    """Reads metadata through the restricted unpickler, and tensors only from files that the checkpoint lists."""

    def __init__(self, path: Path, files: Iterable[str]) -> None:
        super().__init__(path)
        self._files = set(files)

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        metadata = read_metadata(Path(self.path), self._files)
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


def read_metadata(path: Path, files: Iterable[str]) -> Metadata:
    """What tensors a checkpoint holds.

    Raises:
        CheckpointError: it refers to anything but tensors in `files`.
    """
    with (path / METADATA_FILE).open("rb") as file:
        try:
            metadata = _MetadataUnpickler(file).load()
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"{path / METADATA_FILE} must be readable, got {error}; take another checkpoint"
            ) from error
    entries = metadata.state_dict_metadata
    if freely := [name for name, entry in entries.items() if not isinstance(entry, TensorStorageMetadata)]:
        raise CheckpointError(f"{path} must hold tensors only, got {freely[0]}; do not load this checkpoint")
    if strays := {info.relative_path for info in metadata.storage_data.values()} - set(files):
        raise CheckpointError(f"{path} must hold its tensors itself, got {strays.pop()}; do not load this checkpoint")
    return metadata


class _Writer(FileSystemWriter):
    """Raises the disk's errors as they are: PyTorch closes its archive first, and that error hides them."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            raise cause or error from None


def write_tensors(path: Path, values: Mapping[str, Value], group: dist.ProcessGroup | None = None) -> None:
    """Write whole or sharded tensors into an existing folder, each rank its part. Collective; raises on every rank.

    Args:
        group: of all ranks; None for the default one.

    Raises:
        CheckpointError: a rank could not write.
    """
    try:
        save(dict(values), storage_writer=_Writer(path), process_group=group, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        raise CheckpointError(
            f"{path.parent} must be writable, with room for another checkpoint, but {_first_failure(error)}; make room "
            "there, or give another place"
        ) from error


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Rows of a tensor that one rank is to write."""

    name: str
    """Of the whole tensor."""

    dtype: torch.dtype
    """Of its values."""

    shape: tuple[int, ...]
    """Of the whole tensor; () is one row."""

    first_row: int
    """Where the piece begins."""

    rows: int
    """How many it has."""

    @property
    def bytes(self) -> int:
        """What it takes."""
        return self.rows * math.prod(self.shape[1:]) * self.dtype.itemsize


def write_pieces(path: Path, ranks: Sequence[Sequence[Piece]], read: Callable[[Piece], Tensor]) -> None:
    """Write tensors into an existing folder as if so many ranks did, in this process and a piece at a time.

    Args:
        ranks: the pieces of each rank, which has a file of its own; together they are whole tensors.
        read: what a piece holds; asked for it when it is written.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    by_place = {(piece.name, piece.first_row): piece for pieces in ranks for piece in pieces}
    names = {name: (name,) for name, _ in by_place}  # what DefaultSavePlanner notes of names that are not nested
    plans, metadata = create_default_global_save_plan([SavePlan([*map(_write_item, pieces)]) for pieces in ranks])
    metadata.planner_data = names
    planner = _PiecePlanner(lambda name, first_row: read(by_place[name, first_row]))
    writer = _Writer(path)
    writer.set_up_storage_writer(True)
    written = [writer.write_data(plan, planner).wait() for plan in writer.prepare_global_plan(plans)]
    writer.finish(metadata, written)


class _PiecePlanner(DefaultSavePlanner):
    """Fetches what is to be written when the writer asks for it."""

    def __init__(self, read: Callable[[str, int], Tensor]) -> None:
        super().__init__()
        self._read = read

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        offset = write_item.index.offset
        return self._read(write_item.index.fqn, offset[0] if offset else 0)


def _write_item(piece: Piece) -> WriteItem:
    offsets = torch.Size([piece.first_row, *[0] * (len(piece.shape) - 1)][: len(piece.shape)])
    sizes = torch.Size([piece.rows, *piece.shape[1:]][: len(piece.shape)])
    return WriteItem(
        index=MetadataIndex(piece.name, offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=offsets, sizes=sizes),
            properties=TensorProperties(dtype=piece.dtype),
            size=torch.Size(piece.shape),
        ),
    )


def read_tensors(path: Path, values: Mapping[str, Value], files: Iterable[str]) -> None:
    """Fill live tensors with what a checkpoint holds under their names. Collective; raises on every rank.

    Args:
        files: the only files to read from.

    Raises:
        CheckpointError: the files do not hold what they say.
    """
    try:
        load(
            dict(values),
            storage_reader=_Reader(path, files),
            planner=DefaultLoadPlanner(allow_partial_load=False),
            no_dist=not dist.is_initialized(),
        )
    except CheckpointException as error:
        raise CheckpointError(f"{path} could not be read: {_first_failure(error)}") from error


def check_tensors(path: Path, values: Mapping[str, Value], files: Iterable[str]) -> None:
    """Refuse a checkpoint that does not hold what is to be filled from it.

    Raises:
        CheckpointError: a name is not there or has another shape.
    """
    metadata = read_metadata(path, files)
    for name, value in values.items():
        entry = metadata.state_dict_metadata.get(name)
        if entry is None:
            raise CheckpointError(f"{path} must hold {name}, it does not; take a checkpoint of the same optimizer")
        assert isinstance(entry, TensorStorageMetadata)  # read_metadata refuses the rest
        if tuple(entry.size) != global_shape(value):
            raise CheckpointError(
                f"{path} must hold {name} as {global_shape(value)}, got {tuple(entry.size)}; "
                "take a checkpoint of the same model"
            )


def _first_failure(error: CheckpointException) -> str:
    rank, (failure, _) = next(iter(error.failures.items()))
    return f"on rank {rank}: {type(failure).__name__}: {failure}"


def digest(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def files_of(path: Path) -> list[str]:
    """Names of a checkpoint's files but checkpoint.json, in order."""
    return sorted(entry.name for entry in path.iterdir() if entry.name != INFO_FILE)


def check_file(path: Path, name: str, expected: Mapping[str, Any]) -> None:
    """Refuse a file that is missing, cut short or edited.

    Raises:
        CheckpointError: naming the file.
    """
    file = path / name
    if not file.is_file():
        raise CheckpointError(f"{path} must hold {name}, which is gone; take another checkpoint")
    if (size := file.stat().st_size) != expected["bytes"]:
        raise CheckpointError(
            f"{file} must have {expected['bytes']} bytes, got {size}: it was cut short or edited; "
            "take another checkpoint"
        )
    if digest(file) != expected:
        raise CheckpointError(f"{file} is not what was saved: its SHA-256 differs; take another checkpoint")


def write_json_with_sum(path: Path, content: Mapping[str, Any]) -> None:
    """Write checkpoint.json and see it on disk."""
    with path.open("w") as file:
        json.dump(with_sum(content), file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def read_json_with_sum(path: Path) -> dict[str, Any]:
    """Read checkpoint.json.

    Raises:
        CheckpointError: it is missing, cut short or edited.
    """
    try:
        text = path.read_text()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} must be a checkpoint's, got {type(error).__name__}: {error}") from error
    return checked_json(text, path)


def with_sum(content: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON can hold, with a sum over it."""
    return {**content, "sum": _sum(content)}


def checked_json(text: str, path: Path) -> dict[str, Any]:
    """Content of JSON written of `with_sum`, without the sum.

    Args:
        path: the file that held it, for the message.

    Raises:
        CheckpointError: it is cut short or edited.
    """
    try:
        content = json.loads(text)
        written = content.pop("sum")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} must be a checkpoint's, got {type(error).__name__}: {error}") from error
    if written != _sum(content):
        raise CheckpointError(f"{path} is not what was saved: it was edited; take another checkpoint")
    return content


def _sum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sync(path: Path) -> None:
    """See a file, or the names in a folder, on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
