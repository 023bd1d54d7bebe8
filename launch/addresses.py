"""The addresses at which ranks of several hosts reach each other, checked before use."""

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
    """`config` with addresses that other hosts can use, where ranks are on several hosts.

    Names are resolved, and `auto` is the address from which this host reaches the supervisor.
    Backups are served where the mirror is, unless they have an address of their own. Raises
    UsageError for an address that other hosts could not use.
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
    if backup == ServeConfig.backup_host:  # nobody chose one, and no other host could reach it
        backup = mirror
    serve = dataclasses.replace(serve, mirror_host=mirror, backup_host=backup)
    return dataclasses.replace(config, serve=serve)


def reachable_address(host: str, supervisor: str) -> str:
    """The numeric address that `host` stands for.

    Raises UsageError where it is unknown, not of this machine, or no address that another host
    could use. Loopback will do while the supervisor, an address or "", is on loopback, too: then
    all is one machine.
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
    """True. Raises UsageError for an address that is not this machine's, or all of its own."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        if address in ("0.0.0.0", "::"):
            raise UsageError(f"{given} is no address to be reached at; give that of one interface")
        try:
            probe.bind((address, 0))
        except OSError as error:
            raise UsageError(
                f"{given} ({address}) is no address of this machine: {error.strerror}; "
                "`ip -brief address` lists those there are"
            ) from error
    return True


def _supervisor_host(config: RunConfig, run_dir: pathlib.Path) -> str:
    """Name or address of the supervisor; "" if it did not write yet where it is."""
    address = flags.supervisor_address(config)
    if address is not None:
        return address.host
    try:
        return json.loads((run_dir / ENDPOINT).read_text())["host"]
    except (OSError, ValueError, LookupError):
        return ""


def _address_towards(supervisor: str) -> str:
    """The own address of packets to the supervisor. Raises UsageError where there is no way."""
    given = f"--mirror_host={AUTO}"
    if not supervisor:
        raise UsageError(
            f"{given}: the supervisor did not write its address yet; give --supervisor=HOST:PORT"
        )
    try:
        address = resolve(supervisor)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing: it only chooses a route
            return probe.getsockname()[0]
    except OSError as error:
        raise UsageError(f"{given}: no way to the supervisor at {supervisor}: {error}") from error


def _is_local(supervisor: str) -> bool:
    try:
        return not supervisor or is_loopback(resolve(supervisor))
    except OSError:
        return False
