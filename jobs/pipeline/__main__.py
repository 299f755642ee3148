"""`python -m jobs.pipeline pipeline=<name> action=plan|run|show|cancel [run=<id>]`: run a declared pipeline.

A pipeline is a file `configs/pipeline/<name>.yaml`, or `pipeline/<name>.yaml` in a folder that `--config-dir` names.
Its stages are commands. `plan` checks everything and prints the stages. `run` runs the stages that are not done with
the same inputs, code and parameters. `show` prints the stages of a run, and writes them as a page to
`output=page.html`. `cancel` ends a run.
"""

from __future__ import annotations

from cluster.entrypoint import job
from jobs.pipeline.config import PipelineAction, PipelineConfig
from jobs.pipeline.control import Pipeline


@job("pipeline", PipelineConfig)
def main(config: PipelineConfig) -> None:
    """Do one action with the pipeline."""
    pipeline = Pipeline.open(config)
    match config.action:
        case PipelineAction.plan:
            pipeline.print_plan()
        case PipelineAction.run:
            pipeline.run()
        case PipelineAction.show:
            pipeline.show()
        case PipelineAction.cancel:
            pipeline.cancel()


if __name__ == "__main__":
    main()
