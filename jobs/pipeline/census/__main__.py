"""`python -m jobs.pipeline.census`: run the demo. Starts a cluster if none is up, runs the pipeline, and reports."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import fields

from cluster.command_line import overrides_of
from cluster.entrypoint import job
from cluster.session import find_running_record
from cluster.settings import PlatformConfig
from cluster.storage import layout, local
from jobs.pipeline.census.demo_page import write_report
from jobs.pipeline.census.earlier_state import adopt_earlier_state
from jobs.pipeline.census.summary import summarise
from jobs.pipeline.census.table import print_summary
from jobs.pipeline.config import PipelineConfig
from jobs.pipeline.context import StageFailed
from jobs.pipeline.control import Pipeline
from jobs.pipeline.state import State, read_newest_run

NAME = "census"


@job("demo", PipelineConfig)
def main(config: PipelineConfig) -> None:
    """Run the unfinished stages of the demo, then write and print the summary."""
    demo = local(layout(config.storage).demo)
    demo.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    is_new = ensure_cluster(config)
    pipeline = Pipeline.open(config, name=NAME)
    ledger = pipeline.ledger
    adopt_earlier_state(pipeline, demo)
    known = read_newest_run(ledger, NAME)
    deployed = None if known is None else known.stages.get("deploy")
    if is_new and deployed is not None and deployed.state is State.done:
        run_command("serve_apps.deploy", "action=restore")
    try:
        pipeline.run()
    except StageFailed as error:
        raise SystemExit(
            f"{error}\nThe cluster is still up. `make demo` resumes at this stage; `make down` stops the cluster."
        ) from None
    run = read_newest_run(ledger, NAME)
    assert run is not None, "The pipeline has run."
    record = find_running_record(config.storage)
    summary = summarise(config, run, demo)
    write_report(config, run, summary, record, demo=demo)
    print_summary(summary, record, seconds=time.perf_counter() - started, demo=demo)


def ensure_cluster(config: PipelineConfig) -> bool:
    """Start a cluster with this command's settings of the platform if none is up. Return whether it was started."""
    if find_running_record(config.storage) is not None:
        print("The cluster is up.", flush=True)
        return False
    run_command("cluster.up", *overrides_of({section.name for section in fields(PlatformConfig)}))
    return True


def run_command(*command: str) -> None:
    """Run a command line here. If it fails, end with its exit code."""
    print(f"$ python -m {' '.join(command)}", flush=True)
    code = subprocess.run([sys.executable, "-m", *command], check=False).returncode
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
