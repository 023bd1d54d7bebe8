"""Secrets and texts are for their user alone; files that others may have touched are refused."""

import stat

import pytest

from eep_jax.errors import RunDirError
from eep_jax.runtime.control.run_dir import (
    check_run_dir,
    make_private_file,
    make_run_dir,
    make_token,
    read_token,
)

TOKEN = "a token that is long enough"


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def a_token(directory, token_mode: int, directory_mode: int = 0o755):
    (directory / "token").write_text(TOKEN + "\n")
    (directory / "token").chmod(token_mode)
    directory.chmod(directory_mode)
    return directory


def test_a_new_one_is_private_with_all_that_is_made_in_it(tmp_path):
    found = make_run_dir(tmp_path / "runs" / "one")
    make_token(found)
    make_private_file(found / "log")
    assert [mode(p) for p in (found, found / "token", found / "log")] == [0o700, 0o600, 0o600]
    token = read_token(found)
    assert len(token) >= 32
    make_token(make_run_dir(found))
    assert read_token(found) == token


@pytest.mark.parametrize("open_mode", [0o777, 0o1777, 0o702])
def test_a_directory_that_all_can_write_to_is_refused_with_the_way_out(tmp_path, open_mode):
    tmp_path.chmod(open_mode)
    with pytest.raises(RunDirError, match=rf"{tmp_path} \(mode {open_mode:04o}\).*chmod 700"):
        make_run_dir(tmp_path)
    assert mode(tmp_path) == open_mode


def test_the_group_loses_its_permission_to_write(tmp_path, caplog):
    tmp_path.chmod(0o775)
    check_run_dir(tmp_path)
    assert mode(tmp_path) == 0o755 and "from its group" in caplog.text


@pytest.mark.parametrize("token_mode", [0o644, 0o660, 0o602, 0o604])
def test_a_token_that_others_could_read_or_write_is_refused(tmp_path, token_mode):
    with pytest.raises(RunDirError, match=rf"mode {token_mode:04o}.*they may know this one"):
        read_token(a_token(tmp_path, token_mode))


def test_a_token_behind_a_closed_door_is_made_private(tmp_path):
    assert read_token(a_token(tmp_path, 0o644, 0o700)) == TOKEN
    assert mode(tmp_path / "token") == 0o600


def test_a_log_that_others_could_read_is_made_private(tmp_path):
    log = tmp_path / "log"
    log.write_text("before")
    log.chmod(0o644)
    make_private_file(log)
    assert mode(log) == 0o600 and log.read_text() == "before"


def test_a_token_that_is_a_link_missing_or_short_is_refused(tmp_path):
    with pytest.raises(RunDirError, match="No such file"):
        read_token(tmp_path)
    (tmp_path / "elsewhere").write_text(TOKEN)
    (tmp_path / "token").symlink_to("elsewhere")
    with pytest.raises(RunDirError, match="no token in"):
        read_token(tmp_path)
    (tmp_path / "token").unlink()
    (tmp_path / "token").write_text("short")
    with pytest.raises(RunDirError, match="has 5 characters, at least 16"):
        read_token(a_token_kept(tmp_path))


def a_token_kept(directory):
    (directory / "token").chmod(0o600)
    return directory


def test_a_file_in_the_place_of_a_directory_is_an_error_in_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(RunDirError, match="cannot be a run directory"):
            make_run_dir(path)
