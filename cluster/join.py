"""`python -m cluster.join head=10.0.0.1:8403 token_file=node.join cluster.address=10.0.0.2`: join a cluster.

This machine becomes a node of the cluster: it runs Ray tasks and replicas, with its own certificate. The head gives it
the cluster's settings. Only settings of the machine itself can be given here: `cluster.…`, `storage.local`, and with
`vault=true` the login to Vault. Files that a setting names, such as a password file, must be at the same path on every
node.
"""

from __future__ import annotations

import re
import socket
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import MISSING

from cluster.entrypoint import compose_platform, job
from cluster.errors import ClusterAlreadyUp, ConfigError
from cluster.host.this_node import forget_node, is_loopback
from cluster.membership import join_token
from cluster.membership.admission import Application, new_key_and_request
from cluster.membership.departure import leave_membership
from cluster.membership.head_client import HeadClient, first_request
from cluster.membership.release import release
from cluster.membership.transport import client_context, node_context, split_address
from cluster.node.checks import (
    refuse_variables,
    require_compiler,
    require_free_ports,
    require_own_address,
)
from cluster.node.description import all_ports, describe_machine
from cluster.node.edge_address import edge_hosts
from cluster.node.join_checks import check_clock, check_own_vault, check_shared_state
from cluster.node.launch import (
    answers_http,
    edge_log,
    end_all,
    key_log,
    overrides,
    remove_folders,
    rollouts_log,
    shared_overrides,
    start_process,
    start_ray_node,
    supervisor_log,
    uploader_log,
    wait_until,
)
from cluster.node.locks import command_lock, is_watched_by
from cluster.node.log_uploads import announce_node, upload_logs
from cluster.node.parts import (
    EDGE,
    RELAY,
    ROLLOUTS,
    SUPERVISOR,
    UPLOADER,
    State,
    inspect_parts,
    states_by_name,
)
from cluster.node.scheduling import wait_for_turn
from cluster.security.private_folder import ensure_private_folder, remove_access_of_others
from cluster.security.tls.certificates import (
    CA_NAME,
    EDGE_NAME,
    NODE_CERTIFICATE_NAME,
    NODE_KEY_NAME,
    is_foreign_authority,
    require_addresses,
)
from cluster.security.tokens.issuer import PRIVATE_NAME, replace_private_file
from cluster.session import ClusterRecord, find_own_record, write_record
from cluster.settings import PlatformConfig
from cluster.storage import layout, local, resolve
from cluster.supervisor.daemons import save_commands

OWN_SETTINGS = ("cluster.", "storage.local=")
NEEDED_PORTS = (
    "ray_metrics",
    "dashboard",
    "serve_http",
    "replicas",
    "supervisor_metrics",
    "broker_metrics",
    "uploader_metrics",
)
OWN_LOGIN = tuple(
    f"secrets.vault.{name}=" for name in ("auth", "role", "secret_file", "auth_mount", "ca_file")
)
"""Settings of a node's own login to Vault. The others say which keys these are, so they are the head's."""
EDGE_PORTS = ("edge", "edge_metrics", "edge_controller_metrics")
_FROM_HEAD = re.compile(r"\+\+(cluster\.(?!ports\.|tls=)|storage\.local=|identity\.supervisor_token_file=)")
"""Settings of the head that are its own. Ports are taken over, because Serve needs the same ones on all nodes."""
_ARGUMENT = re.compile(r"\+{0,2}(?P<option>[A-Za-z_][\w.]*)=")


@dataclass(kw_only=True, slots=True)
class JoinConfig(PlatformConfig):
    """Configuration of this command."""

    head: str = MISSING
    token_file: str = MISSING
    name: str | None = None
    edge: bool = False
    vault: bool = False


@job("join", JoinConfig, uses_recorded_places=False)
def main(config: JoinConfig) -> None:
    """Join, or refuse in one line."""
    forget_node()
    wait_for_turn()
    own = own_settings(HydraConfig.get().overrides.task, vault=config.vault)
    with command_lock(config.storage):
        end_earlier_node(config)
        join(config, own)


def own_settings(arguments: list[str], *, vault: bool = False) -> list[str]:
    """Return the options of the command line that are settings of this machine.

    Args:
        arguments: the command line.
        vault: whether this machine has its own login to Vault.

    Raises:
        ConfigError: another option is given. The head decides it for all nodes.
    """
    own = []
    for argument in arguments:
        option = match["option"] if (match := _ARGUMENT.match(argument)) else argument
        if argument.lstrip("+").startswith(OWN_SETTINGS + (OWN_LOGIN if vault else ())):
            own.append(f"++{argument.lstrip('+')}")
        elif argument.lstrip("+").startswith(OWN_LOGIN):
            raise ConfigError(
                f"Option {option} needs vault=true: without it, the node gets keys from the head."
            )
        elif option not in ("head", "token_file", "name", "edge", "vault"):
            raise ConfigError(
                f"Option {option} is a setting of the whole cluster: the head decides it. Leave it out here."
            )
    return own


def end_earlier_node(config: PlatformConfig) -> None:
    """End what is left of an earlier membership, for example after a reboot.

    Raises:
        ClusterAlreadyUp: this machine is the head of a cluster, or is a node already.
    """
    record = find_own_record(config.storage)
    if record is None:
        return
    if record.node_id is None:
        raise ClusterAlreadyUp(
            f"The folder {record.layout.disk} has a cluster of its own. Run `python -m cluster.down` there first, or "
            "set storage.local to another folder."
        )
    if not record.starting and any(status.state is not State.dead for status in inspect_parts(record)):
        raise ClusterAlreadyUp(
            f"This machine is already node {record.node_id} of the cluster at {record.head}. `python -m cluster.up` "
            "starts missing parts; to join again, run `python -m cluster.leave` first."
        )
    end_all(record)
    remove_folders(record)


def join(config: JoinConfig, own: list[str]) -> None:
    """Ask the head, then start this machine's parts. If that fails, everything is undone."""
    started = time.perf_counter()
    check(config)
    key, answer = ask_head(config)
    ahead_s = time.time() - float(answer["time"])
    node = compose_node(answer, own, disk=layout(config.storage).disk)
    record = describe_machine(
        node,
        cluster_id=answer["cluster_id"],
        ray_address=answer["ray_address"],
        node_id=answer["node_id"],
        head=config.head,
    )
    record = replace(
        record, has_edge=config.edge, own_vault=config.vault, overrides=shared_overrides(node, record)
    )
    is_announced = False
    try:
        write_files(record, key, answer)
        # Written before anything runs: if this start is killed, the next command can end the processes that it left.
        write_record(replace(record, starting=True), node.storage)
        check_clock(ahead_s)
        check_shared_state(node, record)
        if config.vault:
            check_own_vault(node)
        is_announced = True  # its logs count from here on
        start_parts(node, record)
    except BaseException:
        end_all(record)
        if is_announced:
            upload_logs(node, record)
        leave_membership(record, node, reason="failed")
        remove_folders(record)
        raise
    HeadClient.of(record).request("report", parts=states_by_name(inspect_parts(record)))
    print(f"joined as node {record.node_id} ({own_name(config)}) after {time.perf_counter() - started:.0f} s")


def own_name(config: JoinConfig) -> str:
    """Return this machine's name in the cluster."""
    return config.name or socket.gethostname()


def ask_head(config: JoinConfig) -> tuple[bytes, dict[str, Any]]:
    """Return this machine's new private key as PEM, and the head's answer to the request to join.

    Raises:
        ConfigError: the token cannot be read, or nothing answers at the address.
        FalajError: the head's refusal.
    """
    token = join_token.read(Path(resolve(config.token_file)))
    key, signing_request = new_key_and_request(own_name(config))
    application = Application(
        token=token.text,
        release=release(),
        name=own_name(config),
        address=config.cluster.address,
        region=config.cluster.region,
        num_cpus=config.cluster.num_cpus,
        num_gpus=config.cluster.num_gpus,
        edge=config.edge,
        signing_request=signing_request,
    )
    tls = local(layout(config.storage).tls)
    has_certificate = is_foreign_authority(tls / CA_NAME)
    answer = first_request(
        config.head,
        node_context(tls) if has_certificate else client_context(authority=token.authority),
        {"op": "join", **asdict(application)},
        own_address=config.cluster.address,
    )
    return key, answer


def check(config: JoinConfig) -> None:
    """Check this machine before the head is asked.

    Raises:
        ConfigError: `cluster.address` or `head` is invalid, the folder has keys of another cluster, or this machine's
            certificate lacks its address.
        PortInUse: a port is in use.
        CompilerMissing: no C++ compiler is installed.
    """
    refuse_variables()
    require_compiler()
    split_address(config.head)
    if is_loopback(config.cluster.address):
        raise ConfigError(
            "cluster.address is loopback, where the head cannot reach this machine. Add "
            f"cluster.address={address_towards(config.head)}."
        )
    require_own_address("cluster.address", config.cluster.address)
    if config.edge:
        require_own_address("cluster.edge_host", edge_hosts(config.cluster)[0])
    keys, tls = local(layout(config.storage).keys), local(layout(config.storage).tls)
    if is_foreign_authority(tls / CA_NAME):
        require_addresses(tls / NODE_CERTIFICATE_NAME, [config.cluster.address])
    if (keys / PRIVATE_NAME).exists():
        raise ConfigError(f"{keys} has the keys of another cluster. Set storage.local to another folder.")
    needed = NEEDED_PORTS + (EDGE_PORTS if config.edge else ())
    ports = {name: port for name, port in all_ports(config).items() if name in needed}
    require_free_ports(ports, config.cluster)


def address_towards(head: str) -> str:
    """Return the address with which this machine reaches the head, or a description of it. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(split_address(head))
        except OSError:
            return "<address of this machine in the network of the head>"
        return str(probe.getsockname()[0])


def compose_node(answer: dict[str, Any], own: list[str], *, disk: str) -> PlatformConfig:
    """Return the node's configuration: the head's settings, and this machine's own.

    Args:
        answer: the head's answer.
        own: settings of this machine, as overrides.
        disk: folder of this machine's own state.
    """
    shared = [text for text in answer["overrides"] if not _FROM_HEAD.match(text)]
    mine = [text for text in own if not text.startswith("++storage.local=")]
    return compose_platform([*shared, *overrides("storage.local", disk), *mine])


def write_files(record: ClusterRecord, key: bytes, answer: dict[str, Any]) -> None:
    """Write the certificates, and the secrets that all nodes share, to this machine's own folder."""
    places = record.layout
    tls, keys = local(places.tls), local(places.keys)
    for folder in (Path(places.disk), tls, keys, local(places.edge), local(places.runs)):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        remove_access_of_others(folder)
    ensure_private_folder(Path(record.runtime_folder))
    if answer["certificate"] is not None:
        certificate = answer["certificate"].encode()
        replace_private_file(tls / NODE_KEY_NAME, key)
        replace_private_file(tls / NODE_CERTIFICATE_NAME, certificate, mode=0o644)
        replace_private_file(tls / EDGE_NAME, certificate + key)
        replace_private_file(tls / CA_NAME, answer["authority"].encode(), mode=0o644)
    for name, text in answer["files"].items():
        public = name.endswith((".json", ".pub.pem"))
        replace_private_file(keys / name, text.encode(), mode=0o644 if public else 0o600)


def start_parts(config: PlatformConfig, record: ClusterRecord) -> None:
    """Start the key broker, Ray, the edge and the supervisor, and wait until they run.

    Raises:
        StartFailed: a part did not start.
    """
    announce_node(config, record)
    broker = start_process(config, record, RELAY, log=key_log(config))
    wait_until(broker, Path(record.key_socket).exists, name="key broker", log=key_log(config))
    start_ray_node(config, record)
    save_commands(record)
    start_process(config, record, UPLOADER, log=uploader_log(config))
    if record.has_edge:
        edge = start_process(config, record, EDGE, log=edge_log(config))
        start_process(config, record, ROLLOUTS, log=rollouts_log(config))
        wait_until(edge, lambda: answers_http(record.metrics_url), name="edge", log=edge_log(config))
    write_record(record, config.storage)
    supervisor = start_process(config, record, SUPERVISOR, log=supervisor_log(config))
    watches = lambda: is_watched_by(config.storage, supervisor.pid)  # noqa: E731
    wait_until(supervisor, watches, name="supervisor", log=supervisor_log(config))


if __name__ == "__main__":
    main()
