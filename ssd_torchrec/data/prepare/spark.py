"""Events on a Spark cluster into what is left of them: k-core, ids for names, one packed row a user, in order.

    # frame    columns                    lines
    # pairs    user_id, item              what is left of events; the k-core in the end
    # of_user  user_id, count             users of pairs; of_item likewise
    # items    n, raw, id                 table rows of the items of the k-core, n is 0
    # values   n, raw, id                 ids of the values of further columns
    # left     user_id, event, id_n       events of the k-core; of the table of users, the ids that it gives to users
    # rows     user_id, item, timestamp, id_n
    #                                     of the data set, in order; cells but the first are int64, the high byte first

Executors run Spark's own expressions and need no Python. Nothing needs a disk that all machines share: what is left
after a round goes into the cluster's block manager, which also keeps plans from growing, and the driver takes the rows
partition by partition. It holds the vocabulary and the values, as every reader of the data set does.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial, reduce
from itertools import accumulate, count, islice
from typing import Any

import numpy as np
import pyarrow as pa

from ssd_torchrec.data.prepare.assemble import TIME, Extras, Left, Order, no_values, rising
from ssd_torchrec.data.prepare.core import Counts, rounds
from ssd_torchrec.data.prepare.known import Known
from ssd_torchrec.data.prepare.spark_log import SparkLog
from ssd_torchrec.data.prepare.spark_session import Frame, Session, expression, quietly
from ssd_torchrec.data.rows import Ints, Jagged, Rows, offsets_of
from ssd_torchrec.data.schema import RawType
from ssd_torchrec.data.values import Values
from ssd_torchrec.data.vocabulary import Vocabulary

_EVENTS_AT_ONCE = 2**18
_NAMES_AT_ONCE = 2**16
_SENT_WHOLE = 2**18  # rows of up to some dozen bytes
_PLACE_BITS = 33  # of monotonically_increasing_id, that count within a partition; those above number partitions
_ROW_BITS = 40  # of a position, that count within a file; those above number files
_TYPES: dict[RawType, pa.DataType] = {"int64": pa.int64(), "string": pa.large_string()}


class SparkCore:
    """The k-core of a log, and its rows; what the cluster holds for them goes when `held` is closed."""

    def __init__(self, session: Session, log: SparkLog, held: ExitStack) -> None:
        self._session, self._log, self._held = session, log, held
        self._pairs, self._is_whole = log.events.select("user_id", "item"), True

    def rounds(self, k: int) -> Iterator[Counts]:
        """The counts of the log, then those after each round.

        Args:
            k: least number of interactions of a user and of an item; 0 and 1 keep all.

        Raises:
            DataError: nothing is left.
        """
        return rounds(k, partial(self._count, k), partial(self._drop_weak, k))

    def assemble(self, extras: Extras, order: Order, num_oov_buckets: int, known: Known | None) -> "SparkRows":
        """Number what `rounds` left, first what is known, then the rest in ascending order; and make the rows.

        Args:
            known: whose items and values keep their ids; it has the same further columns and `num_oov_buckets`.

        Raises:
            DataError: a further column holds no value for what is left, and none is known.
        """
        had = known.vocabulary.ids if known else pa.nulls(0, _TYPES[self._log.item_type])
        items, (more,) = self._numbered(self._of_item.selectExpr("0 AS n", "item AS raw"), [had], [1 + num_oov_buckets])
        vocabulary = known.vocabulary.extended_by(more) if known else Vocabulary(more, num_oov_buckets)
        left, values = self._with_ids(self._left(items, extras), extras, known.values if known else {})
        rows = self._kept(_rows(left, extras, order, self._files()))
        return SparkRows(extras, order, vocabulary, values, self._log.user_type == "string", rows)

    def _count(self, k: int) -> Counts:
        self._of_user = self._kept(self._pairs.groupBy("user_id").count())
        self._of_item = self._kept(self._pairs.groupBy("item").count())
        sums = ["count(*)", f"count_if(count < {k:d})", "coalesce(sum(count), 0)"]
        sums = self._of_user.selectExpr("0", *sums).union(self._of_item.selectExpr("1", *sums)).collect()
        (_, users, weak_users, events), (_, items, weak_items, _) = sorted(sums)
        self._num_users, self._weak = users, (weak_users, weak_items)
        return Counts(users, items, events)

    def _drop_weak(self, k: int) -> bool:
        """Take the pairs of users and items with fewer than k away; False where there are none."""
        if not any(self._weak):
            return False
        counted, pairs = (self._of_user, self._of_item), self._pairs
        weak = (of.where(f"count < {k:d}") for of in counted)
        users, items = map(_sent, weak, self._weak)
        fewer = pairs.join(users, "user_id", "left_anti").join(items, "item", "left_anti")
        self._pairs = self._kept(fewer)
        for dropped in counted if self._is_whole else (*counted, pairs):
            _forget(dropped)
        self._is_whole = False
        return True

    def _left(self, items: Frame, extras: Extras) -> list["_Part"]:
        events = self._log.events.join(items.selectExpr("raw AS item", "id AS number"), "item")
        of_user = _sent(self._of_user, self._num_users)
        if not self._is_whole:
            events = events.join(of_user, "user_id", "left_semi")
        parts = [_Part(events, range(len(extras.of_log)))]
        if extras.of_users_table:
            users = self._log.users.join(of_user, "user_id", "left_semi")
            parts.append(_Part(users, range(len(extras.of_log), len(extras.names))))
        return parts

    def _with_ids(self, left: list["_Part"], extras: Extras, known: Values) -> tuple[list["_Part"], Values]:
        """Ids for values, and what they mean: context columns, then event columns."""
        if not extras.names:
            return left, {}
        nothing = [pa.nulls(int(name in extras.event), pa.large_string()) for name in extras.names]  # id 0 of events
        had = [known.get(name, none)[len(none) :] for name, none in zip(extras.names, nothing, strict=True)]
        told = reduce(lambda one, other: one.union(other), map(_Part.values, left)).distinct()
        ids, more = self._numbered(told, had, [len(none) for none in nothing])
        values = dict(zip(extras.names, map(pa.concat_arrays, zip(nothing, had, more, strict=True)), strict=True))
        for name, none in zip(extras.names, nothing, strict=True):
            if len(values[name]) == len(none):
                raise no_values(name)
        return [part.with_ids(ids) for part in left], {name: values[name] for name in (*extras.user, *extras.event)}

    def _numbered(self, raw: Frame, known: list[pa.Array], first: list[int]) -> tuple[Frame, list[pa.Array]]:
        """Ids for names of kind 0, 1, ..., a count for each.

        Args:
            raw: n, the kind, and raw, the name; each once.
            known: by kind, the names that have the first ids already, in order.
            first: by kind, the first id.

        Returns:
            n, raw and id; and by kind, the names that are not known, in order.
        """
        lines = [(n, *line) for n, of in enumerate(known) for line in zip(of.to_pylist(), count(first[n]))]
        had = self._session.createDataFrame(lines, f"n INT, raw {_sql(known[0].type)}, id BIGINT", verifySchema=False)
        keys = ["n", "raw"]
        new = raw.join(_sent(had, len(lines)), keys, "left_anti") if lines else raw
        placed = self._kept(new.orderBy(keys).selectExpr(*keys, "monotonically_increasing_id() AS place"))
        more, lengths = _in_order(placed, known[0].type, len(known))
        before = _starts(map(len, more))
        offset = [first[n] + len(of) - before[n] for n, of in enumerate(known)]
        rank = f"{_at(_starts(lengths), f'shiftright(place, {_PLACE_BITS})')} + (place & {2**_PLACE_BITS - 1}L)"
        ids = placed.selectExpr(*keys, f"{_at(offset, 'n')} + {rank} AS id")
        ids = ids.union(had.join(raw.toDF(*keys), keys, "left_semi")) if lines else ids
        return _sent(ids, sum(map(len, more)) + len(lines)), more

    def _files(self) -> Frame:
        lines = [(file, at) for at, file in enumerate(self._log.files)]
        files = self._session.createDataFrame(lines, "file STRING, at BIGINT", verifySchema=False)
        return _sent(files, len(lines))

    def _kept(self, frame: Frame) -> Frame:
        """Compute a frame now, and cut it off from its plan, which would grow with the rounds."""
        is_lasting = self._session.sparkContext.getCheckpointDir() is not None
        kept = frame.checkpoint() if is_lasting else frame.localCheckpoint()
        self._held.callback(_forget, kept)
        return kept


@dataclass(frozen=True)
class SparkRows(Left):
    """What is left, as packed rows in the cluster."""

    packed: Frame

    def blocks(self) -> Iterator[tuple[Rows, pa.Array | None]]:
        first, users, num_events = 0, [], 0
        for user in self.packed.toLocalIterator(prefetchPartitions=True):
            users.append(user)
            num_events += len(user[1]) // 8
            if num_events >= _EVENTS_AT_ONCE:
                yield self._block(first, users)
                first, users, num_events = first + len(users), [], 0
        if users:
            yield self._block(first, users)

    def _block(self, first: int, users: list[Any]) -> tuple[Rows, pa.Array | None]:
        raw, *packed = zip(*users, strict=True)
        item, timestamp, *ids = map(_unpacked, packed)
        of_event = len(self.extras.event)
        rows = Rows(
            user_id=np.arange(first, first + len(raw)) if self.raw_user_is_string else np.array(raw, np.int64),
            item=item.values,
            timestamp=timestamp.values if self.order == "int64" else rising(timestamp.values, item.offsets),
            offsets=item.offsets,
            context=dict(zip(self.extras.user, ids[of_event:], strict=True)),
            event_columns={name: of.values for name, of in zip(self.extras.event, ids[:of_event], strict=True)},
        )
        return rows, pa.array(raw, pa.large_string()) if self.raw_user_is_string else None


@dataclass(frozen=True)
class _Part:
    """A frame that gives values of further columns, and their numbers."""

    frame: Frame
    numbers: range

    def values(self) -> Frame:
        """n, raw."""
        listed = "".join(f", {n}, extra_{n}" for n in self.numbers)
        if not listed:
            return self.frame.selectExpr("0 AS n", "CAST(NULL AS STRING) AS raw").limit(0)
        return self.frame.selectExpr(f"stack({len(self.numbers)}{listed}) AS (n, raw)").where("raw IS NOT NULL")

    def with_ids(self, ids: Frame) -> "_Part":
        """Ids beside values; null where there is no value."""
        frame = self.frame
        for n in self.numbers:
            named = ids.where(f"n = {n}").selectExpr(f"raw AS extra_{n}", f"id AS id_{n}")
            frame = frame.join(named, f"extra_{n}", "left")
        return _Part(frame, self.numbers)


def _rows(left: list[_Part], extras: Extras, order: Order, files: Frame) -> Frame:
    events, *users = left
    of_event = range(len(extras.event))
    of_user = [f"id_{n}" for n in range(len(extras.event), len(extras.names))]
    ids = "".join(f", coalesce(id_{n}, 0L) AS id_{n}" for n in of_event)
    position = f"shiftleft(at, {_ROW_BITS}) | row"
    event = f"struct({TIME[order]} AS time, {position}, number AS item, timestamp{ids}) AS event"
    lines = events.frame.join(files, "file").selectExpr("user_id", event, *([] if users else of_user))
    for part in users:
        lines = lines.unionByName(part.frame.select("user_id", *of_user), allowMissingColumns=True)
    bags = [expression(f"sort_array(collect_set({name})) AS {name}") for name in of_user]
    events = expression("sort_array(collect_list(event)) AS events")
    packed = {"item": "events.item", "timestamp": "events.timestamp"} | {f"id_{n}": f"events.id_{n}" for n in of_event}
    packed |= {name: name for name in of_user}
    by_user = lines.repartitionByRange("user_id").groupBy("user_id").agg(events, *bags).orderBy("user_id")
    return by_user.selectExpr("user_id", *(f"{_packed(sql)} AS {name}" for name, sql in packed.items()))


def _sent(frame: Frame, num_rows: int) -> Frame:
    """A frame to join with; sent to all executors if it is small, which Spark cannot tell by itself."""
    named = frame.toDF(*frame.columns)  # columns of its own: a checkpoint has those of what it was made of
    return named.hint("broadcast") if num_rows <= _SENT_WHOLE else named


def _packed(array: str) -> str:
    """SQL: the bytes of int64 values end to end."""
    return f"unhex(array_join(transform({array}, value -> lpad(hex(value), 16, '0')), ''))"


def _unpacked(cells: tuple[bytes, ...]) -> Jagged:
    lengths: Ints = np.array([len(cell) for cell in cells], np.int64) // 8
    return Jagged(np.frombuffer(b"".join(cells), ">i8").astype(np.int64), offsets_of(lengths))


def _in_order(placed: Frame, of_type: pa.DataType, num_kinds: int) -> tuple[list[pa.Array], Ints]:
    """The names of each kind; and how many there are in each partition."""
    parts: list[list[pa.Array]] = [[pa.nulls(0, of_type)] for _ in range(num_kinds)]
    lengths: Ints = np.zeros(1, np.int64)
    lines = placed.toLocalIterator(prefetchPartitions=True)
    for some in iter(lambda: list(islice(lines, _NAMES_AT_ONCE)), []):
        kind, names, place = zip(*some, strict=True)
        for n in set(kind):
            parts[n].append(pa.array([name for name, of in zip(names, kind, strict=True) if of == n], of_type))
        here = np.bincount(np.array(place) >> _PLACE_BITS, minlength=len(lengths))
        lengths = here + np.pad(lengths, (0, len(here) - len(lengths)))
    return [pa.concat_arrays(of) for of in parts], lengths


def _starts(lengths: Iterable[int]) -> list[int]:
    return [0, *accumulate(lengths)]


def _at(numbers: Sequence[int], index: str) -> str:
    """SQL: one of some numbers."""
    return f"array({', '.join(f'{number}L' for number in numbers)})[{index}]"


def _sql(of_type: pa.DataType) -> str:
    return "BIGINT" if pa.types.is_int64(of_type) else "STRING"


def _forget(kept: Frame) -> None:
    """Remove a checkpoint, which else waits for the garbage collection of the driver or stays for good."""
    quietly(_remove, kept)


def _remove(kept: Frame) -> None:
    rdd, context = kept._jdf.queryExecution().analyzed().rdd(), kept.sparkSession.sparkContext
    rdd.unpersist(False)
    if rdd.getCheckpointFile().isDefined():
        path = context._jvm.org.apache.hadoop.fs.Path(rdd.getCheckpointFile().get())
        path.getFileSystem(context._jsc.hadoopConfiguration()).delete(path, True)
