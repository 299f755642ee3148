"""`python -m cluster.node.start_serve`: start Serve's controller on the running head; a program of `cluster.up`.

It is a process of its own, because whoever attaches to Ray stays its driver until it ends.
"""

from __future__ import annotations

import argparse
import logging

import ray
from ray import serve
from ray.serve.config import HTTPOptions

from cluster.session import NAMESPACE


def main() -> None:
    """Start it in throughput mode: no application yet, so no HTTP."""
    parser = argparse.ArgumentParser(description="Start Serve's controller.")
    parser.add_argument("--address", required=True, help="of the head")
    parser.add_argument("--http-port", required=True, type=int, help="where Serve's own proxy listens")
    arguments = parser.parse_args()
    ray.init(arguments.address, namespace=NAMESPACE, logging_level=logging.WARNING, log_to_driver=False)
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=arguments.http_port))


if __name__ == "__main__":
    main()
