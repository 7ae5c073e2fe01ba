"""A study's records as tables: SQL over them, and exports."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltune.errors import StudyError

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

COLUMNS = {
    "digest": "VARCHAR", "run": "JSON", "status": "VARCHAR", "seconds": "DOUBLE",
    "ended": "VARCHAR", "result": "JSON", "failure": "JSON", "machine": "JSON",
}  # fmt: skip
RUN = {
    "kind": "VARCHAR", "method": "VARCHAR", "seed": "BIGINT", "spec": "JSON", "settings": "JSON",
}  # fmt: skip
RESULT = {
    "dev": "DOUBLE", "test": "DOUBLE", "train": "DOUBLE", "best_step": "BIGINT", "steps": "BIGINT",
    "epochs": "DOUBLE", "stopped": "VARCHAR", "trainable": "BIGINT",
    "trainable_without_head": "BIGINT", "total": "BIGINT", "saved_bytes": "BIGINT",
    "peak_memory_bytes": "BIGINT", "start_memory_bytes": "BIGINT", "train_seconds": "DOUBLE",
    "eval_seconds": "DOUBLE", "load_seconds": "DOUBLE",
}  # fmt: skip
RUNS = "CREATE VIEW runs AS SELECT {columns} FROM records"
CURVES = """
CREATE VIEW curves AS
SELECT digest, CAST(point[1] AS BIGINT) AS step, point[2] AS seconds, point[3] AS dev
FROM (SELECT digest, unnest(CAST(result->'$.curve' AS DOUBLE[][])) AS point FROM records)
"""


def connect(folder: str | Path) -> "DuckDBPyConnection":
    """A connection to an in-memory database with the records of a study.

    `runs` has one row for each record, its spec, settings and machine as JSON; `curves` has one for
    each evaluation of a run: digest, step, seconds, dev.

    Raises:
        StudyError: DuckDB is not installed, the folder holds no records, or one is damaged.
    """
    try:
        import duckdb
    except ImportError:
        raise StudyError(
            "records are queried with DuckDB, which is not installed: pip install 'deltune[study]'"
        ) from None
    files = sorted(str(path) for path in Path(folder).glob("runs/*.json"))
    if not files:
        raise StudyError(
            f"`{folder}` holds no records (no runs/*.json); run a study there with "
            "`deltune study run`"
        )
    db = duckdb.connect()
    try:
        db.execute(
            f"CREATE TABLE records AS SELECT * FROM read_json($files, columns={COLUMNS})",
            {"files": files},
        )
    except duckdb.Error as error:
        raise StudyError(
            f"a record of `{folder}` cannot be read: {_line(error)}; delete that file to run its "
            "run again"
        ) from None
    _do(db, RUNS.format(columns=", ".join(_columns())))
    _do(db, CURVES)
    return db


def query(folder: str | Path, sql: str) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Names of columns and rows that a query of `runs` and `curves` gives.

    Raises:
        StudyError: as `connect`; or DuckDB refuses the query.
    """
    if not sql.strip():
        raise StudyError("the query is empty; write e.g. `SELECT method, test FROM runs`")
    found = _do(connect(folder), sql)
    return [column[0] for column in found.description or []], found.fetchall()


def export(folder: str | Path, path: str | Path, table: str = "runs") -> Path:
    """Writes `runs` or `curves` to a Parquet or CSV file, by the ending of its name.

    Raises:
        StudyError: as `connect`; another ending or table, or a file that cannot be written.
    """
    path = Path(path)
    forms = {".parquet": "(FORMAT parquet)", ".csv": "(FORMAT csv, HEADER)"}
    if path.suffix not in forms or table not in ("runs", "curves"):
        raise StudyError(
            f"`{path}`: `{table}` cannot be written there; write `runs` or `curves` to a file that "
            "ends in .parquet or .csv"
        )
    beside = path.with_name(f".{path.name}.part")
    try:
        target = str(beside).replace("'", "''")
        _do(connect(folder), f"COPY {table} TO '{target}' {forms[path.suffix]}")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def _columns() -> Iterable[str]:
    yield from ("digest", "status", "run->>'$.model.name' AS model")
    yield from ("run->>'$.task.name' AS task", "run->>'$.task.metric' AS metric")
    yield from (f"CAST(run->>'$.{name}' AS {kind}) AS {name}" for name, kind in RUN.items())
    yield "CAST(run->>'$.settings.learning_rate' AS DOUBLE) AS learning_rate"
    yield from (f"CAST(run->>'$.task.{n}' AS BIGINT) AS {n}_examples" for n in ("train", "dev"))
    yield from (f"CAST(result->>'$.{name}' AS {kind}) AS {name}" for name, kind in RESULT.items())
    yield from (
        "failure->>'$.message' AS failure",
        "seconds",
        "CAST(left(ended, 19) AS TIMESTAMP) AS ended",
    )
    yield "machine"


def _do(db: "DuckDBPyConnection", sql: str) -> "DuckDBPyConnection":
    import duckdb

    try:
        return db.execute(sql)
    except duckdb.Error as error:
        raise StudyError(
            f"DuckDB refused `{sql.strip().splitlines()[0][:80]}`: {_line(error)}; the tables are "
            "`runs` and `curves`, and `DESCRIBE runs` lists the columns"
        ) from None


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
