"""The files of a log: which they are, what they hold by their names, and whether their gzip is whole."""

import zlib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from ssd_torchrec.data.prepare.log import Format
from ssd_torchrec.errors import DataError

SUFFIXES: dict[str, Format] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".dat": "dat",
    ".inter": "inter",
    ".user": "inter",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
}
_GZIP = b"\x1f\x8b"
_BLOCK = 2**16


def format_of(file: Path) -> Format | None:
    """What a file holds by its name, or nothing we know."""
    name = file.with_suffix("") if file.suffix == ".gz" else file
    return SUFFIXES.get(name.suffix.lower())


def log_files(log: Path, pattern: str, asked: str) -> tuple[Format, tuple[Path, ...]]:
    """The files of a log in the order of their paths, and what they hold.

    Args:
        log: a file, or a folder of files, also in folders of it; names that start with . or _ are no part of it.
        pattern: what their names match, if it is a folder.
        asked: the format, or "auto".

    Raises:
        DataError: there is no such file or folder, it holds no file of the log, one that may not be read, or files of
            different formats.
    """
    if log.is_dir():
        files = _files_in(log, pattern, asked)
    elif log.is_file():
        files = [log]
    else:
        raise DataError(f"{log} must be a file or folder, there is none; correct the path")
    for file in files:
        _check_readable(file)
    if asked != "auto":
        return _format(asked), tuple(files)
    formats = {file: format_of(file) for file in files}
    for file, kind in formats.items():
        if kind is None:
            raise DataError(f"{file} must tell its format by its name, {_known()}; rename it or give --format")
        if kind != formats[files[0]]:
            raise DataError(
                f"{log} must hold files of one format, got {files[0].name} and {file.name}; "
                "choose with --files '*.csv' or --format"
            )
    return _format(formats[files[0]] or ""), tuple(files)


def is_gzip(file: Path) -> bool:
    """Whether a file is compressed, whatever its name."""
    with file.open("rb") as opened:
        return opened.read(2) == _GZIP


def check_gzip(file: Path) -> None:
    """Decompress a file as a check, a block in memory at a time.

    Raises:
        DataError: it is cut short or corrupt.
    """
    with file.open("rb") as opened:
        try:
            whole = _is_whole(iter(lambda: opened.read(_BLOCK), b""))
        except zlib.error as error:
            raise DataError(f"{file}: gzip must be whole, but {error}; copy or download it again") from error
    if not whole:
        raise DataError(f"{file}: gzip must be whole, but it ends too early; copy or download it again")


def _is_whole(blocks: Iterator[bytes]) -> bool:
    """Whether blocks hold gzip members to their end, checksums included."""
    member = zlib.decompressobj(wbits=31)
    for block in blocks:
        while block:
            member = zlib.decompressobj(wbits=31) if member.eof else member
            member.decompress(block)
            block = member.unused_data
    return member.eof


def _files_in(folder: Path, pattern: str, asked: str) -> list[Path]:
    every = [file for file in folder.rglob("*") if file.is_file() and not _is_hidden(file.relative_to(folder))]
    if pattern:
        files = [file for file in every if fnmatchcase(file.name, pattern)]
    else:
        kinds = SUFFIXES.values() if asked == "auto" else (asked,)
        files = [file for file in every if format_of(file) in kinds]
    if not files:
        wanted = f"matching {pattern}" if pattern else f"of {'a known format' if asked == 'auto' else asked}"
        raise DataError(
            f"{folder} must hold files {wanted}, got {len(every)} others; correct the path, --files or --format"
        )
    return sorted(files)


def _check_readable(file: Path) -> None:
    try:
        file.open("rb").close()
    except OSError as error:
        raise DataError(f"{file} must be readable, but {error.strerror}; change who may read it") from error


def _is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)


def _format(name: str) -> Format:
    return next(kind for kind in SUFFIXES.values() if kind == name)


def _known() -> str:
    return f"one of {' '.join(SUFFIXES)}, with or without .gz"
