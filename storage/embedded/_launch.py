"""Becomes an embedded server: what must happen between fork and exec, as a program of its own.

Usage: python -I -S _launch.py PARENT_PID DEATH_SIGNAL IDENTITY DIRECTORY COMMAND [ARGUMENT ...]

It takes on IDENTITY, asks the kernel for DEATH_SIGNAL when the parent dies, and replaces itself by
COMMAND, so that the server keeps this process's pid. A program, not a `preexec_fn`: that would run
Python in a forked copy of a process that may have threads (gRPC's, for one).

IDENTITY is one of
    self      stay who we are;
    userns    a user namespace in which our own uid appears as `nobody`;
    UID:GID   become that user, but keep the right to pass other users' directories: a checkout
              often lies under a home with mode 0700. It needs the capabilities that Docker gives.
"""

from __future__ import annotations

import ctypes
import os
import sys

NOBODY = 65534

# <linux/prctl.h>, <linux/capability.h>, <sched.h>
PR_SET_PDEATHSIG = 1
PR_SET_KEEPCAPS = 8
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_RAISE = 2
CAP_DAC_OVERRIDE = 1
CAPABILITY_VERSION_3 = 0x20080522
CLONE_NEWUSER = 0x10000000

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: object) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def _enter_user_namespace() -> None:
    """PostgreSQL refuses uid 0; in here the same user has another number."""
    uid, gid = os.geteuid(), os.getegid()
    _call("unshare", CLONE_NEWUSER)
    for path, line in (
        ("/proc/self/setgroups", "deny"),  # the kernel wants this before a gid_map
        ("/proc/self/uid_map", f"{NOBODY} {uid} 1"),
        ("/proc/self/gid_map", f"{NOBODY} {gid} 1"),
    ):
        fd = os.open(path, os.O_WRONLY)
        os.write(fd, line.encode())  # nothing to import: the library may be out of reach by now
        os.close(fd)


def _become_user(uid: int, gid: int) -> None:
    _call("prctl", PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    # struct __user_cap_header_struct; then effective, permitted, inheritable, low and high words.
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    mask = 1 << CAP_DAC_OVERRIDE
    _call("capset", header, (ctypes.c_uint32 * 6)(mask, mask, mask, 0, 0, 0))
    _call("prctl", PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, CAP_DAC_OVERRIDE, 0, 0)


def main(arguments: list[str]) -> None:
    parent_pid, death_signal, identity, directory, *command = arguments
    if identity == "userns":
        _enter_user_namespace()
    elif identity != "self":
        uid, _, gid = identity.partition(":")
        _become_user(int(uid), int(gid))
    # After the change of identity: a change of credentials clears the death signal.
    _call("prctl", PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0)
    if os.getppid() != int(parent_pid):
        return  # the parent died before the kernel knew that we care
    os.umask(0o077)
    os.chdir(directory)
    os.execv(command[0], command)  # noqa: S606 (no shell is the point)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except OSError as error:
        sys.exit(f"cannot run {sys.argv[5]} as {sys.argv[3]}: {error}")
