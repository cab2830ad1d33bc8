"""A safetensors file of whole tensors, mapped into memory: the kernel keeps what fits of it, and the disk the rest.

    8 bytes    length L of the header, little endian
    L bytes    JSON: by name of a tensor its dtype, shape and place; under __metadata__ strings; filled up with blanks
    the rest   the tensors, row-major and little endian, back to back

Nothing in such a file can run. The widest dtypes come first, so that every tensor stands on a multiple of its width.
Source: the section "Format" of https://github.com/huggingface/safetensors.
"""

import hashlib
import json
import math
import mmap
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssd_torchrec.errors import CheckpointError

METADATA = "__metadata__"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LENGTH = 8  # bytes that tell the header's length
_LONGEST_HEADER = 100_000_000  # what the safetensors library reads at most


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor of the file."""

    dtype: torch.dtype
    """Of its values."""

    shape: tuple[int, ...]
    """Of the whole tensor."""

    begin: int = 0
    """Bytes of the data before it."""

    @property
    def bytes(self) -> int:
        """What it takes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} ({', '.join(map(str, self.shape))})"


class WholeFile:
    """An open file. Its tensors are views of the mapping: those of a created file may be written to, others not."""

    def __init__(
        self, path: Path, mapping: mmap.mmap, data: int, entries: dict[str, Entry], metadata: dict[str, str]
    ) -> None:
        self.path = path
        self.entries = entries
        self.metadata = metadata
        self._mapping = mapping
        self._data = data

    @classmethod
    def create(cls, path: Path, tensors: Mapping[str, Entry], metadata: Mapping[str, str]) -> "WholeFile":
        """Make a file of tensors that are zero yet, with all the disk that it takes.

        Raises:
            CheckpointError: a dtype is none of `DTYPES`.
            OSError: the disk is full or cannot be written.
        """
        entries = _placed(tensors)
        header = _header(entries, metadata)
        size = len(header) + sum(entry.bytes for entry in entries.values())
        with path.open("w+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)  # a mapping that met a full disk would end the process
            file.write(header)
            file.flush()
            return cls(path, mmap.mmap(file.fileno(), size), len(header), entries, dict(metadata))

    @classmethod
    def open(cls, path: Path) -> "WholeFile":
        """Look at a file whoever wrote it.

        Raises:
            CheckpointError: it is not there, no safetensors file, or cut short.
        """
        try:
            with path.open("rb") as file:
                size = path.stat().st_size
                length = int.from_bytes(file.read(_LENGTH), "little")
                if not 0 < length <= min(_LONGEST_HEADER, size - _LENGTH):
                    raise ValueError(f"a header of {length} bytes in a file of {size}")
                entries, metadata = _parsed(json.loads(file.read(length)))
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} must be a safetensors file, got {type(error).__name__}: {error}; unshard the checkpoint again"
            ) from error
        expected = _LENGTH + length + sum(entry.bytes for entry in entries.values())
        if size != expected:
            raise CheckpointError(
                f"{path} must have {expected} bytes, got {size}: it was cut short or edited; "
                "unshard the checkpoint again"
            )
        return cls(path, mapping, _LENGTH + length, entries, metadata)

    def tensor(self, name: str) -> Tensor:
        """A whole tensor."""
        entry = self.entries[name]
        return self._view(entry, entry.shape, 0)

    def rows(self, name: str, first: int, rows: int) -> Tensor:
        """(rows, ...) of a tensor from row `first` on, with a storage of their own: saving them saves no others."""
        entry = self.entries[name]
        row = math.prod(entry.shape[1:]) * entry.dtype.itemsize
        return self._view(entry, (rows, *entry.shape[1:]), first * row)

    def sha256(self, name: str) -> str:
        """Sum of a tensor's bytes."""
        begin = self._data + self.entries[name].begin
        with memoryview(self._mapping) as content, content[begin : begin + self.entries[name].bytes] as part:
            return hashlib.sha256(part).hexdigest()

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Replace the metadata of a created file by some of the same length, and see all of it on disk."""
        header = _header(self.entries, metadata)
        assert len(header) == self._data, "the tensors lie behind a header of another length"
        self._mapping[: self._data] = header
        self.metadata = dict(metadata)
        self._mapping.flush()

    def _view(self, entry: Entry, shape: tuple[int, ...], skipped: int) -> Tensor:
        count = math.prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=entry.dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a file that is only read cannot be written to: so it is meant
            flat = torch.frombuffer(
                self._mapping, dtype=entry.dtype, count=count, offset=self._data + entry.begin + skipped
            )
        return flat.view(shape)


def _placed(tensors: Mapping[str, Entry]) -> dict[str, Entry]:
    placed, begin = {}, 0
    for name, entry in sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        if entry.dtype not in _NAMES:
            raise CheckpointError(f"{name} must be one of {', '.join(DTYPES)}, got {entry.dtype}; it has no file yet")
        placed[name] = Entry(dtype=entry.dtype, shape=entry.shape, begin=begin)
        begin += entry.bytes
    return placed


def _header(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bytes:
    content: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    for name, entry in entries.items():
        places = [entry.begin, entry.begin + entry.bytes]
        content[name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": places}
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH)
    return len(text).to_bytes(_LENGTH, "little") + text


def _parsed(header: dict[str, Any]) -> tuple[dict[str, Entry], dict[str, str]]:
    """What a header says; raises what Python raises where it is none, or its tensors overlap or leave gaps."""
    metadata = header.pop(METADATA, {})
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{METADATA} that holds more than strings")
    entries, begin = {}, 0
    for name, said in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if not all(isinstance(length, int) and length >= 0 for length in said["shape"]):
            raise ValueError(f"{name} of shape {said['shape']}")
        entry = Entry(dtype=DTYPES[said["dtype"]], shape=tuple(said["shape"]), begin=begin)
        if said["data_offsets"] != [begin, begin + entry.bytes]:
            raise ValueError(f"{name}, {entry}, at {said['data_offsets']}, not at {[begin, begin + entry.bytes]}")
        if begin % entry.dtype.itemsize:
            raise ValueError(f"{name}, {entry}, at byte {begin}, which is no multiple of its width")
        entries[name] = entry
        begin += entry.bytes
    return entries, metadata
