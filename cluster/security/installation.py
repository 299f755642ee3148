"""What a running cluster is, whatever a job's command line says of it.

Environment, region, issuer and tier decide what the policies allow and whose tokens are believed. `cluster.up` writes
them down, and everything that attaches to the cluster is held to that: what a command line leaves at its default is
taken from the record, a stricter environment is anybody's to ask for, and what contradicts the record is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cluster.errors import ConfigError
from cluster.settings import ClusterConfig, IdentityConfig, IssuerConfig, PlatformConfig, Tier

if TYPE_CHECKING:
    from cluster.session import ClusterRecord

OUTSIDE_PRODUCTION = ("local", "test", "staging")
"""Ascending in what the policies ask; every other environment is production."""


def hold_to(record: ClusterRecord, config: PlatformConfig) -> None:
    """Make a configuration that of the cluster it is used on, in place.

    Records of an earlier release say nothing of it: there the configuration's own words count.

    Raises:
        ConfigError: it contradicts the record; or the tier does not believe the dev issuer, and no other is named.
    """
    if record.policy_environment is not None:
        config.identity.environment = _environment(record.policy_environment, config.identity.environment)
    if record.region is not None:
        config.cluster.region = _region(record.region, config.cluster.region)
    if record.issuer is not None:
        config.identity.issuer = _issuer(IssuerConfig(**record.issuer), config.identity.issuer)
    if Tier.enterprise_gpu in (config.tier, Tier(record.tier or config.tier.value)):
        if config.identity.issuer.url is None:
            raise ConfigError(
                f"Tier {Tier.enterprise_gpu.value} does not believe the dev issuer, and identity.issuer.url names no "
                "other. Start the cluster with identity.issuer.url=https://… of your OIDC issuer."
            )
        config.tier = Tier.enterprise_gpu


def _environment(cluster: str, asked: str) -> str:
    if _strictness(asked) >= _strictness(cluster):
        return asked
    if asked != IdentityConfig().environment:
        raise _contradiction("identity.environment", asked, cluster)
    return cluster


def _strictness(environment: str) -> int:
    known = environment in OUTSIDE_PRODUCTION
    return OUTSIDE_PRODUCTION.index(environment) if known else len(OUTSIDE_PRODUCTION)


def _region(cluster: str, asked: str) -> str:
    if asked not in (cluster, ClusterConfig().region):
        raise _contradiction("cluster.region", asked, cluster)
    return cluster


def _issuer(cluster: IssuerConfig, asked: IssuerConfig) -> IssuerConfig:
    if asked not in (cluster, IssuerConfig()):
        raise _contradiction("identity.issuer.url", str(asked.url), str(cluster.url))
    return cluster


def _contradiction(name: str, asked: str, cluster: str) -> ConfigError:
    return ConfigError(
        f"{name}={asked} contradicts the running cluster, which was started with {cluster}. Leave it out here; it is "
        "changed by `python -m cluster.down` and a new `python -m cluster.up`."
    )
