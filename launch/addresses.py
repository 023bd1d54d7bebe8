"""Addresses by which ranks of several hosts reach each other, checked before use."""

import dataclasses
import json
import pathlib
import socket

from eep_jax.config import RunConfig, ServeConfig
from eep_jax.runtime.control.endpoint import ENDPOINT
from launch import flags
from launch.environments.environment import is_loopback, resolve
from launch.errors import UsageError

AUTO = "auto"


def with_addresses(config: RunConfig, run_dir: pathlib.Path) -> RunConfig:
    """`config` with addresses that other hosts can use, if ranks are on several hosts.

    Names are resolved; `auto` is the source address of this host's route to the supervisor. Backups
    are served at the mirror's address, unless they have their own.

    Raises:
        UsageError: Other hosts could not use an address.
    """
    serve = config.serve
    if not serve.mirror_host:
        return config
    if config.platform != "cpu":
        raise UsageError(
            f"--mirror_host={serve.mirror_host}: ranks on several hosts need platform cpu, the "
            f"configuration has {config.platform!r}; GPU ranks must share one host"
        )
    supervisor = _supervisor_host(config, run_dir)
    if serve.mirror_host == AUTO:
        mirror = _address_towards(supervisor)
    else:
        mirror = reachable_address(serve.mirror_host, supervisor)
    backup = serve.backup_host
    if backup == ServeConfig.backup_host:  # the default, which no other host could reach
        backup = mirror
    serve = dataclasses.replace(serve, mirror_host=mirror, backup_host=backup)
    return dataclasses.replace(config, serve=serve)


def reachable_address(host: str, supervisor: str) -> str:
    """The numeric address of `host`, which other hosts can use.

    Loopback is accepted if the supervisor (an address, or "" if unknown) is on loopback too: then
    all hosts are one machine.

    Raises:
        UsageError: `host` is unknown, not an address of this machine, or unreachable for others.
    """
    given = f"--mirror_host={host}"
    try:
        address = resolve(host)
    except OSError as error:
        raise UsageError(f"{given} cannot be resolved: {error}") from error
    if is_loopback(address) and not (_is_local(supervisor) and _can_bind(address, given)):
        raise UsageError(
            f"{given} resolves to {address}, which no other host can reach, and the supervisor is "
            f"at {supervisor}; give the address of one interface, or --mirror_host={AUTO} (a "
            "host's own name often resolves to loopback: see /etc/hosts)"
        )
    _can_bind(address, given)
    return address


def _can_bind(address: str, given: str) -> bool:
    """True. Raises UsageError for an address of another machine, or a wildcard."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        if address in ("0.0.0.0", "::"):
            raise UsageError(f"{given} is a wildcard; give the address of one interface")
        try:
            probe.bind((address, 0))
        except OSError as error:
            raise UsageError(
                f"{given} ({address}) is not an address of this machine: {error.strerror}; "
                "`ip -brief address` lists its addresses"
            ) from error
    return True


def _supervisor_host(config: RunConfig, run_dir: pathlib.Path) -> str:
    """Name or address of the supervisor; "" if it has not written its endpoint yet."""
    address = flags.supervisor_address(config)
    if address is not None:
        return address.host
    try:
        return json.loads((run_dir / ENDPOINT).read_text())["host"]
    except (OSError, ValueError, LookupError):
        return ""


def _address_towards(supervisor: str) -> str:
    """Source address of packets to the supervisor. Raises UsageError without a route."""
    given = f"--mirror_host={AUTO}"
    if not supervisor:
        raise UsageError(
            f"{given}: the supervisor has not written its address yet; give --supervisor=HOST:PORT"
        )
    try:
        address = resolve(supervisor)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing: it only chooses a route
            return probe.getsockname()[0]
    except OSError as error:
        raise UsageError(f"{given}: no route to the supervisor at {supervisor}: {error}") from error


def _is_local(supervisor: str) -> bool:
    try:
        return not supervisor or is_loopback(resolve(supervisor))
    except OSError:
        return False
