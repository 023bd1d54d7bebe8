"""Addresses for several hosts: unusable ones are refused before any process starts."""

import dataclasses
import json
import socket

import pytest

from configs import tiny_cpu, tiny_gpu
from eep_jax.runtime.control.endpoint import ENDPOINT
from launch import addresses
from launch.errors import UsageError
from tests.launch.test_flags import parse  # noqa: F401 (a fixture: flags as a command line)


@pytest.fixture
def config_with(tmp_path, monkeypatch):
    """`with_addresses` of tiny_cpu, with the supervisor at an address."""

    def made(mirror: str, supervisor: str = "127.0.0.1", **serve):
        monkeypatch.setattr(addresses, "_supervisor_host", lambda config, run_dir: supervisor)
        config = tiny_cpu.get_config()
        serve = dataclasses.replace(config.serve, mirror_host=mirror, **serve)
        return addresses.with_addresses(dataclasses.replace(config, serve=serve), tmp_path).serve

    return made


def test_one_host_needs_nothing(tmp_path):
    config = tiny_cpu.get_config()
    assert addresses.with_addresses(config, tmp_path) is config


def test_names_are_resolved_and_backups_are_served_there_too(config_with):
    serve = config_with("localhost")
    assert (serve.mirror_host, serve.backup_host) == ("127.0.0.1", "127.0.0.1")
    assert config_with("127.0.0.2").backup_host == "127.0.0.2"
    assert config_with("127.0.0.2", backup_host="127.0.0.3").backup_host == "127.0.0.3"


def test_auto_is_the_address_towards_the_supervisor(config_with):
    assert config_with("auto", "127.0.0.9").mirror_host == "127.0.0.1"
    with pytest.raises(UsageError, match="auto: the supervisor has not written its address yet"):
        config_with("auto", "")


def test_loopback_is_refused_where_the_supervisor_is_not_on_it(config_with):
    with pytest.raises(UsageError, match=r"localhost resolves to 127.0.0.1.*at 192.0.2.7.*hosts"):
        config_with("localhost", "192.0.2.7")


@pytest.mark.parametrize("wrong", ["0.0.0.0", "::"])
def test_all_interfaces_are_no_address_to_be_reached_at(config_with, wrong):
    with pytest.raises(UsageError, match="is a wildcard; give the address of one interface"):
        config_with(wrong)


def test_an_address_of_another_machine_is_refused(config_with):
    with pytest.raises(UsageError, match=r"192.0.2.1\) is not an address of this machine"):
        config_with("192.0.2.1", "192.0.2.7")


def test_an_unknown_host_name_is_refused(config_with, monkeypatch):
    def unknown(host):
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(addresses, "resolve", unknown)
    with pytest.raises(UsageError, match="nobody cannot be resolved: Name or service"):
        config_with("nobody")


def test_gpu_ranks_must_share_one_host(tmp_path):
    config = tiny_gpu.get_config()
    serve = dataclasses.replace(config.serve, mirror_host="10.0.0.1")
    with pytest.raises(UsageError, match="need platform cpu, the configuration has 'gpu'"):
        addresses.with_addresses(dataclasses.replace(config, serve=serve), tmp_path)


def test_the_run_directory_says_where_the_supervisor_is(tmp_path, parse):  # noqa: F811
    parse()
    config = tiny_cpu.get_config()
    assert addresses._supervisor_host(config, tmp_path) == ""
    (tmp_path / ENDPOINT).write_text(json.dumps({"host": "10.0.0.5", "port": 1}))
    assert addresses._supervisor_host(config, tmp_path) == "10.0.0.5"
    parse("--supervisor=10.0.0.6:77")
    assert addresses._supervisor_host(config, tmp_path) == "10.0.0.6"
