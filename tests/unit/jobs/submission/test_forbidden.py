"""Tests of what no caller may submit: forbidden modules, options, syntax and paths."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cluster.security.tokens.roles import Role
from feature_jobs.store.ingestion import files
from jobs.submission import paths
from jobs.submission.errors import JobForbidden
from jobs.submission.modules import COMMANDS, require_command
from jobs.submission.overrides import RESERVED
from jobs.submission.paths import PathRules

if TYPE_CHECKING:
    from tests.unit.jobs.submission.conftest import Service

INGEST = "feature_jobs.ingest"
FORBIDDEN = {
    "identity.role=admin": "reserved",
    "identity.token_file=/root/t.jwt": "reserved",
    "identity.issuer.url=https://mine": "reserved",
    "storage.root=/tmp/x": "reserved",
    "storage=s3": "reserved",
    "ledger.url=sqlite:///x": "reserved",
    "cluster.region=eu": "reserved",
    "placement.region=eu": "reserved",
    "secrets=vault": "reserved",
    "secrets.vault.address=https://mine": "reserved",
    "online.url=redis://mine": "reserved",
    "features.max_ahead_s=9": "reserved",
    "jobs.allowed_modules=[os]": "reserved",
    "tier=enterprise_gpu": "reserved",
    "identity={role: admin}": "reserved",
    "hydra.run.dir=/tmp": "hydra",
    "hydra.searchpath=[file:///tmp]": "hydra",
    "hydra={run: {dir: /tmp}}": "hydra",
    "hydra/launcher=x": "syntax",
    "+view=income": "syntax",
    "++identity.role=admin": "syntax",
    "~identity": "syntax",
    "model@identity=x": "syntax",
    "-m": "syntax",
    "--config-dir": "syntax",
    "--config-dir=/tmp": "syntax",
    "-cd=/tmp": "syntax",
    "view": "syntax",
    "view=a\nidentity.role=admin": "syntax",
    "view=a\u2028b": "syntax",
    "view=a\x00": "syntax",
    " identity.role=admin": "syntax",
    "view=${oc.env:HOME}": "interpolation",
    "view='${oc.env:HOME}'": "interpolation",
    r"view=\${oc.env:HOME}": "interpolation",
    "source.path=[${oc.env:RAY_AUTH_TOKEN_PATH}]": "interpolation",
    "num_buckets=1,2": "sweep",
    "num_buckets=range(1,9)": "sweep",
    "source.path=/etc/passwd": "path",
    "source.path='/etc/passwd'": "path",
    "source.path=../outside.parquet": "path",
    "source.path=data/../../outside.parquet": "path",
    "source.path=~/x.parquet": "path",
    "source.path=file:///etc/passwd": "path",
    "source.path=FILE:///etc/passwd": "path",
    "source.path=local:///etc/passwd": "path",
    "source.path=http://169.254.169.254/x": "path",
    "source.path=s3://other/x.parquet": "path",
    "source.path=simplecache::file:///etc/passwd": "path",
    "source.path=.falaj/keys/issuer.pem": "path",
    "source.path=.falaj": "path",
    "source.path=.falaj/jobs/../keys/issuer.pem": "path",
    "source.path=.": "path",
    "source.path=''": "path",
    "source.path=.env": "path",
    "source.path=data/.hidden/x.parquet": "path",
    "source.path=conf/pipeline/x.yaml": "path",
    "source.path=*": "path",
    "source.path=?falaj": "path",
    "source.path=**/*.pem": "path",
    "source.path=.fala[j]/keys/x": "path",
    "source.path=data/*/../../x": "path",
    "source.path=./~/.aws/credentials": "path",
    "source.path=.//~/x.parquet": "path",
    "source.path=file://./~root/x.parquet": "path",
    "source.path={storage}/keys/keyring.json": "path",
    "source.path=data/{storage}/x.parquet": "path",
    "source.path=alice.jw?": "path",
    "source.path=?env": "path",
    "source.path=conf/*": "path",
    "source.path=data/*.pem": "path",
    "view=[income,/etc/passwd]": "path",
    "view={/etc/passwd: 1}": "path",
    "definitions=os": "module of an option",
    "definitions=feature_jobs._private": "module of an option",
    "definitions=../evil": "module of an option",
}


@pytest.mark.parametrize("override", FORBIDDEN)
def test_forbidden_override_is_refused_and_recorded(service: Service, override: str) -> None:
    """The answer is 403 with one line. One event names option and rule, and never the value. No job is started."""
    status, content = service.call("POST", body={"module": INGEST, "overrides": ["view=income", override]})
    assert (status, content["code"]) == (403, 403)
    assert "\n" not in content["error"]
    refused = service.refusals()
    assert [event["rule"] for event in refused] == [FORBIDDEN[override]]
    assert (refused[0]["submitter"], refused[0]["role"]) == ("alice", "data_engineer")
    assert refused[0]["module"] == INGEST
    assert "/" not in refused[0]["option"]
    service.check()
    assert service.jobs.started == []


def test_every_section_of_the_platform_is_reserved_but_two() -> None:
    """A new section of the platform's settings is reserved without a change here."""
    assert {"tier", "identity", "ledger", "storage", "secrets", "cluster", "placement", "jobs"} <= RESERVED
    assert not {"scaling", "replica"} & RESERVED


@pytest.mark.parametrize(
    "module",
    [
        *("os", "subprocess", "cluster.up", "cluster.down", "jobs.submission.run_job", "jobs.schedule"),
        *("feature_jobs.quarantine", "feature_jobs.rotate_keys", "jobs.pipeline.traffic", "jobs.submit"),
        *("feature_jobs.census.source", "serve_apps.edge.limits", "cluster.security.manage_keys"),
        *(
            "feature_jobs.ingest ",
            "feature_jobs..ingest",
            "feature_jobs/ingest",
            "-c",
            "feature_jobs.__init__",
        ),
        *("shop._private", "shop.jobs\nx", "Feature_jobs.ingest", "x" * 300),
    ],
)
def test_forbidden_module_is_refused_and_recorded(new_service: Callable[..., Service], module: str) -> None:
    """Also if the operator has allowed the package of a private module."""
    service = new_service(allowed_modules=["shop.*"])
    status, content = service.call("POST", body={"module": module})
    assert (status, [event["rule"] for event in service.refusals()]) == (403, ["module"]), content
    assert len(service.refusals()[0]["module"]) < 200


def test_operators_own_modules_may_run() -> None:
    """A name allows one module, and `name.*` all modules in a package. Nothing allows the platform's other modules."""
    for module in ("shop", "shop.jobs.nightly", "check"):
        require_command(module, ["shop.*", "check"])
    for module in ("shopping", "check.more", "cluster.up"):
        with pytest.raises(JobForbidden):
            require_command(module, ["shop.*", "check", "cluster.*"])
    assert {"jobs.train", "jobs.score", "jobs.pipeline", "serve_apps.deploy", INGEST} <= COMMANDS


def test_pipeline_with_a_stage_that_no_job_may_run_is_refused(service: Service) -> None:
    """The demo's pipeline sends traffic with a token of its own. Its stages cannot be changed either."""
    for overrides in (["pipeline=census"], ["pipeline=census", "pipeline.stages.x.command=os"]):
        assert service.call("POST", body={"module": "jobs.pipeline", "overrides": overrides})[0] == 403
    choice = ["pipeline=../../x"]
    assert service.call("POST", body={"module": "jobs.pipeline", "overrides": choice})[0] == 403
    rules = [event["rule"] for event in service.refusals()]
    assert rules == ["module of a stage", "stages", "choice"]


def test_group_of_configurations_takes_the_name_of_a_choice_only(service: Service) -> None:
    """A path in place of a choice could load any YAML file of the head."""
    for choice in ("../pipeline/census", "{module: os}", "[lightgbm]", "null"):
        overrides = ["name=m", "training_set=t.parquet", "label=y", f"model={choice}"]
        body = {"module": "jobs.train", "overrides": overrides}
        assert service.call("POST", body=body, role=Role.data_scientist)[0] == 403, choice
    assert {event["rule"] for event in service.refusals()} == {"choice"}


def test_invalid_option_is_a_mistake_and_no_event(service: Service) -> None:
    """A wrong name, type or missing option gets 400 with the line that the command itself would print."""
    for override, named in (("veiw=income", "veiw"), ("num_buckets=many", "num_buckets"), ("view=[", "view")):
        status, content = service.call("POST", body={"module": INGEST, "overrides": [override]})
        assert (status, named in content["error"]) == (400, True), content
    status, content = service.call("POST", body={"module": "jobs.train"})
    assert (status, "`name=" in content["error"]) == (400, True), content
    assert service.refusals() == []


def test_too_many_refusals_get_429_without_an_event(service: Service) -> None:
    """A caller cannot fill the ledger. Another caller is not affected."""
    answers = [service.call("POST", body={"module": "os"})[0] for _ in range(33)]
    assert answers == [403] * 30 + [429] * 3
    assert len(service.refusals()) == 30
    assert service.call("POST", body={"module": "os"}, subject="bob")[0] == 403


@pytest.fixture
def rules(tmp_path: Path) -> PathRules:
    """Return the rules of a project with state in an object store, and with two allowed places."""
    project = tmp_path / "project"
    (project / "data").mkdir(parents=True)
    (tmp_path / "shared").mkdir()
    os.symlink("/etc", project / "etc")
    os.symlink(project / "data", project / "link")
    return PathRules(
        project=str(project),
        roots=("s3://bucket/falaj", str(project / ".falaj")),
        allowed=(str(tmp_path / "shared"), "s3://lake/raw"),
    )


@pytest.mark.parametrize(
    "text",
    [
        *("income", "data/x.parquet", "link/x.parquet", "Asia/Dubai", "data/*.parquet", "data/**/x.parquet"),
        *("2020-01-01T00:00:00", ".falaj/jobs/t.parquet", ".falaj/jobs", "../shared/x.parquet"),
        *("s3://bucket/falaj/jobs/t.parquet", "s3://lake/raw", "s3://lake/raw/x.parquet", "by command"),
        *("why?", "is v1.2 better?", "5 * 3 = 15", "s3://lake/raw/*/x.csv.gz"),
    ],
)
def test_texts_in_the_allowed_places_are_accepted(rules: PathRules, text: str) -> None:
    """Every text of an option is checked as a path. A text that is none looks like a file of the project."""
    rules.check(text, option="x")


@pytest.mark.parametrize(
    "text",
    [
        *("etc/passwd", "/etc/passwd", "../shared2/x", "../shared/../x", "data/../../x", ".falaj/ledger.db"),
        *("s3://bucket/falaj/features/income", "s3://bucket/falaj", "s3://bucket/other", "s3://lake/rawer/x"),
        *(
            "s3://lake/raw/../x",
            "s3://lake/raw::file:///etc/passwd",
            "data/code.py",
            "etc/*",
            ".falaj/x",
            ".falaj/demo/x",
        ),
        *(
            "s3://lake/raw//x",
            "s3://lake/raw/./x",
            "s3://lake/raw/x.pem",
            "s3://lake/raw/*",
            "s3://lake/raw/x.p?m",
        ),
        *(
            "./~root/x",
            ".//~/x",
            "file://.//~/x",
            "x.PE?",
            "data/x.p[y]",
            "*env",
            "[.]env",
            "conf/*l",
            "x.jwt*",
        ),
    ],
)
def test_texts_outside_the_allowed_places_are_refused(rules: PathRules, text: str) -> None:
    """Links count as what they point to."""
    with pytest.raises(JobForbidden, match="Option 'x'"):
        rules.check(text, option="x")


@pytest.mark.parametrize(
    "text", ["s3://bucket", "s3://bucket/", "s3://bucket/*/x.parquet", "s3://bucket/f*/x.json"]
)
def test_allowed_bucket_does_not_allow_the_state_in_it(tmp_path: Path, text: str) -> None:
    """A folder is read with all that is below it. So no folder or pattern may contain the storage root."""
    rules = PathRules(project=str(tmp_path), roots=("s3://bucket/falaj",), allowed=("s3://bucket",))
    rules.check("s3://bucket/raw/x.parquet", option="x")
    rules.check("s3://bucket/raw/*.parquet", option="x")
    with pytest.raises(JobForbidden, match="platform's own state"):
        rules.check(text, option="x")


def test_placeholder_of_sources_is_the_one_that_is_refused() -> None:
    """The job service does not import the reader of sources, so it has a copy of the text."""
    assert paths._STORAGE == files.STORAGE
