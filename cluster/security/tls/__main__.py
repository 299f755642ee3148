"""Show, renew and issue certificates.

python -m cluster.security.tls show
python -m cluster.security.tls renew
python -m cluster.security.tls node --name worker-1 --ip 10.0.0.7 --output /etc/falaj/tls
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cryptography import x509

from cluster.entrypoint import refuse
from cluster.errors import ConfigError, RefusedError
from cluster.security.tls.certificates import (
    CA_NAME,
    EDGE_NAME,
    NODE_CERTIFICATE_NAME,
    ensure_tls,
    write_node_certificate,
)
from cluster.settings import StorageConfig
from cluster.storage import layout, local


def _describe(folder: Path) -> str:
    """Return one line per certificate: file, expiry, and names."""
    lines = []
    for name in (CA_NAME, EDGE_NAME, NODE_CERTIFICATE_NAME):
        if not (folder / name).exists():
            raise ConfigError(f"No certificate at {folder / name}. Run `python -m cluster.up` first.")
        certificate = x509.load_pem_x509_certificate((folder / name).read_bytes())
        lines.append(f"{name:9} until {certificate.not_valid_after_utc:%Y-%m-%d}  {_names(certificate)}")
    return "\n".join(lines)


def _names(certificate: x509.Certificate) -> str:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return certificate.subject.rfc4514_string()
    return ", ".join(dict.fromkeys(str(name.value) for name in names))


def main() -> None:
    """Parse the flags and run the command."""
    parser = argparse.ArgumentParser(prog="python -m cluster.security.tls", description="Certificates.")
    parser.add_argument(
        "--root", default=".falaj", help="storage root (default: .falaj below the project root)"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("show", help="show the certificates and their expiry")
    commands.add_parser("renew", help="create new certificates of this machine, from the same authority")
    node = commands.add_parser("node", help="create a certificate for another machine of the cluster")
    node.add_argument("--name", required=True, help="its host name")
    node.add_argument("--ip", required=True, action="append", help="its address; may be repeated")
    node.add_argument("--output", required=True, type=Path, help="folder to write to")
    arguments = parser.parse_args()
    try:
        folder = local(layout(StorageConfig(root=arguments.root)).tls)
        if arguments.command == "node":
            write_node_certificate(
                arguments.output, authority=folder, name=arguments.name, addresses=arguments.ip
            )
            return
        if arguments.command == "renew":
            ensure_tls(layout(StorageConfig(root=arguments.root)), renew=True)
        print(_describe(folder))
    except RefusedError as error:
        refuse(error)


if __name__ == "__main__":
    main()
