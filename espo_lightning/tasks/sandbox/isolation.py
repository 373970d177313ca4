"""The layers that confine a process: namespaces, a private disk, Landlock, capabilities, seccomp, limits.

Standard library only, through ctypes. Each layer raises OSError if this kernel lacks it. `inner` applies them.
"""

import contextlib
import ctypes
import os
import platform
import re
import resource
import struct
import sys

DISK_LIMIT = 32 << 20  # bytes of the private directory
TASK_LIMIT = (
    320  # processes and threads of a job; the kernel takes no smaller bound for the ids of a namespace than 301
)

NEW_NAMESPACES = 0x10000000 | 0x40000000 | 0x20000000 | 0x08000000 | 0x04000000 | 0x00020000  # user net pid ipc uts mnt
CLONE_THREAD = 0x10000
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP = 1, 4, 22, 24
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38

# Per machine: audit number, clone, and the calls that fail with EPERM. Numbers: arch/x86/entry/syscalls/syscall_64.tbl
# and include/uapi/asm-generic/unistd.h of Linux. Order: network, processes and signals, other processes' memory,
# System V and POSIX IPC, memfd, metadata of files (Landlock does not cover chmod, chown, utime, xattr, truncate),
# mounts, administration, keys, bpf, perf, handles, namespaces, userfaultfd.
# fmt: off
DENIED = {
    "x86_64": (0xC000003E, 56, (
        41, 42, 43, 49, 50, 288, 57, 58, 59, 322, 62, 200, 234, 129, 297, 109, 112, 101, 310, 311, 312,
        29, 30, 31, 64, 68, 240, 319, 90, 91, 92, 93, 94, 260, 268, 132, 235, 261, 280, 188, 189, 190, 197, 198, 199,
        76, 155, 161, 165, 166, 167, 168, 169, 170, 171, 172, 173, 175, 176, 313, 179, 163, 164, 103, 134, 135,
        153, 154, 156, 159, 227, 305, 246, 320, 248, 249, 250, 321, 298, 300, 303, 304, 272, 308, 323)),
    "aarch64": (0xC00000B7, 220, (
        198, 203, 202, 200, 201, 242, 221, 281, 129, 130, 131, 138, 240, 154, 157, 117, 270, 271, 272,
        194, 195, 196, 190, 186, 180, 279, 52, 53, 54, 55, 88, 5, 6, 7, 14, 15, 16, 45,
        41, 51, 40, 39, 224, 225, 142, 161, 162, 105, 106, 273, 60, 89, 170, 116, 92, 58,
        171, 112, 266, 104, 294, 217, 218, 219, 280, 241, 262, 264, 265, 97, 268, 282)),
}
# fmt: on
# From 424 on the numbers are the same on every machine: only these exist (close_range, openat2, faccessat2,
# epoll_pwait2, futex_waitv); clone3 and whatever later kernels add answer ENOSYS, and libc falls back to clone.
UNIFIED_FROM, UNIFIED_ALLOWED = 424, (436, 437, 439, 441, 449)


def libc_call(name: str, *args: object) -> int:
    """Call a libc function that returns -1 on failure. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, name):
        raise OSError(38, f"{name} does not exist on this system")
    if (result := getattr(libc, name)(*args)) < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def prctl(option: int, value: int, pointer: bytes | None = None) -> None:
    libc_call("prctl", option, ctypes.c_ulong(value), pointer, ctypes.c_ulong(0), ctypes.c_ulong(0))


def enter_namespaces() -> None:
    """New user, network, pid, ipc, uts and mount namespaces; the pid namespace takes effect at the next fork."""
    uid, gid = os.geteuid(), os.getegid()
    libc_call("unshare", NEW_NAMESPACES)
    for name, text in (("setgroups", "deny"), ("uid_map", f"1000 {uid} 1"), ("gid_map", f"1000 {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def mount_private(workdir: str) -> None:
    """A size-limited tmpfs over ``workdir``, seen by this mount namespace only and gone with it."""
    libc_call("mount", None, b"/", None, ctypes.c_ulong(0x4000 | 0x40000), None)  # recursive, private
    options = f"size={DISK_LIMIT},nr_inodes=1024,mode=0700".encode()
    libc_call("mount", b"tmpfs", os.fsencode(workdir), b"tmpfs", ctypes.c_ulong(2 | 4 | 8), options)  # nosuid dev exec


def landlock(workdir: str) -> None:
    """Files: read the standard library and shared objects, write ``workdir``, nothing else; no TCP, no signals out."""
    abi = libc_call("syscall", 444, None, 0, 1)
    if abi < 3:  # without TRUNCATE, files outside could be emptied
        raise OSError(38, f"Landlock ABI {abi}, 3 needed")
    handled = 0x7FFF | (0x8000 if abi >= 5 else 0)
    attr = struct.pack("<QQQ", handled, 3, 3)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = libc_call("syscall", 444, attr, ctypes.c_size_t(len(attr)), 0)
    read, no_devices = 4 | 8, ~(1 | 1 << 6 | 1 << 9 | 1 << 11 | 0x8000)
    rules = {workdir: handled & no_devices, "/dev/null": 2 | 4, "/dev/urandom": 4, "/etc/ld.so.cache": 4}
    libraries = (
        "/lib",
        "/lib64",
        "/usr/lib",
        "/usr/lib64",
        "/usr/share/zoneinfo",
        os.path.join(sys.base_prefix, "lib"),
    )
    for path in (os.path.dirname(os.__file__), *libraries):
        rules.setdefault(path, read)
    for path, access in rules.items():
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            libc_call("syscall", 445, ruleset, 1, struct.pack("<Qi", access, fd), 0)
            os.close(fd)
    libc_call("syscall", 446, ruleset, 0)
    os.close(ruleset)


def limit_tasks() -> None:
    """At most `TASK_LIMIT` processes and threads, for a process that has entered namespaces of its own.

    Per user from Linux 5.14, where users of a namespace are counted apart from their likes outside, but not for root;
    per namespace from 6.14, before which the bound of process ids was the whole machine's and must not be touched.
    Elsewhere the runner counts, see `inner.tasks_below`.
    """
    version = tuple(int(part) for part in re.match(r"(\d+)\.(\d+)", platform.release()).groups())
    if version >= (5, 14):
        hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
        limit = TASK_LIMIT if hard == resource.RLIM_INFINITY else min(TASK_LIMIT, hard)
        resource.setrlimit(resource.RLIMIT_NPROC, (limit, limit))
    if version >= (6, 14):
        with open("/proc/sys/kernel/pid_max", "w") as file:
            file.write(str(TASK_LIMIT))


def drop_capabilities() -> None:
    for capability in range(64):
        with contextlib.suppress(OSError):  # EINVAL past the last one this kernel has, EPERM if it was not held
            prctl(PR_CAPBSET_DROP, capability)
    libc_call("capset", struct.pack("<II", 0x20080522, 0), struct.pack("<6I", *[0] * 6))


def seccomp() -> None:
    """A filter on system calls: no network, no new processes (threads are allowed), no signals, no metadata changes."""
    if platform.machine() not in DENIED:
        raise OSError(38, f"no system call table for {platform.machine()}")
    audit, clone, denied = DENIED[platform.machine()]
    load, equal, at_least, any_bit, ret = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, eperm, enosys = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
    code = [(load, 0, 0, 4), (equal, 1, 0, audit), (ret, 0, 0, kill), (load, 0, 0, 0)]
    code += [(at_least, 0, 1, 0x40000000), (ret, 0, 0, enosys)]  # the x32 alias of every call
    for number in denied:
        code += [(equal, 0, 1, number), (ret, 0, 0, eperm)]
    for number in UNIFIED_ALLOWED:
        code += [(equal, 0, 1, number), (ret, 0, 0, allow)]
    code += [(at_least, 0, 1, UNIFIED_FROM), (ret, 0, 0, enosys), (equal, 1, 0, clone), (ret, 0, 0, allow)]
    code += [(load, 0, 0, 16), (any_bit, 0, 1, CLONE_THREAD), (ret, 0, 0, allow), (ret, 0, 0, eperm)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *line) for line in code))
    prctl(PR_SET_SECCOMP, 2, struct.pack("@HP", len(code), ctypes.addressof(program)))


LAYERS = (enter_namespaces, mount_private, landlock, drop_capabilities, seccomp)


def set_limits(seconds: float, memory_mb: int) -> None:
    cpu = int(seconds) + 2
    for what, limit in (
        (resource.RLIMIT_AS, memory_mb << 20),
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_FSIZE, DISK_LIMIT // 2),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(what, (limit, limit))
