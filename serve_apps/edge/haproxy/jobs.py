"""Submitted jobs under `/v1/jobs`: the edge checks token, tenant and limits, and sends the request to the job service.

The job service decides what each role may do, so that every denial is an event. It listens on a socket in the cluster's
private folder. On a node that joined, the relay listens there, and passes the request on to the head.
"""

from __future__ import annotations

from serve_apps.edge.haproxy.answers import refuse

ACTION = "jobs"
BACKEND = "jobs"
_ID = "[A-Za-z0-9_-]{1,64}"


def paths() -> str:
    """Return rules that recognise the paths, and refuse wrong methods.

    `METH_GET` is also HEAD. The answer to HEAD ends at once here, but the service would go on with a followed log, and
    the next request on this connection would wait for its end.
    """
    return f"""    acl job_list path /v1/jobs
    acl job_one path_reg ^/v1/jobs/{_ID}$
    acl job_get method GET
    acl job_log path_reg ^/v1/jobs/{_ID}/logs$
    http-request set-var(txn.action) str({ACTION}) if job_list or job_one or job_log
    acl jobs var(txn.action) -m str {ACTION}
    {refuse(405, "This path takes GET and POST.")} hdr allow "GET, POST" if job_list !job_get !METH_POST
    {refuse(405, "This path takes GET and DELETE.")} hdr allow "GET, DELETE" if job_one !job_get !{{ method DELETE }}
    {refuse(405, "This path takes GET.")} hdr allow GET if job_log !job_get"""


def forwarding_rules() -> str:
    """Return rules for an authorised request. No later rule is evaluated for it."""
    return f"""    http-request set-var(txn.backend) str({BACKEND}) if jobs
    http-request set-var(txn.path) path if jobs
    http-request del-header cookie if jobs
    http-request allow if jobs"""


def backend(socket: str) -> str:
    """Return the backend of the job service. It never sends a request again, because a job might be submitted twice.

    A log that is followed may be silent for long. The service ends it before this timeout.
    """
    return f"""backend {BACKEND}
    retries 0
    timeout server 2m
    http-request set-timeout server 1h if {{ path_end /logs }}
    server jobs unix@{socket}
"""
