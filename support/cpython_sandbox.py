"""The child process behind the `python` tool: it gives up its rights for good, then runs code it is sent, piece by piece.

Run by `tools.Python` as `python -I -S sandbox.py SETTINGS`. In: one JSON string of code a line, on a pipe. Out: what the code
prints, on stdout; one line on a second pipe when the child is confined and after each piece. The order is: limits, an
unprivileged uid if we are root, Landlock (which files), seccomp (which system calls). Nothing of it can be undone, needs a
package, a privilege or a namespace, and either all of it is in force or no code runs.

The rungs of the ladder, from the strongest; train.py and evaluate.py print the one in force when they start:
    Linux, as root            all of it, and a uid of its own for each session, which keeps CAP_DAC_READ_SEARCH alone
    Linux, an ordinary user   all of it, under the caller's uid: Landlock and seccomp alone keep it from the user's files and
                              processes, and the limit on threads counts the user's other threads as well
    root, but no other uid    (some containers) all of it, as uid 0 with CAP_DAC_READ_SEARCH alone; the kernel does not limit root's threads
    anything less             macOS, another processor, no Landlock, no seccomp: refused; --unsafe_python runs the code as the
                              user, with limits on time, memory and output only. Use it in a container or virtual machine alone
An older Landlock (ABI below 6) has no rules for truncation, TCP, ioctl on devices or signals: seccomp denies those anyway, and no device but
urandom, zero and null can be opened. User namespaces and bubblewrap are neither needed nor used; no rung is built on them.

Not in reach of the code: the network (loopback too), files outside the interpreter, the system's libraries and its own
folder, the environment of the user, other processes (no fork, no exec, no signals, no ptrace), shared memory, namespaces.
NOT stopped: bugs of the kernel; `stat` of any path (existence and size show); reading site-packages; use of one core for
as long as a call may take; and the code shares its process with the loop below, so it can forge its own output.

Ideas from the Linux documentation (Landlock, seccomp) and from systems that are open about their limits, such as nanochat's
execution.py. To let code do more (a data folder, say), add to READABLE.
"""

import ast
import ctypes
import io
import json
import os
import resource
import signal
import struct
import sys
import sysconfig
import traceback

READABLE = [
    "/usr/lib",
    "/usr/lib64",
    "/lib",
    "/lib64",
    "/usr/local/lib",
    "/usr/share/zoneinfo",
    "/etc/localtime",
    "/etc/ld.so.cache",
    "/dev/urandom",
    "/dev/zero",
    "/proc/cpuinfo",
    "/proc/meminfo",
]
FOLDER_BYTES = (
    64 << 20
)  # tools.Python ends a session that writes more; one file may have a quarter of it

# Each system call denied with EPERM: its name, its number on x86-64, its number on aarch64 ("-": not there). From 424 on both
# have the same numbers, and none of those is needed: ENOSYS, and libc falls back to the older call.
FIRST_NEW_CALL = 424  # pidfd, io_uring, the new mount calls, clone3, openat2, ...
DENIED = """
socket 41 198, connect 42 203, bind 49 200, listen 50 201, accept 43 202, accept4 288 242, execve 59 221, execveat 322 281, fork 57 -, vfork 58 -,
ptrace 101 117, process_vm_readv 310 270, process_vm_writev 311 271, kcmp 312 272, setsid 112 157, setpgid 109 154, tkill 200 130,
rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240, memfd_create 319 279, shmget 29 194, shmat 30 196, shmctl 31 195, semget 64 190, semop 65 193,
semctl 66 191, semtimedop 220 192, msgget 68 186, msgsnd 69 189, msgrcv 70 188, msgctl 71 187, mq_open 240 180, mq_unlink 241 181,
add_key 248 217, request_key 249 218, keyctl 250 219, bpf 321 280, userfaultfd 323 282, perf_event_open 298 241, unshare 272 97, setns 308 268,
mount 165 40, umount2 166 39, pivot_root 155 41, chroot 161 51, chmod 90 -, fchmod 91 52, fchmodat 268 53, chown 92 -, fchown 93 55,
lchown 94 -, fchownat 260 54, utime 132 -, utimes 235 -, futimesat 261 -, utimensat 280 88, setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7,
removexattr 197 14, lremovexattr 198 15, fremovexattr 199 16, link 86 -, linkat 265 37, symlink 88 -, symlinkat 266 36, mknod 133 -,
mknodat 259 33, truncate 76 45, splice 275 76, tee 276 77, vmsplice 278 75, sched_setaffinity 203 122, sched_setscheduler 144 119,
sched_setparam 142 118, sched_setattr 314 274, setpriority 141 140, ioprio_set 251 30, setuid 105 146, setgid 106 144, setreuid 113 145,
setregid 114 143, setresuid 117 147, setresgid 119 149, setfsuid 122 151, setfsgid 123 152, setgroups 116 159, capset 126 91, personality 135 92,
inotify_init 253 -, inotify_init1 294 26, fanotify_init 300 262, fanotify_mark 301 263, name_to_handle_at 303 264, open_by_handle_at 304 265,
sync 162 81, syncfs 306 267, acct 163 89, quotactl 179 60, swapon 167 224, swapoff 168 225, reboot 169 142, sethostname 170 161,
setdomainname 171 162, init_module 175 105, finit_module 313 273, delete_module 176 106, kexec_load 246 104, kexec_file_load 320 294,
settimeofday 164 170, clock_settime 227 112, adjtimex 159 171, clock_adjtime 305 266, syslog 103 116, vhangup 153 58, iopl 172 -, ioperm 173 -,
modify_ldt 154 -, lookup_dcookie 212 18, migrate_pages 256 238, move_pages 279 239"""
MACHINES = {
    "x86_64": (0xC000003E, 0),
    "aarch64": (0xC00000B7, 1),
}  # AUDIT_ARCH of the kernel, column in DENIED
# Calls that are allowed with some arguments only.
CLONE, KILL, TGKILL, PRLIMIT, PRCTL, SOCKETPAIR = (
    (56, 220),
    (62, 129),
    (234, 131),
    (302, 261),
    (157, 167),
    (53, 199),
)
CLONE_THREAD, CLONE_NEW_NAMESPACE = 0x10000, 0x7E020000
PRCTL_ALLOWED = (
    15,
    16,
    23,
    39,
    0x53564D41,
)  # thread names, reading of flags, names of memory areas. Not PR_SET_PDEATHSIG


def libc():
    library = ctypes.CDLL(None, use_errno=True)
    library.syscall.restype = ctypes.c_long
    return library


def check(result: int, what: str) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def missing() -> str:
    """What this machine lacks for the sandbox, in words; "" if nothing."""
    if sys.platform != "linux":
        return f"it needs Linux (this is {sys.platform})"
    if os.uname().machine not in MACHINES or struct.calcsize("P") != 8:
        return f"it knows the system calls of {' and '.join(MACHINES)}, 64 bit (this is {os.uname().machine})"
    # Version of Landlock; and a null filter, which a kernel with seccomp refuses as a bad address (EFAULT).
    if libc().syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint32(1)) < 1:
        return f"the kernel offers no Landlock ({os.strerror(ctypes.get_errno())}; it is in Linux from 5.13 on, where switched on)"
    if libc().prctl(22, 2, None, 0, 0) == 0 or ctypes.get_errno() != 14:
        return "the kernel offers no seccomp filters"
    return ""


def set_limits(memory: int) -> None:
    """Limits of this process. CPU time counts over the whole session, so it is only the last resort: calls have a wall-clock limit."""
    threads = 1024
    if sys.platform == "linux":
        check(
            libc().prctl(1, signal.SIGKILL, 0, 0, 0), "PR_SET_PDEATHSIG"
        )  # end when the thread that started us ends
        # The kernel counts the threads of a *user* here, so an ordinary user's desktop counts too (the whole machine bounds it).
        threads = (
            64
            if os.geteuid() == 0
            else int(open("/proc/loadavg").read().split()[3].split("/")[1]) + 256
        )
    os.umask(0o077)
    for limit, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, 600),
        (resource.RLIMIT_NPROC, threads),
        (resource.RLIMIT_FSIZE, FOLDER_BYTES // 4),
        (resource.RLIMIT_NOFILE, 64),
    ):
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(limit, (value, value))
        except (ValueError, OSError):
            if sys.platform == "linux":
                raise


def drop_privileges() -> str:
    """Become a user of our own if we are root, and keep one capability at most: to read where the interpreter lives.
    Returns who we are then, in words.

    A home of root is closed to others, and the interpreter may be there; Landlock then decides alone what can be read.
    """
    who = f"the caller's uid {os.geteuid()}"
    if os.geteuid() == 0:
        uid = 60000 + os.getpid() % 5000
        try:
            os.chown(".", uid, uid)
            check(libc().prctl(8, 1, 0, 0, 0), "PR_SET_KEEPCAPS")
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            who = "a uid of its own"
        except OSError:  # a container without that uid: the rest holds for root as well, who keeps no other capability
            os.chown(".", os.geteuid(), os.getegid())
            who = "uid 0 with its rights dropped (no other uid here)"
        check(
            libc().prctl(1, signal.SIGKILL, 0, 0, 0), "PR_SET_PDEATHSIG"
        )  # the change of uid has cleared it
    header, caps = struct.pack("<Ii", 0x20080522, 0), (ctypes.c_uint32 * 6)()
    check(libc().capget(header, caps), "capget")
    kept = caps[1] & (1 << 2)  # CAP_DAC_READ_SEARCH, if it is permitted
    check(libc().capset(header, struct.pack("<6I", kept, kept, 0, 0, 0, 0)), "capset")
    return who


def restrict_files() -> int:
    """Landlock: read the interpreter and the libraries, write in the current folder, no TCP, no signals to others; returns its version."""
    call = libc().syscall
    version = check(call(444, None, ctypes.c_size_t(0), ctypes.c_uint32(1)), "Landlock")
    EXECUTE, WRITE, READ, READ_DIR = 1, 2, 4, 8
    handled = (
        (1 << 13) - 1 | (version >= 2) << 13 | (version >= 3) << 14 | (version >= 5) << 15
    )  # + refer, truncate, ioctl of devices
    rules = struct.pack(
        "<QQQ", handled, 3 if version >= 4 else 0, 3 if version >= 6 else 0
    )  # files, TCP, abstract sockets and signals
    ruleset = check(
        call(
            444,
            rules,
            ctypes.c_size_t(8 if version < 4 else 16 if version < 6 else 24),
            ctypes.c_uint32(0),
        ),
        "Landlock",
    )
    libraries = {
        sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")
    } | {f"{sys.base_prefix}/lib"}
    in_folder = handled & (
        WRITE | READ | READ_DIR | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 13 | 1 << 14
    )  # + remove, make files and folders
    rights = {path: READ | READ_DIR | EXECUTE for path in [*READABLE, *libraries, *sys.path]} | {
        "/dev/null": READ | WRITE,
        ".": in_folder,
    }
    for path, right in rights.items():
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        if not os.path.isdir(path):
            right &= READ | WRITE
        check(call(445, ruleset, 1, struct.pack("<Qi", right, fd), 0), f"Landlock rule for {path}")
        os.close(fd)
    check(libc().prctl(38, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
    check(call(446, ruleset, 0), "Landlock")
    os.close(ruleset)
    return version


def seccomp_filter(machine: str, pid: int) -> bytes:
    """The BPF program that the kernel asks at each system call.

    Args:
        machine: a key of MACHINES.
        pid: of this process, the only one that it may signal.
    """
    arch, column = MACHINES[machine]
    NUMBER, ARCH, ARGUMENT = (
        0,
        4,
        (16, 24),
    )  # offsets in struct seccomp_data (low half of an argument)
    ALLOW, KILL_PROCESS, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
    code = []
    emit = lambda op, value, if_true=0, if_false=0: code.append(
        struct.pack("<HBBI", op, if_true, if_false, value)
    )
    load, answer = lambda offset: emit(0x20, offset), lambda verdict: emit(0x06, verdict)
    equal, at_least, any_bit = (
        lambda value, t, f, op=op: emit(op, value, t, f) for op in (0x15, 0x35, 0x45)
    )

    load(ARCH), equal(arch, 1, 0), answer(KILL_PROCESS)  # a 32-bit call has other numbers
    (
        load(NUMBER),
        at_least(FIRST_NEW_CALL, 0, 1),
        answer(ENOSYS),
    )  # x32's numbers are above it as well
    for entry in DENIED.split(","):
        number = entry.split()[1 + column]
        if number != "-":
            equal(int(number), 0, 1), answer(EPERM)
    # Of clone only threads: without fork and exec there is no fork bomb and no process that could stay behind.
    (
        equal(CLONE[column], 0, 5),
        load(ARGUMENT[0]),
        any_bit(CLONE_NEW_NAMESPACE, 2, 0),
        any_bit(CLONE_THREAD, 0, 1),
        answer(ALLOW),
        answer(EPERM),
    )
    for call, allowed in (
        (KILL, [pid]),
        (TGKILL, [pid]),
        (PRLIMIT, [0, pid]),
        (PRCTL, PRCTL_ALLOWED),
    ):
        equal(call[column], 0, len(allowed) + 3), load(ARGUMENT[0])
        for left, value in zip(range(len(allowed), 0, -1), allowed):
            equal(value, left, 0)
        answer(EPERM), answer(ALLOW)
    # asyncio wants a socket pair; a pair of datagram sockets could send to any socket of the file system.
    (
        equal(SOCKETPAIR[column], 0, 4),
        load(ARGUMENT[1]),
        emit(0x54, 0xF),
        equal(1, 1, 0),
        answer(EPERM),
    )
    answer(ALLOW)
    return b"".join(code)


def restrict_system_calls() -> None:
    code = seccomp_filter(os.uname().machine, os.getpid())
    program = ctypes.create_string_buffer(code, len(code))
    check(
        libc().prctl(22, 2, struct.pack("@HP", len(code) // 8, ctypes.addressof(program)), 0, 0),
        "seccomp",
    )


def run(code: str, space: dict) -> None:
    """Execute a piece of code; print the value of its last expression, or the last line of a traceback."""
    try:
        tree = ast.parse(code)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "<code>", "exec"), space)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "<code>", "eval"), space)
            if value is not None:
                print(repr(value))
    except BaseException as error:
        print("".join(traceback.format_exception_only(error)).strip())


def main():
    settings = json.loads(sys.argv[1])
    sys.path += settings["packages"]
    try:
        set_limits(settings["memory"])
        isolation = "NO sandbox (--unsafe_python), only time, memory and output are limited"
        if not settings["unsafe"]:
            who = drop_privileges()
            version = restrict_files()
            restrict_system_calls()
            isolation = f"Landlock ABI {version} + seccomp, {who}"
    except Exception as error:  # never run code with half of the protection
        os.write(
            settings["done"],
            f"the sandbox cannot be set up: {error}".replace("\n", " ").encode() + b"\n",
        )
        return
    os.write(settings["done"], f"ready: {isolation}\n".encode())
    space = {"__name__": "__main__"}
    for line in os.fdopen(settings["code"], "rb"):
        # A new object for each piece: the code may have closed or replaced the old one.
        sys.stdout = sys.stderr = output = io.TextIOWrapper(
            io.FileIO(1, "w", closefd=False), encoding="utf-8", errors="replace"
        )
        run(json.loads(line), space)
        output.flush()
        os.write(settings["done"], b"done\n")


if __name__ == "__main__":
    main()
