"""`make bench BENCH=pit_join`: point-in-time joins from and to Parquet, beside plain Polars, plain DuckDB and Feast.

Three tables have five features each, with one correction in ten rows, uneven entities and a TTL of seven days. Cases:
100,000 entity rows against tables of a million rows, and a million entity rows against tables of five million rows.
Systems: `falaj` over plaintext tables, as the peers' tables are, `falaj_protected` over encrypted tables, `falaj_ray`
with one Ray task per bucket.

Every run is a separate process. The systems take turns. The results are medians of the wall time without imports and of
the peak memory of the process (for `falaj_ray`, of the driver alone). `falaj` includes the hashes of the manifest;
`row_hash_seconds` is the time for these hashes. Systems with the same semantics must return the same values, or the
benchmark fails.

With `--s3`, Polars and Falaj read their inputs from an object store on this machine. Both read the files of Falaj's
plaintext tables (`falaj_protected` those of the encrypted tables).

Feast is installed into `build/bench/feast`. It is left out if the installation fails.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import polars as pl

# This file is run by its path, so Python does not add the project's root to `sys.path`.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from cluster.storage import file_system
from tests.bench._pit_data import CASES, TINY, VIEWS, Case, feature_names, write_plain
from tests.bench._pit_large import write_large
from tests.bench._pit_tables import KEYS, keep_access, write_tables
from tests.servers.key_broker import running_broker
from tests.servers.object_store import object_store_environment

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "bench"
FEAST = BUILD / "feast"
OURS = ("falaj", "falaj_protected", "falaj_ray")
PEERS = ("polars", "duckdb", "feast_duckdb")
SAME_MEANING = (*OURS, "polars", "duckdb")
FROM_S3 = ("falaj", "falaj_protected", "polars")
TIMEOUT_S = 300
Run = dict[str, float]


def install_feast() -> bool:
    """Install Feast into its own environment, because Feast needs another version of pandas than Falaj."""
    python = FEAST / "bin" / "python"
    if (FEAST / "installed").exists():
        return True
    try:
        if not python.exists():
            venv.create(FEAST, with_pip=True)
        wanted = ["feast[duckdb]==0.67.*", "pandas<3"]
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *wanted], check=True, timeout=900)
    except (subprocess.SubprocessError, OSError) as error:
        print(f"feast_duckdb is left out: it cannot be installed here ({error})")
        return False
    (FEAST / "installed").touch()
    return True


def run(system: str, folder: Path, uri: str | None = None) -> Run | None:
    """Run a system once, on the inputs in a folder or an object store. If it fails, print a message, return None."""
    python = str(FEAST / "bin" / "python") if system == "feast_duckdb" else sys.executable
    script = Path(__file__).with_name("_pit_systems.py")
    output = folder / f"out_{system}.parquet"
    output.unlink(missing_ok=True)
    try:
        done = subprocess.run(
            [python, str(script), system, str(folder), str(output), *([uri] if uri else [])],
            env=os.environ | {"PYTHONPATH": str(ROOT), "FEAST_USAGE": "False"},
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        print(f"{system} is left out: it was not done after {TIMEOUT_S} s")
        return None
    if done.returncode:
        print(f"{system} failed: {(done.stderr.strip().splitlines() or ['without a word'])[-1]}")
        return None
    result: Run = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def in_turns(systems: list[str], folder: Path, turns: int, uri: str | None = None) -> dict[str, Run]:
    """Run the systems in turns, and return the medians of each system that did not fail.

    With more than one turn, the first round is not counted, because it fills the disk cache.
    """
    runs: dict[str, list[Run]] = {system: [] for system in systems}
    for turn in range(turns + (turns > 1)):
        for system in list(runs):
            result = run(system, folder, uri)
            if result is None:
                del runs[system]
            elif turn or turns == 1:
                runs[system].append(result)
                print(
                    f"  {system:16} {result['seconds']:8.2f} s {result['peak_rss_mib']:8.0f} MiB", flush=True
                )
    return {
        system: {name: statistics.median(one[name] for one in done) for name in done[0]}
        for system, done in runs.items()
    }


def answers(system: str, folder: Path) -> pl.DataFrame:
    """Return the output of a system, sorted by entity row."""
    frame = pl.read_parquet(folder / f"out_{system}.parquet").sort("row_id")
    plain = {name: name.split("__")[-1] for name in frame.columns}
    columns = [name for view in range(VIEWS) for name in feature_names(view)]
    return frame.rename(plain).select("row_id", *columns).fill_nan(None)


def different(one: pl.DataFrame, other: pl.DataFrame) -> int:
    """Return the number of cells that differ.

    Raises:
        AssertionError: The two frames do not have the same entity rows.
    """
    assert one["row_id"].equals(other["row_id"])
    return int(
        one.select(
            pl.sum_horizontal(pl.col(name).ne_missing(other[name]).sum() for name in one.columns)
        ).item()
    )


def check(systems: list[str], folder: Path) -> None:
    """Print for each system how many of its cells differ from those of the first system.

    Raises:
        SystemExit: The results of two systems with the same semantics differ.
    """
    expected = answers(systems[0], folder)
    cells = expected.height * (expected.width - 1)
    for system in systems[1:]:
        count = different(expected, answers(system, folder))
        print(f"  {system}: {count} of {cells} cells are not those of {systems[0]}")
        if count and system in SAME_MEANING:
            raise SystemExit(f"{system} and {systems[0]} mean the same and differ in {count} cells.")


@contextlib.contextmanager
def uploaded(folder: Path) -> Iterator[str]:
    """Start an object store with the entity rows and the tables of a folder. Yield their URI."""
    with object_store_environment() as bucket:
        fs, path = file_system(f"{bucket}/pit_join")
        fs.put_file(str(folder / "entities.parquet"), f"{path}/entities.parquet")
        for kind in ("plain", "protected"):
            fs.put(f"{folder}/{kind}/", f"{path}/{kind}/", recursive=True)
        yield f"{bucket}/pit_join"


def measure(case: Case, systems: list[str], turns: int, *, from_s3: bool = False) -> list[dict[str, object]]:
    """Measure all systems on one case."""
    name = f"{case.name} from S3" if from_s3 else case.name
    print(f"{name}, {turns} turns")
    folder = BUILD / "pit_join" / case.folder
    shutil.rmtree(folder, ignore_errors=True)
    write_plain(case, folder)
    with running_broker(*KEYS) as access, contextlib.ExitStack() as stack:
        keep_access(folder, access)
        for kind in ("plain", "protected"):
            write_tables(folder, kind, access)
        uri = stack.enter_context(uploaded(folder)) if from_s3 else None
        medians = in_turns(systems, folder, turns, uri)
    check(list(medians), folder)
    shutil.rmtree(folder)
    fastest = min(
        (medians[peer]["seconds"] for peer in ("polars", "duckdb") if peer in medians), default=None
    )
    for system, values in medians.items():
        ratio = f", {values['seconds'] / fastest:.2f} of the faster bare one" if fastest else ""
        print(f"{name}  {system:16} {values['seconds']:8.2f} s {values['peak_rss_mib']:8.0f} MiB{ratio}")
    units = {"peak_rss_mib": "MiB"}
    return [
        {"system": system, "case": name, "metric": metric, "value": value, "unit": units.get(metric, "s")}
        for system, values in medians.items()
        for metric, value in values.items()
    ]


def measure_large(rows: int) -> list[dict[str, object]]:
    """Measure a training set of a million rows from one large table. `_pit_large.py` describes it."""
    folder = BUILD / "pit_join" / f"large{rows}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_large(folder, rows)
    done = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).with_name("_pit_large.py")),
            str(folder),
            f"{folder}/out.parquet",
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    shutil.rmtree(folder)
    values: Run = json.loads(done.stdout)
    print(f"{rows:,} rows: " + ", ".join(f"{name} {value:,.1f}" for name, value in values.items()))
    return [
        {"system": "falaj", "case": f"{rows} rows", "metric": metric, "value": value,
         "unit": "MiB" if metric.endswith("mib") else "s"}
        for metric, value in values.items()
    ]  # fmt: skip


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", action="append", help="by name; all unless given")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--systems", default=",".join((*OURS, *PEERS)))
    parser.add_argument("--s3", action="store_true", help="read from an object store; only Polars and Falaj")
    parser.add_argument(
        "--large", help="only tables of these sizes, for example 10M,100M (100M: 9 GB of disk)"
    )
    given = parser.parse_args()
    systems = given.systems.split(",")
    if given.large:
        systems = []
    if given.s3:
        systems = [system for system in systems if system in FROM_S3]
    if "feast_duckdb" in systems and not install_feast():
        systems.remove("feast_duckdb")
    results = []
    if given.large:
        for size in given.large.split(","):
            results += measure_large(int(size.replace("M", "000000")))
        given.case = []
    for case in (*CASES, TINY):
        if case.name in (given.case if given.case is not None else [known.name for known in CASES]):
            results += measure(case, systems, given.turns, from_s3=given.s3)
    output = Path(".falaj/bench/pit_join.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
