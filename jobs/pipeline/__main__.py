"""`python -m jobs.pipeline`: run the demo. Starts a cluster if none is up, runs the unfinished stages, and reports."""

from __future__ import annotations

import time
from dataclasses import fields

from cluster.command_line import given_for
from cluster.entrypoint import job
from cluster.session import find_running_record
from cluster.settings import PlatformConfig
from cluster.storage import layout, local
from jobs.pipeline.config import PipelineConfig
from jobs.pipeline.report import write_report
from jobs.pipeline.runner import Runner, StageFailed
from jobs.pipeline.stages import plan
from jobs.pipeline.summary import summarise
from jobs.pipeline.table import print_summary


@job("pipeline", PipelineConfig)
def main(config: PipelineConfig) -> None:
    """Run the unfinished stages of the demo, then write and print the summary."""
    demo = local(layout(config.storage).demo)
    demo.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    runner = Runner(demo)
    stages = plan(config, demo)
    ensure_cluster(config, runner)
    try:
        for position, stage in enumerate(stages, start=1):
            runner.run(stage, position=position, of=len(stages))
    except StageFailed as error:
        raise SystemExit(
            f"{error}\nThe cluster is still up. `make demo` resumes at this stage; `make down` stops the cluster."
        ) from None
    summary = summarise(config, runner, demo)
    record = find_running_record(config.storage)
    write_report(config, runner, summary, record, demo=demo)
    print_summary(summary, record, seconds=time.perf_counter() - started, demo=demo)


def ensure_cluster(config: PipelineConfig, runner: Runner) -> None:
    """Start a cluster if none is up, with this command's settings of the platform.

    If the deployment stage is finished, restore the deployment on the new cluster.
    """
    if find_running_record(config.storage) is not None:
        print("The cluster is up.", flush=True)
        return
    settings = given_for({field.name for field in fields(PlatformConfig)})
    runner.execute((("cluster.up", *settings),), name="cluster")
    if "deploy" in runner.finished:
        runner.execute((("serve_apps.deploy", "action=restore"),), name="cluster")


if __name__ == "__main__":
    main()
