"""A run directory and its token, which are for their user alone: it holds prompts and a secret."""

import logging
import os
import pathlib
import secrets
import stat

from eep_jax.errors import RunDirError

TOKEN_FILE = "token"
TOKEN_CHARACTERS_MIN = 16
FILE_MODE, DIRECTORY_MODE = 0o600, 0o700

_log = logging.getLogger(__name__)


def make_run_dir(path: str | os.PathLike) -> pathlib.Path:
    """Makes a run directory, with its parents, or checks one that exists.

    Returns:
        Its absolute path.

    Raises:
        RunDirError: Other users can write to it, or it cannot be made.

    Example:
        >>> import tempfile
        >>> path = make_run_dir(pathlib.Path(tempfile.mkdtemp()) / "run")
        >>> stat.S_IMODE(path.stat().st_mode) == DIRECTORY_MODE
        True
    """
    found = pathlib.Path(path).absolute()
    try:
        if not found.is_dir():
            found.parent.mkdir(parents=True, exist_ok=True)
            found.mkdir(mode=DIRECTORY_MODE, exist_ok=True)
    except OSError as error:
        raise RunDirError(
            f"{found} cannot be a run directory: {error.filename}: {error.strerror}"
        ) from error
    check_run_dir(found)
    return found


def check_run_dir(path: pathlib.Path) -> None:
    """Takes the group's permission to write away.

    Raises:
        RunDirError: Every user can write to the directory, or the group can and it is not ours.
    """
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & stat.S_IWOTH:
        raise RunDirError(
            f"every user can write to {path} (mode {mode:04o}), and so replace its token or its "
            f"journal; take a directory of your own, or empty it and chmod {DIRECTORY_MODE:o} it"
        )
    if not mode & stat.S_IWGRP:
        return
    try:
        path.chmod(mode & ~stat.S_IWGRP)
    except OSError as error:
        raise RunDirError(
            f"the group of {path} can write to it (mode {mode:04o}), and so replace its token or "
            f"its journal; take a directory of your own, or chmod {DIRECTORY_MODE:o} it"
        ) from error
    _log.warning("took the permission to write to %s from its group", path)


def make_private_file(path: pathlib.Path) -> None:
    """Makes an empty file that only its user can read, or takes others' permissions away."""
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, FILE_MODE))
    if stat.S_IMODE(path.stat().st_mode) != FILE_MODE:
        path.chmod(FILE_MODE)


def make_token(run_dir: pathlib.Path) -> None:
    """Writes a new token, unless there is one. Raises OSError."""
    path = run_dir / TOKEN_FILE
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
    except FileExistsError:
        return
    try:
        with open(fd, "w") as file:
            file.write(secrets.token_urlsafe(32))
    except OSError:
        path.unlink()
        raise


def read_token(run_dir: pathlib.Path) -> str:
    """The token of a run.

    Raises:
        RunDirError: It is missing or too short, or other users could read or write it.
    """
    path = run_dir / TOKEN_FILE
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)) as file:
            found, token = os.fstat(file.fileno()), file.read().strip()
        around = run_dir.stat()
    except OSError as error:
        raise RunDirError(f"no token in {path}: {error.strerror}") from error
    mode = stat.S_IMODE(found.st_mode)
    if found.st_uid not in (os.geteuid(), around.st_uid):
        raise RunDirError(f"{path} belongs to another user ({found.st_uid}); write one of your own")
    if mode & 0o077:
        if stat.S_IMODE(around.st_mode) & 0o077 or found.st_uid != os.geteuid():
            raise RunDirError(
                f"other users can read or write {path} (mode {mode:04o}); write a new one with "
                f"mode {FILE_MODE:04o}, for they may know this one"
            )
        path.chmod(FILE_MODE)  # nobody could come to it
    if len(token) < TOKEN_CHARACTERS_MIN:
        raise RunDirError(
            f"the token in {path} has {len(token)} characters, at least {TOKEN_CHARACTERS_MIN} are "
            "needed"
        )
    return token
