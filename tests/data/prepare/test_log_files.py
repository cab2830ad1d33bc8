import gzip
import random
from pathlib import Path

import pytest

from ssd_torchrec.data.prepare.files import check_gzip, format_of, is_gzip, log_files
from ssd_torchrec.errors import DataError

NAMES = {
    "a.csv": "csv",
    "a.CSV.gz": "csv",
    "a.tsv": "tsv",
    "LEs.txt": "tsv",
    "a.parquet": "parquet",
    "ratings.dat": "dat",
    "ml-1m.inter": "inter",
    "ml-1m.user": "inter",
    "reviews_Beauty_5.json.gz": "jsonl",
    "a.jsonl": "jsonl",
    "a.gz": None,
    "README": None,
}


@pytest.mark.parametrize(("name", "kind"), NAMES.items())
def test_names_tell_the_format(name, kind):
    assert format_of(Path(name)) == kind


@pytest.fixture
def folder(tmp_path):
    for name in ("b.csv", "a.csv.gz", "deep/c.csv", "_SUCCESS.csv", ".hidden/d.csv", "README", "users.tsv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_files_of_a_folder_are_taken_by_format_or_pattern_in_the_order_of_their_paths(folder):
    csvs = tuple(folder / name for name in ("a.csv.gz", "b.csv", "deep/c.csv"))
    assert log_files(folder, "", "csv") == ("csv", csvs)
    assert log_files(folder, "?.csv*", "auto") == ("csv", csvs)
    assert log_files(folder, "README", "dat") == ("dat", (folder / "README",))
    assert log_files(folder / "README", "", "tsv") == ("tsv", (folder / "README",))


REFUSED = {
    "nowhere": ("nowhere", "", "auto", r"nowhere must be a file or folder, there is none; correct the path"),
    "mixed": ("", "", "auto", r"must hold files of one format, got a.csv.gz and users.tsv; choose with --files"),
    "no match": ("", "log_*", "csv", r"must hold files matching log_\*, got 5 others; correct the path, --files or"),
    "no such format": ("", "", "parquet", r"must hold files of parquet, got 5 others"),
    "name": (
        "README",
        "",
        "auto",
        r"README must tell its format by its name, one of .csv .* rename it or give --format",
    ),
}


@pytest.mark.parametrize(("name", "pattern", "asked", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_log_is_refused(folder, name, pattern, asked, message):
    with pytest.raises(DataError, match=message):
        log_files(folder / name, pattern, asked)


def test_a_file_that_may_not_be_read_is_named(folder, monkeypatch):
    def forbidden(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(DataError, match=r"b.csv must be readable, but Permission denied; change who may read it"):
        log_files(folder / "b.csv", "", "auto")


CONTENT = random.Random(0).randbytes(300_000)  # more than a block, compressed too
WHOLE = gzip.compress(CONTENT)
BROKEN = {
    "no end": WHOLE[:-1],
    "no checksum": WHOLE[:-8],
    "half": WHOLE[: len(WHOLE) // 2],
    "header only": WHOLE[:10],
    "length": WHOLE[:-1] + b"\x01",
    "checksum": WHOLE[:-8] + bytes(4) + WHOLE[-4:],
    "middle": WHOLE[:150_000] + bytes(8) + WHOLE[150_008:],
    "more behind": WHOLE + b"more",
    "padding": WHOLE + bytes(100),
    "second cut": WHOLE + WHOLE[:-9],
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_gzip_that_is_not_whole_is_refused(tmp_path, content):
    (tmp_path / "log.csv.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"log.csv.gz: gzip must be whole, but .*; copy or download it again"):
        check_gzip(tmp_path / "log.csv.gz")


@pytest.mark.parametrize("content", [WHOLE, WHOLE + WHOLE, gzip.compress(b"")], ids=["one", "two", "empty"])
def test_gzip_that_is_whole_passes_whatever_its_name(tmp_path, content):
    (tmp_path / "log.csv").write_bytes(content)
    assert is_gzip(tmp_path / "log.csv")
    check_gzip(tmp_path / "log.csv")
