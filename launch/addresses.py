"""The addresses at which processes of several hosts reach each other, checked before use."""

import dataclasses
import ipaddress
import pathlib
import socket
import urllib.parse

from eep_jax.config import RunConfig, ServeConfig
from eep_jax.runtime.endpoint import find_supervisor
from launch import flags


def with_addresses(config: RunConfig, run_dir: pathlib.Path) -> RunConfig:
    """`config` with addresses that other hosts can use, where ranks are on several hosts.

    Names are resolved; backups are served where the mirror is, unless they have an address of
    their own. Raises UsageError for an address that other hosts could not use.
    """
    serve = config.serve
    if not serve.mirror_host:
        return config
    if config.platform != "cpu":
        raise flags.UsageError(
            f"--mirror_host={serve.mirror_host}: ranks on several hosts need platform cpu, the "
            f"configuration has {config.platform!r}; GPU ranks must share one host"
        )
    supervisor = _supervisor_host(run_dir)
    mirror = reachable_address("--mirror_host", serve.mirror_host, supervisor)
    backup = serve.backup_host
    if backup == ServeConfig.backup_host:  # nobody chose one, and no other host could reach it
        backup = mirror
    serve = dataclasses.replace(serve, mirror_host=mirror, backup_host=backup)
    return dataclasses.replace(config, serve=serve)


def reachable_address(name: str, host: str, supervisor: str) -> str:
    """The IP address that `host` stands for.

    Raises UsageError where it is unknown, not of this machine, or no address that another host
    could use. Loopback will do while the supervisor is on loopback, too: then all is one machine.
    """
    address = resolve(name, host)
    if address.is_unspecified:
        raise flags.UsageError(
            f"{name}={host} is no address to be reached at; give one address of an interface"
        )
    if address.is_loopback and not _is_loopback(supervisor):
        raise flags.UsageError(
            f"{name}={host} resolves to {address}, which only this host reaches, but the "
            f"supervisor is at {supervisor}; give the address of an interface that other hosts "
            "reach (a host's own name often resolves to loopback: see /etc/hosts)"
        )
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((str(address), 0))
        except OSError as error:
            raise flags.UsageError(
                f"{name}={host} ({address}) is no address of this machine: {error.strerror}; "
                "`ip -brief address` lists those there are"
            ) from error
    return str(address)


def resolve(name: str, host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The first address of `host`. Raises UsageError for a name that nobody knows."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise flags.UsageError(f"{name}={host} cannot be resolved: {error}") from error
    return ipaddress.ip_address(found[0][4][0].partition("%")[0])


def _supervisor_host(run_dir: pathlib.Path) -> str:
    from eep_jax.runtime.supervisor_files import ENDPOINT

    try:
        url = find_supervisor(run_dir / ENDPOINT, flags.SUPERVISOR.value)
    except (OSError, ValueError, LookupError):
        return ""  # it did not start yet, and will be on this host: the directory is shared
    return urllib.parse.urlsplit(url).hostname or ""


def _is_loopback(host: str) -> bool:
    return not host or resolve("--supervisor", host).is_loopback
