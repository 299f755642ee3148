"""The key of a stage: a hash of its command, parameters, code and inputs. Events of finished stages have the key."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import RefusedError
from cluster.ledger import Ledger
from cluster.ledger.events import DeploymentRemoved, ModelDeployed, StageFinished
from cluster.storage import is_uri
from jobs.pipeline.graph import covers, is_path, substitute
from jobs.pipeline.plan import Plan, PlannedStage, own_paths
from jobs.pipeline.stage.arguments import arguments
from jobs.pipeline.stage.commands import WITH_RUNS
from jobs.pipeline.stage.content import HAS_NO_CONTENT, CodeHashes, Platform, digest_json, digest_path
from jobs.pipeline.stage.outputs import is_aside
from jobs.pipeline.stage.requirements import unmet
from jobs.pipeline.state import last_done

MAX_RUN_CHARS = 59
"""Largest length of the id of a sweep: `jobs.sweep.config.MAX_RUN`, without an import of the package of trainings."""
_HASH_CHARS = 12


class StageRefused(RefusedError):
    """A stage's command was refused, or its result does not meet a requirement."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A stage whose inputs and parameters are known."""

    planned: PlannedStage
    command: tuple[str, ...]
    """Module and arguments."""
    options: tuple[str, ...]
    """Arguments of the pipeline's command line that are passed on to the command. They are not part of the key."""
    key: str
    inputs: dict[str, str]
    """Maps input to the hash of its content."""
    always: bool
    """Whether the stage runs in each run."""


def stage_command(prepared: Prepared, *, run: str) -> list[str]:
    """Return the module and all arguments of a stage's job.

    A stage that trains or sweeps gets the id of a run. Each attempt with the same key in the same run of the pipeline
    gets the same id. So after a kill, the next attempt continues the work.

    Args:
        prepared: The stage.
        run: Id of the pipeline's run.
    """
    module, *own = prepared.command
    command = [module, *prepared.options, *own]
    if module in WITH_RUNS and "run" not in prepared.planned.stage.parameters:
        command.append(f"run={_run_of_stage(prepared, run)}")
    return command


def _run_of_stage(prepared: Prepared, run: str) -> str:
    """Return an id of a training run. With another key, it is another run: its settings or its data differ.

    Long ids of two runs may have equal starts, so the hash at the end is that of the run, the stage and the key.
    """
    stage = prepared.planned.stage.name
    name = re.sub(r"[^A-Za-z0-9._-]", "-", f"p-{run}-{stage}")
    digest = digest_json([run, stage, prepared.key])
    return f"{name[: MAX_RUN_CHARS - _HASH_CHARS - 1]}-{digest[:_HASH_CHARS]}"


class StageKeys:
    """Computes the keys of a plan's stages, and finds the stages that are done already."""

    def __init__(
        self,
        pipeline: str,
        plan: Plan,
        *,
        ledger: Ledger,
        platform: Platform,
        options: tuple[str, ...] = (),
        config_dir: str | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._plan = plan
        self._ledger = ledger
        self._platform = platform
        self._options = options
        self._config_dir = config_dir
        self._code = CodeHashes()

    def prepare(self, name: str, done: Mapping[str, StageFinished]) -> Prepared:
        """Return the command line of a stage and its key.

        Args:
            name: The stage.
            done: How the earlier stages were done.

        Raises:
            StageRefused: The result of an earlier stage has no value that this stage uses.
        """
        planned = self._plan.stages[name]
        known = own_paths(planned.stage) | {
            (earlier, key): value for earlier, event in done.items() for key, value in event.result.items()
        }
        try:
            parameters = substitute(planned.stage.parameters, known)
        except KeyError as error:
            raise StageRefused(
                f"Stage '{name}' uses {error.args[0]}, but the result of that stage has no value of this name."
            ) from None
        own = arguments(parameters)
        ancestors = self._plan.graph.ancestors(name)
        inputs = {part: self._input_hash(part, ancestors, done) for part in planned.reads}
        code = self._code.digest(planned.modules)
        options: tuple[str, ...] = ()
        if planned.is_command:
            folder = () if self._config_dir is None else ("--config-dir", self._config_dir)
            options = (*folder, *self._options)
        return Prepared(
            planned=planned,
            command=(planned.stage.command, *own),
            options=options,
            key=digest_json(
                [
                    self._pipeline,
                    planned.stage.command,
                    own,
                    inputs,
                    code,
                    planned.settings,
                    sorted(planned.writes),
                ]
            ),
            inputs=inputs,
            always=self.runs_always(name),
        )

    def runs_always(self, name: str) -> bool:
        """Return whether a stage runs in each run: by its declaration, or because its input has no content to hash."""
        planned, ancestors = self._plan.stages[name], self._plan.graph.ancestors(name)
        return (
            planned.stage.always
            or planned.facts.always
            or any(
                part.partition(":")[0] in HAS_NO_CONTENT and not self._writers(part, ancestors)
                for part in planned.reads
            )
        )

    def reusable(self, prepared: Prepared, run: str) -> StageFinished | None:
        """Return how a stage was last done, if its key is the same now and its files are still there.

        A stage that is always run, because it reads a log or depends on the time, is done only if this run did it.
        A deployment is no longer done if its version was removed and not deployed again.
        """
        stage = prepared.planned.stage
        last = last_done(self._ledger, self._pipeline, stage.name)
        if last is None or last.key != prepared.key:
            return None
        if prepared.always and (last.run != run or last.reused_from):
            return None
        if any(is_path(path) and digest_path(path) != digest for path, digest in last.outputs.items()):
            return None
        if stage.command == "serve_apps.deploy" and self._is_removed(prepared, last):
            return None
        return None if unmet(stage.require, last.result) else last

    def _is_removed(self, prepared: Prepared, last: StageFinished) -> bool:
        """Return whether the deployed version was removed since the stage was done, and not deployed again."""
        finished = self._ledger.newest(StageFinished, pipeline=self._pipeline, stage=last.stage)
        since = 0 if finished is None else finished.seq
        for part in prepared.planned.facts.writes:
            names: dict[str, Any] = {"name": part.partition(":")[2]}
            if "version" in last.result:  # a stage of an earlier release has no result
                names["version"] = last.result["version"]
            removed = self._ledger.newest(DeploymentRemoved, **names)
            deployed = self._ledger.newest(ModelDeployed, **names)
            if removed and removed.seq > since and (deployed is None or deployed.seq < removed.seq):
                return True
        return False

    def _input_hash(self, part: str, ancestors: set[str], done: Mapping[str, StageFinished]) -> str:
        """Return the hash of an input: as the last earlier stages wrote it, or else of its present content.

        A later stage may change the same view, so its present content can differ from an earlier stage's input.
        """
        graph, writers = self._plan.graph, self._writers(part, ancestors)
        last = [name for name in writers if not any(name in graph.ancestors(other) for other in writers)]
        if not last:
            return self._platform.digest(part)
        hashes = {
            f"{name}:{written}": digest
            for name in last
            for written, digest in done[name].outputs.items()
            if _writes(written, part)
        }
        return digest_json(hashes)

    def foreign_folder(self, prepared: Prepared) -> str | None:
        """Return a declared output that is a folder with files, if no stage of this name ever wrote it."""
        stage = prepared.planned.stage
        for path in filter(is_path, stage.outputs.values()):
            folder = Path(path)
            if is_uri(path) or not folder.is_dir() or is_aside(folder) or not any(folder.iterdir()):
                continue
            ended = self._ledger.find(StageFinished, pipeline=self._pipeline, stage=stage.name)
            if not any(path in entry.payload["outputs"] for entry in ended):
                return path
        return None

    def _writers(self, part: str, ancestors: set[str]) -> set[str]:
        """Return the earlier stages that write a part."""
        stages = self._plan.stages
        return {name for name in ancestors if any(_writes(written, part) for written in stages[name].writes)}


def _writes(written: str, part: str) -> bool:
    """Return whether writing `written` changes `part`. `model:m` changes `model:m/3`, `view:v` changes `view:all`."""
    if is_path(part) or is_path(written):
        return is_path(part) and is_path(written) and covers(written, part)
    kind, _, name = part.partition(":")
    if kind == "view" and name == "all":
        return written.startswith("view:")
    return written in (part, f"{kind}:{name.partition('/')[0]}")
