"""`python -m cluster.node.ray_start start …`: Ray's own command, with two changes that Ray has no settings for.

- The raylet waits at most 15 s until its dashboard agent has written its port. On a busy machine the agent's imports
  take longer, and the node does not start. If the raylet gets the port as an option, it does not wait. `ray start` does
  not pass this option on.
- `ray start` passes the password of the GCS's Redis to processes as an option. Every user of the machine can read
  command lines. So here only the GCS gets the password, in its environment.

Two functions of Ray are wrapped. If a later release no longer calls them, the raylet waits as before, and Redis refuses
the GCS.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from ray._private import node, services
from ray.scripts.scripts import main as ray

from cluster.node.gcs_store import PASSWORD_FILE_VARIABLE, PASSWORD_VARIABLE, USER_VARIABLE
from cluster.security.private_file import read_secret_file

FROM_ENVIRONMENT = f"--fromenv={PASSWORD_VARIABLE.removeprefix('FLAGS_')}"
LISTEN_PORT = "--dashboard-agent-listen-port="
_start_process = services.start_ray_process
_session_key = vars(node)["get_session_key_from_storage"]


def main() -> None:
    """Run Ray's command."""
    user = os.environ.pop(USER_VARIABLE, "")
    file = os.environ.pop(PASSWORD_FILE_VARIABLE, None)
    password = read_secret_file(Path(file), what="the password of the GCS's Redis") if file else ""
    listen_port = next((text for text in sys.argv if text.startswith(LISTEN_PORT)), None)

    def start_process(command: list[str], *arguments: Any, **options: Any) -> Any:
        if command[0] == services.GCS_SERVER_EXECUTABLE:
            command = [*command, *gcs_options(user=user, password=password)]
            secret = {PASSWORD_VARIABLE: password} if password else {}
            options["env_updates"] = {**(options.get("env_updates") or {}), **secret}
        elif command[0] == services.RAYLET_EXECUTABLE and listen_port is not None:
            command = [*command, listen_port.replace("-", "_").replace("__", "--", 1)]
        return _start_process(command, *arguments, **options)

    def session_key(host: str, port: int, _user: str, _password: str, *rest: Any) -> Any:
        return _session_key(host, port, user, password, *rest)

    vars(services)["start_ray_process"] = start_process
    vars(node)["get_session_key_from_storage"] = session_key
    sys.exit(ray())  # type: ignore[no-untyped-call]


def gcs_options(*, user: str, password: str) -> list[str]:
    """Return the GCS's own options for its login. The password itself is not among them."""
    return [
        *([f"--redis_username={user}"] if user else []),
        *([FROM_ENVIRONMENT] if password else []),
    ]


if __name__ == "__main__":
    main()
