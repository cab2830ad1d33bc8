"""Raw item ids to rows of the item table: row 0 the mask, rows 1..K by hash for unknown ids, then the items in order.

Every id gets a row: TorchRec's row-wise lookup would read row 0 for an id past the end and say nothing. The hash is
ours, written down here, so that a row means the same item on every machine and in every year: int64 ids go through
the splitmix64 finaliser (Steele et al. 2014), strings through the polynomial sum of their UTF-8 bytes first.
"""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ssd_torchrec.data.draws import splitmix64
from ssd_torchrec.data.rows import Ints
from ssd_torchrec.errors import ConfigError, DataError

VOCABULARY_FILE = "vocabulary.parquet"
_POLYNOMIAL_BASE = np.uint64(0x9E3779B97F4A7C15)
_BUCKETS_KEY = b"num_oov_buckets"

Hashes = NDArray[np.uint64]
RawIds = Any  # a pyarrow or numpy array, or a sequence, of int64 or of strings


class Vocabulary:
    """The items of a catalogue in the order of their table rows."""

    def __init__(self, ids: RawIds, num_oov_buckets: int) -> None:
        """Give out the rows 1 + num_oov_buckets + i.

        Args:
            ids: raw ids, all int64 or all strings, none twice.

        Raises:
            ConfigError: `num_oov_buckets` is below 1.
            DataError: `ids` hold nothing, a null, the same id twice, or neither int64 nor strings.
        """
        if num_oov_buckets < 1:
            raise ConfigError(f"num_oov_buckets must be at least 1, got {num_oov_buckets}; unknown ids need a row")
        self.num_oov_buckets = num_oov_buckets
        self.ids = _as_ids(ids)
        if not len(self.ids):
            raise DataError("a vocabulary must hold at least one item, got none; was everything filtered out?")
        hashes = stable_hash(self.ids)
        self._order = np.argsort(hashes, kind="stable")
        self._sorted = hashes[self._order]
        self._refuse_twins()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def first_item(self) -> int:
        return 1 + self.num_oov_buckets

    @cached_property
    def content_hash(self) -> str:
        """sha256 over the type, order and spelling of the ids and the number of buckets."""
        return self.hash_of_first(len(self))

    def hash_of_first(self, num_items: int) -> str:
        """The `content_hash` of a vocabulary of the first items alone: whether this one extends another."""
        ids = self.ids[:num_items]
        digest = hashlib.sha256(f"{ids.type} {len(ids)} {self.num_oov_buckets}".encode())
        for part in _buffers(ids):
            digest.update(np.ascontiguousarray(part).data)
        return digest.hexdigest()

    def extended_by(self, ids: RawIds) -> "Vocabulary":
        """The same items in the same rows, and more after them.

        Raises:
            DataError: an id is known, null, or of another type.
        """
        return Vocabulary(pa.concat_arrays([self.ids, self._typed(ids)]), self.num_oov_buckets)

    def rows_of(self, raw_ids: RawIds) -> Ints:
        """Table rows of raw ids: (n,) int64; unknown ids share the out-of-vocabulary rows by hash.

        Raises:
            DataError: an id is null or of another type than the vocabulary's.
        """
        raw = self._typed(raw_ids)
        hashes = stable_hash(raw)
        at = self._order[np.minimum(np.searchsorted(self._sorted, hashes), len(self) - 1)]
        known = _equal(raw, self.ids.take(pa.array(at)))
        return np.where(known, self.first_item + at, self._buckets(hashes))

    def buckets_of(self, raw_ids: RawIds) -> Ints:
        """Out-of-vocabulary rows of raw ids, known ones too: (n,) int64, as `rows_of` before they were known.

        Raises:
            DataError: an id is null or of another type than the vocabulary's.
        """
        return self._buckets(stable_hash(self._typed(raw_ids)))

    def ids_of(self, rows: Ints) -> pa.Array:
        """Raw ids of table rows; null for the mask and the out-of-vocabulary rows.

        Raises:
            DataError: a row lies outside the table.
        """
        at = np.asarray(rows, np.int64) - self.first_item
        if len(at) and (at.min() < -self.first_item or at.max() >= len(self)):
            raise DataError(
                f"table rows must lie in 0..{self.first_item + len(self) - 1}, got {int(np.min(rows))}.."
                f"{int(np.max(rows))}; use the vocabulary that the data set was prepared with"
            )
        return self.ids.take(pa.array(np.maximum(at, 0), mask=at < 0))

    def save(self, folder: Path | str) -> None:
        """Write FOLDER/vocabulary.parquet."""
        schema = pa.schema([("id", self.ids.type)], metadata={_BUCKETS_KEY: str(self.num_oov_buckets).encode()})
        pq.write_table(pa.table([self.ids], schema=schema), Path(folder) / VOCABULARY_FILE)

    @classmethod
    def load(cls, folder: Path | str) -> "Vocabulary":
        """Read what `save` wrote.

        Raises:
            DataError: the file is missing, cut short or no vocabulary.
        """
        file = Path(folder) / VOCABULARY_FILE
        try:
            table = pq.read_table(file)
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{file}: must be a vocabulary, but {error}; prepare the data set again") from error
        buckets = (table.schema.metadata or {}).get(_BUCKETS_KEY)
        if buckets is None or table.column_names != ["id"]:
            raise DataError(f"{file}: must hold one column id and the number of buckets; prepare the data set again")
        return cls(table["id"], int(buckets))

    def _buckets(self, hashes: Hashes) -> Ints:
        return 1 + (hashes % np.uint64(self.num_oov_buckets)).astype(np.int64)

    def _typed(self, raw_ids: RawIds) -> pa.Array:
        raw = _as_ids(raw_ids)
        if len(raw) and raw.type != self.ids.type:
            raise DataError(f"raw ids must be {self.ids.type} as in the vocabulary, got {raw.type}; cast them")
        return raw.cast(self.ids.type)

    def _refuse_twins(self) -> None:
        twins = np.flatnonzero(self._sorted[1:] == self._sorted[:-1])
        if len(twins):
            one, other = (self.ids[int(self._order[twins[0] + step])].as_py() for step in (0, 1))
            mend = "give each id once" if one == other else "they hash alike: rename one of them"
            raise DataError(f"ids of a vocabulary must differ, got {one!r} and {other!r}; {mend}")


def stable_hash(ids: pa.Array) -> Hashes:
    """(n,) uint64 of int64 or string ids; the same in every process, on every machine."""
    if pa.types.is_int64(ids.type):
        return splitmix64(ids.to_numpy().view(np.uint64))
    if not len(ids):
        return np.zeros(0, np.uint64)  # Arrow may leave out the offsets of no strings
    offsets, letters = _buffers(ids)
    lengths = np.diff(offsets)
    place = np.arange(len(letters)) - np.repeat(offsets[:-1], lengths)
    terms = (letters.astype(np.uint64) + np.uint64(1)) * _powers(int(lengths.max(initial=0)))[place]
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(terms, dtype=np.uint64)])  # wraps around, as it should
    return splitmix64((sums[offsets[1:]] - sums[offsets[:-1]]) + lengths.astype(np.uint64))


def _powers(count: int) -> Hashes:
    return np.cumprod(np.full(count, _POLYNOMIAL_BASE), dtype=np.uint64)


def _as_ids(ids: RawIds) -> pa.Array:
    """One int64 or large_string array without nulls."""
    array = ids if isinstance(ids, pa.Array | pa.ChunkedArray) else pa.array(ids)
    if len(array) and array.null_count:
        raise DataError(f"raw ids must not be null, got {array.null_count} nulls; drop those events")
    if not len(array) or (pa.types.is_integer(array.type) and array.type != pa.uint64()):
        array = array.cast(pa.int64())
    elif pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        array = array.cast(pa.large_string())
    else:
        raise DataError(f"raw ids must be int64 or strings, got {array.type}; cast them")
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array


def _buffers(ids: pa.Array) -> tuple[Ints, NDArray[np.uint8]]:
    """(n+1,) offsets from 0 and the bytes they cut."""
    if pa.types.is_int64(ids.type):
        values = ids.to_numpy()
        return np.arange(0, 8 * len(values) + 1, 8), values.view(np.uint8)
    _, offset_buffer, letter_buffer = ids.buffers()
    offsets = np.frombuffer(offset_buffer, np.int64, len(ids) + 1, ids.offset * 8)
    letters = np.frombuffer(letter_buffer, np.uint8) if letter_buffer else np.zeros(0, np.uint8)
    return offsets - offsets[0], letters[offsets[0] : offsets[-1]]


def _equal(one: pa.Array, other: pa.Array) -> NDArray[np.bool_]:
    return pc.call_function("equal", [one, other]).to_numpy(zero_copy_only=False)
