"""A session of Spark for as long as a log takes, and what it says in our words.

The cluster is the one that spark-submit, spark-defaults.conf or the session of the caller say; without them, the cores
of this machine.
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from ssd_torchrec.errors import ConfigError, DataError

Session = Any  # pyspark.sql.SparkSession: an extra, and not there where types are checked
Frame = Any  # pyspark.sql.DataFrame

_LEAST = (3, 5)  # the first release that numbers the rows of Parquet files
_SETTINGS = {"spark.sql.caseSensitive": "true"}  # as the names of columns are everywhere else


@contextmanager
def spark_session() -> Iterator[Session]:
    """The session that is there, left as it was, or one of our own, stopped at the end.

    Raises:
        ConfigError: PySpark or Java is missing, Spark is too old, is a remote one or does not start, or gives up later.
    """
    try:
        from pyspark import SparkContext  # pyright: ignore[reportMissingImports]
        from pyspark.sql import SparkSession  # pyright: ignore[reportMissingImports]
        from pyspark.sql.utils import is_remote  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            f"the engine spark needs PySpark, but {error}; install ssd-torchrec[spark], or start it by spark-submit"
        ) from error
    if is_remote():
        raise ConfigError(
            "the engine spark must run in Spark's driver, got a remote session (Spark Connect); unset SPARK_REMOTE and "
            "start by spark-submit"
        )
    is_ours = SparkContext._active_spark_context is None
    with _explained(), ExitStack() as until_the_end:
        session = _started(SparkSession.builder)
        if is_ours:
            until_the_end.callback(quietly, session.stop)
        if tuple(map(int, session.version.split(".")[:2])) < _LEAST:
            least = ".".join(map(str, _LEAST))
            raise ConfigError(f"the engine spark needs Spark {least} or later, got {session.version}; upgrade it")
        for name, value in _SETTINGS.items():
            until_the_end.callback(quietly, session.conf.set, name, session.conf.get(name))
            session.conf.set(name, value)
        yield session


@contextmanager
def readable(log: str) -> Iterator[None]:
    """What Spark says of files that it cannot read, in our words."""
    try:
        yield
    except spark_errors() as error:
        raise DataError(
            f"{log} must be Parquet that Spark reads, but {reason(error)}; correct the path, or write the files again"
        ) from error


def expression(sql: str) -> Any:
    """SQL as a column, where text is not taken."""
    from pyspark.sql.functions import expr  # pyright: ignore[reportMissingImports]

    return expr(sql)


def spark_errors() -> tuple[type[Exception], ...]:
    """What PySpark raises."""
    from py4j.protocol import Py4JError  # pyright: ignore[reportMissingImports]
    from pyspark.errors import PySparkException  # pyright: ignore[reportMissingImports]

    return Py4JError, PySparkException


def reason(error: Exception) -> str:
    """What went wrong, without classes, codes and traces."""
    for line in str(error).splitlines():
        told = re.split(r"[a-zA-Z]+Exception: |Exception thrown in awaitResult:", line)[-1].strip()
        told = re.sub(r"^(: )?(\[[A-Z0-9_.]+\])? ?|[.; ]*(SQLSTATE: .*)?$", "", told)
        if told and not line.startswith(("An error occurred while", "\tat ")):
            return told[:400]
    return type(error).__name__


def quietly(release: Any, *args: Any) -> None:
    """Let something go; what is gone with Spark already is no error."""
    with suppress(*spark_errors(), OSError):
        release(*args)


def _started(builder: Any) -> Session:
    try:
        return builder.getOrCreate()
    except spark_errors() as error:
        raise ConfigError(
            f"the engine spark needs a Spark that starts, but {reason(error)}; install Java (17 suits every Spark from "
            "3.5) and let JAVA_HOME name it, or correct the settings of the cluster"
        ) from error


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except (*spark_errors(), ConnectionError, EOFError) as error:
        raise ConfigError(
            f"Spark must last until the data set is made, but {reason(error)}; look into its log and start again, with "
            "more memory or disk if they ran out"
        ) from error
