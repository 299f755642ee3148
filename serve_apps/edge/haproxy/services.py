"""Submitted jobs under `/v1/jobs`, and rollouts under `/v1/rollouts/{model}`.

The edge checks token, tenant and limits, and sends the request to a service. The service decides what each role may do,
so that every denial is an event. Each service listens on a socket in the cluster's private folder.

The job service runs on the head; on a node that joined, the relay listens at its socket, and passes the request on to
the head. For rollouts, this machine's controller answers, also if another one acts, because all of them read the
ledger.
"""

from __future__ import annotations

from serve_apps.edge.haproxy.answers import refuse

JOBS, ROLLOUTS = "jobs", "rollouts"
"""Names of the actions, of the conditions in HAProxy's rules, and of the backends."""
_ID = "[A-Za-z0-9_-]{1,64}"


def paths(*, model_name: str) -> str:
    """Return rules that recognise the paths, and refuse wrong methods.

    `METH_GET` is also HEAD. The answer to HEAD ends at once here, but the service would go on with a followed log, and
    the next request on this connection would wait for its end.

    Args:
        model_name: Regular expression of a model's name.
    """
    return f"""    acl job_list path /v1/jobs
    acl job_one path_reg ^/v1/jobs/{_ID}$
    acl is_get method GET
    acl job_log path_reg ^/v1/jobs/{_ID}/logs$
    acl rollouts path_reg ^/v1/rollouts/{model_name}$
    http-request set-var(txn.action) str({JOBS}) if job_list or job_one or job_log
    http-request set-var(txn.action) str({ROLLOUTS}) if rollouts
    acl jobs var(txn.action) -m str {JOBS}
    {refuse(405, "This path takes GET and POST.")} hdr allow "GET, POST" if job_list !is_get !METH_POST
    {refuse(405, "This path takes GET and DELETE.")} hdr allow "GET, DELETE" if job_one !is_get !{{ method DELETE }}
    {refuse(405, "This path takes GET.")} hdr allow GET if job_log !is_get
    {refuse(405, "This path takes GET and POST.")} hdr allow "GET, POST" if rollouts !is_get !METH_POST"""


def forwarding_rules() -> str:
    """Return rules for an authorised request. No later rule is evaluated for it."""
    return "\n".join(
        f"""    http-request set-var(txn.backend) str({service}) if {service}
    http-request set-var(txn.path) path if {service}
    http-request del-header cookie if {service}
    http-request allow if {service}"""
        for service in (JOBS, ROLLOUTS)
    )


def backends(*, jobs_socket: str, rollouts_socket: str) -> str:
    """Return the backends of the services. They never send a request again, because a change might be made twice.

    A log that is followed may be silent for long. The service ends it before this timeout.
    """
    return f"""backend {JOBS}
    retries 0
    timeout server 2m
    http-request set-timeout server 1h if {{ path_end /logs }}
    server jobs unix@{jobs_socket}

backend {ROLLOUTS}
    retries 0
    timeout server 1m
    server rollouts unix@{rollouts_socket}
"""
