"""Settings of the running cluster that a command line cannot override.

Environment, region, issuer and tier decide what the policies allow and which tokens are valid. `cluster.up` records
these settings, and every process that attaches to the cluster uses the recorded values. A default is replaced by the
recorded value, a stricter environment is accepted, and a value that contradicts the recorded value is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.errors import ConfigError
from cluster.settings import ClusterConfig, IdentityConfig, IssuerConfig, PlatformConfig, Tier

if TYPE_CHECKING:
    from cluster.session import ClusterRecord

OUTSIDE_PRODUCTION = ("local", "test", "staging")
"""Environments that are not production, from the least to the most strict. Every other name is production."""


def apply_cluster_record(record: ClusterRecord, config: PlatformConfig) -> None:
    """Set environment, region, issuer and tier of a configuration from the cluster's record, in place.

    If a record of an earlier release lacks one of these fields, the configuration's own value stays.

    Raises:
        ConfigError: the configuration contradicts the record, or the tier refuses the development issuer and no other
            issuer is configured.
    """
    if record.policy_environment is not None:
        config.identity.environment = _environment(record.policy_environment, config.identity.environment)
    if record.region is not None and record.has_nodes:
        # Each node has its own region, and a job may come from a node with another one.
        config.cluster.region = record.region
    elif record.region is not None:
        config.cluster.region = _region(record.region, config.cluster.region)
    if record.issuer is not None:
        config.identity.issuer = _issuer(IssuerConfig(**record.issuer), config.identity.issuer)
    if Tier.enterprise_gpu in (config.tier, Tier(record.tier or config.tier.value)):
        if config.identity.issuer.url is None:
            raise ConfigError(
                f"Tier {Tier.enterprise_gpu.value} does not accept the development issuer, and identity.issuer.url is "
                "not set. Start the cluster with identity.issuer.url=https://… of your OIDC issuer."
            )
        config.tier = Tier.enterprise_gpu


def _environment(recorded: str, requested: str) -> str:
    if _strictness(requested) >= _strictness(recorded):
        return requested
    if requested != IdentityConfig().environment:
        raise _contradiction("identity.environment", requested, recorded)
    return recorded


def _strictness(environment: str) -> int:
    if environment in OUTSIDE_PRODUCTION:
        return OUTSIDE_PRODUCTION.index(environment)
    return len(OUTSIDE_PRODUCTION)


def _region(recorded: str, requested: str) -> str:
    if requested not in (recorded, ClusterConfig().region):
        raise _contradiction("cluster.region", requested, recorded)
    return recorded


def _issuer(recorded: IssuerConfig, requested: IssuerConfig) -> IssuerConfig:
    if requested not in (recorded, IssuerConfig()):
        raise _contradiction("identity.issuer.url", str(requested.url), str(recorded.url))
    return recorded


def _contradiction(name: str, requested: str, recorded: str) -> ConfigError:
    return ConfigError(
        f"{name}={requested} contradicts the running cluster, which was started with {recorded}. Leave it out "
        "here. To change it, run `python -m cluster.down`, then `python -m cluster.up` with the new value."
    )
