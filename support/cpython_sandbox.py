"""The rung `--python cpython`: all of Python with numpy, in a child that has given up its rights.

`CPythonSession` starts this file as a child (`python -I -S cpython_sandbox.py SETTINGS`). In: one
JSON string of code a line, on stdin. Out: what the code prints, on stdout; one line on stderr when
the child is confined and after each piece. The child sets limits, takes an unprivileged uid if we
are root, then Landlock (which files) and seccomp (which system calls). That cannot be undone, needs
no package, privilege or namespace, and all of it is in force or no code runs: elsewhere
--unsafe_python runs the code as the user, with limits on time, memory and output only.

Not in reach of the code: the network (loopback too), files outside the interpreter, the system's
libraries and its own folder, the environment of the user, other processes (no fork, no exec, no
signals, no ptrace), shared memory, namespaces, a second core, modes and times of files. NOT
stopped: bugs of the kernel; `stat` of any path, so existence and size show; what the kernel tells
everybody (its version, load, memory, free disk space); reading site-packages; one core for the
length of a call, and some MiB of kernel memory (pipes, locks); what is written between two looks
at the disk, LOOK_S apart; deleted files that are open or mapped where we may not look at the child
(root without CAP_SYS_PTRACE); and the code shares its process with the loop below, so it can forge
its own output. The folder of an owner that was killed is removed by a later run, KEPT_S on.
docs/tools.md says what differs between machines. To let code do more (a data folder, say), add to
READABLE. Ideas from nanochat's execution.py.
"""

import ast
import contextlib
import ctypes
import io
import json
import os
import resource
import shutil
import signal
import struct
import sys
import sysconfig
import traceback
import types

READABLE = """/usr/lib /usr/lib64 /lib /lib64 /usr/local/lib /usr/share/zoneinfo /etc/localtime
    /etc/ld.so.cache /dev/urandom /dev/zero /proc/cpuinfo /proc/meminfo""".split()
FOLDER_BYTES = 64 << 20  # a session that writes more is ended; one file may have a quarter of it
TOO_MUCH_DISK = f"more than {FOLDER_BYTES >> 20} MiB in files"

# Each system call denied with EPERM: its name, its number on x86-64 and on aarch64 ("-": none).
# From 424 on numbers are equal, and none is needed: ENOSYS, and libc falls back to the older call.
FIRST_NEW_CALL = 424  # pidfd, io_uring, the new mount calls, clone3, openat2, ...
DENIED = """
socket 41 198, connect 42 203, bind 49 200, listen 50 201, accept 43 202, accept4 288 242,
execve 59 221, execveat 322 281, fork 57 -, vfork 58 -, ptrace 101 117, process_vm_readv 310 270,
process_vm_writev 311 271, kcmp 312 272, setsid 112 157, setpgid 109 154, tkill 200 130,
rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240, memfd_create 319 279, shmget 29 194,
shmat 30 196, shmctl 31 195, semget 64 190, semop 65 193, semctl 66 191, semtimedop 220 192,
msgget 68 186, msgsnd 69 189, msgrcv 70 188, msgctl 71 187, mq_open 240 180, mq_unlink 241 181,
add_key 248 217, request_key 249 218, keyctl 250 219, bpf 321 280, userfaultfd 323 282,
perf_event_open 298 241, unshare 272 97, setns 308 268, mount 165 40, umount2 166 39,
pivot_root 155 41, chroot 161 51, chmod 90 -, fchmod 91 52, fchmodat 268 53, chown 92 -,
fchown 93 55, lchown 94 -, fchownat 260 54, utime 132 -, utimes 235 -, futimesat 261 -,
utimensat 280 88, setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7, removexattr 197 14,
lremovexattr 198 15, fremovexattr 199 16, link 86 -, linkat 265 37, symlink 88 -, symlinkat 266 36,
mknod 133 -, mknodat 259 33, truncate 76 45, splice 275 76, tee 276 77, vmsplice 278 75,
sched_setaffinity 203 122, sched_setscheduler 144 119, sched_setparam 142 118,
sched_setattr 314 274, setpriority 141 140, ioprio_set 251 30, setuid 105 146, setgid 106 144,
setreuid 113 145, setregid 114 143, setresuid 117 147, setresgid 119 149, setfsuid 122 151,
setfsgid 123 152, setgroups 116 159, capset 126 91, personality 135 92, inotify_init 253 -,
inotify_init1 294 26, fanotify_init 300 262, fanotify_mark 301 263, name_to_handle_at 303 264,
open_by_handle_at 304 265, sync 162 81, syncfs 306 267, acct 163 89, quotactl 179 60,
swapon 167 224, swapoff 168 225, reboot 169 142, sethostname 170 161, setdomainname 171 162,
init_module 175 105, finit_module 313 273, delete_module 176 106, kexec_load 246 104,
kexec_file_load 320 294, settimeofday 164 170, clock_settime 227 112, adjtimex 159 171,
clock_adjtime 305 266, syslog 103 116, vhangup 153 58, iopl 172 -, ioperm 173 -, modify_ldt 154 -,
lookup_dcookie 212 18, migrate_pages 256 238, move_pages 279 239, getxattr 191 8, lgetxattr 192 9,
fgetxattr 193 10, listxattr 194 11, llistxattr 195 12, flistxattr 196 13, readlink 89 -,
readlinkat 267 78, fallocate 285 47, timer_create 222 107, io_setup 206 0, umask 95 166,
sendmsg 46 211, sendmmsg 307 269, seccomp 317 277"""
MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # AUDIT_ARCH, column in DENIED
PID = -1  # in RULES: the process itself
# Calls that depend on an argument: name, its two numbers, which argument, the bits of it that
# count, whether the values are the allowed or the denied ones, the values.
ALL = 0xFFFFFFFF
RULES = [
    # Threads only: without fork and exec there is no fork bomb, and no process could stay behind.
    # A thread shares the table of open files, so all of them are counted.
    ("clone", (56, 220), 0, 0x7E030F00, True, [0x10F00]),
    ("kill", (62, 129), 0, ALL, True, [PID]),
    ("tgkill", (234, 131), 0, ALL, True, [PID]),
    ("prlimit64", (302, 261), 0, ALL, True, [0, PID]),
    # Thread names, reading of flags, names of memory areas. Not PR_SET_PDEATHSIG.
    ("prctl", (157, 167), 0, ALL, True, [15, 16, 23, 39, 0x53564D41]),
    # asyncio wants a pair of streams; a pair of datagram sockets could send to any socket file.
    ("socketpair", (53, 199), 0, ALL, True, [1]),
    ("socketpair", (53, 199), 1, 0xF, True, [1]),
    # F_SETOWN, F_SETSIG, F_SETOWN_EX, F_SETLEASE, F_NOTIFY; FIOSETOWN, SIOCSPGRP: for signals.
    ("fcntl", (72, 25), 1, ALL, False, [8, 10, 15, 1024, 1026]),
    ("ioctl", (16, 29), 1, ALL, False, [0x8901, 0x8902]),
    # O_TMPFILE makes files without a name.
    ("open", (2, None), 1, 0o20000000, False, [0o20000000]),
    ("openat", (257, 56), 2, 0o20000000, False, [0o20000000]),
    # Landlock's ABI 1 and 2 let O_TRUNC empty a file that is opened neither to read nor to write
    # (access mode 3), or only to read (0).
    ("open", (2, None), 1, 0o1003, False, [0o1000, 0o3, 0o1003]),
    ("openat", (257, 56), 2, 0o1003, False, [0o1000, 0o3, 0o1003]),
    # A folder that its owner cannot list could not be removed.
    ("mkdir", (83, None), 1, 0o700, True, [0o700]),
    ("mkdirat", (258, 34), 2, 0o700, True, [0o700]),
]


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
    machine = os.uname().machine
    if machine not in MACHINES or struct.calcsize("P") != 8:
        return f"it knows the system calls of {' and '.join(MACHINES)}, 64 bit (this is {machine})"
    if landlock_version() < 1:
        reason = os.strerror(ctypes.get_errno())
        return f"the kernel offers no Landlock ({reason}; it is in Linux from 5.13 on)"
    # A kernel with seccomp refuses a null filter as a bad address (EFAULT).
    if libc().prctl(22, 2, None, 0, 0) == 0 or ctypes.get_errno() != 14:
        return "the kernel offers no seccomp filters"
    return ""


def landlock_version() -> int:
    return libc().syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint32(1))


def set_limits(memory: int) -> None:
    """Limits of this process. That on CPU time counts over the whole session: the last resort."""
    linux, threads = sys.platform == "linux", 1024
    if linux:
        # End when the thread that started us ends.
        check(libc().prctl(1, signal.SIGKILL, 0, 0, 0), "PR_SET_PDEATHSIG")
        # The kernel counts the threads of a *user*, so an ordinary user's desktop counts too.
        others = int(open("/proc/loadavg").read().split()[3].split("/")[1])
        threads = 64 if os.geteuid() == 0 else others + 256
        cores = sorted(os.sched_getaffinity(0))  # threads share one of them
        os.sched_setaffinity(0, {cores[os.getpid() % len(cores)]})
        # If memory runs out, this process goes before the trainer.
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")
    os.umask(0o077)
    for limit, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, 600),
        (resource.RLIMIT_NPROC, threads),
        (resource.RLIMIT_FSIZE, FOLDER_BYTES // 4),
        (resource.RLIMIT_NOFILE, 64),
    ):
        hard = resource.getrlimit(limit)[1] % (1 << 64)  # -1 is no limit
        with contextlib.suppress(*([] if linux else [ValueError, OSError])):
            resource.setrlimit(limit, (min(value, hard), min(value, hard)))


def drop_privileges() -> str:
    """Become a user of our own if we are root. Returns who we are then, in words.

    One capability is kept at most: to read where the interpreter lives. A home of root is closed to
    others, and the interpreter may be there; Landlock then decides alone what can be read.
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
        except OSError:  # a container without that uid: root has to do, without other capabilities
            os.chown(".", os.geteuid(), os.getegid())
            who = "uid 0 with its rights dropped (no other uid here)"
        # The change of uid has cleared it.
        check(libc().prctl(1, signal.SIGKILL, 0, 0, 0), "PR_SET_PDEATHSIG")
    header, caps = struct.pack("<Ii", 0x20080522, 0), (ctypes.c_uint32 * 6)()
    check(libc().capget(header, caps), "capget")
    kept = caps[1] & (1 << 2)  # CAP_DAC_READ_SEARCH, if it is permitted
    check(libc().capset(header, struct.pack("<6I", kept, kept, 0, 0, 0, 0)), "capset")
    return who


def restrict_files() -> int:
    """Landlock: read the interpreter and libraries, write in the current folder, no TCP, no signals
    to others. Returns its version; where an older one has no rules, seccomp denies the calls."""
    call = libc().syscall
    version = check(landlock_version(), "Landlock")
    execute, write, read, read_dir = 1, 2, 4, 8
    # All rights of version 1, then refer, truncate and ioctl of devices.
    handled = (1 << 13) - 1 | (version >= 2) << 13 | (version >= 3) << 14 | (version >= 5) << 15
    # Files, TCP, abstract sockets and signals.
    rules = struct.pack("<QQQ", handled, 3 * (version >= 4), 3 * (version >= 6))
    size = ctypes.c_size_t(8 if version < 4 else 16 if version < 6 else 24)
    ruleset = check(call(444, rules, size, ctypes.c_uint32(0)), "Landlock")
    libraries = {sysconfig.get_path(n) for n in ("stdlib", "platstdlib", "purelib", "platlib")}
    rights = dict.fromkeys(
        [*READABLE, *libraries, f"{sys.base_prefix}/lib", *sys.path], read | read_dir | execute
    )
    rights["/dev/null"] = read | write
    # In the folder also: remove and make files and folders, refer, truncate.
    more = 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 13 | 1 << 14
    rights["."] = handled & (write | read | read_dir | more)
    for path, right in rights.items():
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        if not os.path.isdir(path):
            right &= read | write
        check(call(445, ruleset, 1, struct.pack("<Qi", right, fd), 0), f"Landlock rule for {path}")
        os.close(fd)
    check(libc().prctl(38, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
    check(call(446, ruleset, 0), "Landlock")
    os.close(ruleset)
    return version


def seccomp_filter(machine: str, pid: int) -> bytes:
    """The BPF program that the kernel asks at each system call of process `pid`."""
    arch, column = MACHINES[machine]
    # Offsets in struct seccomp_data, which has 8 bytes for an argument.
    number_at, arch_at, arguments_at = 0, 4, 16
    allow, kill_process, eperm, enosys = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
    load_op, and_op, answer_op, equal_op, at_least_op = 0x20, 0x54, 0x06, 0x15, 0x35
    code = []

    def emit(op: int, value: int, if_true: int = 0, if_false: int = 0) -> None:
        """One instruction; a comparison skips so many instructions after it."""
        code.append(struct.pack("<HBBI", op, if_true, if_false, value))

    emit(load_op, arch_at)
    emit(equal_op, arch, 1, 0)
    emit(answer_op, kill_process)  # a 32-bit call has other numbers
    emit(load_op, number_at)
    emit(at_least_op, FIRST_NEW_CALL, 0, 1)
    emit(answer_op, enosys)  # x32's numbers are above it as well
    for entry in DENIED.split(","):
        number = entry.split()[1 + column]
        if number != "-":
            emit(equal_op, int(number), 0, 1)
            emit(answer_op, eperm)
    for _, numbers, argument, bits, allowed, values in RULES:
        if numbers[column] is None:
            continue
        emit(load_op, number_at)
        emit(equal_op, numbers[column], 0, len(values) + 3)
        emit(load_op, arguments_at + 8 * argument)  # its low half
        emit(and_op, bits)
        for left, value in zip(range(len(values) - 1, -1, -1), values):
            harmless = 1 if left == 0 and not allowed else 0  # none of the denied values
            emit(equal_op, pid if value == PID else value, left + allowed, harmless)
        emit(answer_op, eperm)
    emit(answer_op, allow)
    return b"".join(code)


def restrict_system_calls() -> None:
    code = seccomp_filter(os.uname().machine, os.getpid())
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer))
    check(libc().prctl(22, 2, program, 0, 0), "seccomp")


def run(code: str, space: dict) -> None:
    """Execute code; print the value of its last expression, or the last line of a traceback."""
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
    memory, packages, unsafe = json.loads(sys.argv[1])
    code_lines, done_fd = os.fdopen(os.dup(0), "rb"), os.dup(2)
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)  # the code's own stdin is empty
    os.dup2(1, 2)
    sys.path += packages
    try:
        set_limits(memory)
        isolation = "NO sandbox (--unsafe_python), only time, memory and output are limited"
        if not unsafe:
            who = drop_privileges()
            version = restrict_files()
            restrict_system_calls()
            isolation = f"Landlock ABI {version} + seccomp, {who}"
            # shutil.copy would fail: modes and times of files cannot be changed here.
            shutil.copymode = shutil.copystat = lambda *_, **__: None
    except Exception as error:  # never run code with half of the protection
        os.write(done_fd, f"the sandbox cannot be set up: {error}\n".encode())
        return
    os.write(done_fd, f"ready: {isolation}\n".encode())
    sys.argv = [""]
    main_module = sys.modules["__main__"] = types.ModuleType("__main__")  # pickle looks there
    for line in code_lines:
        # A new object for each piece: the code may have closed or replaced the old one.
        stdout = io.FileIO(1, "w", closefd=False)
        output = io.TextIOWrapper(stdout, "utf-8", "replace", line_buffering=True)
        sys.stdout = sys.stderr = output
        end = lambda *_, output=output: (output.flush(), os.write(done_fd, b"done\n"))
        signal.signal(signal.SIGUSR1, end)  # sent at a time-out
        run(json.loads(line), main_module.__dict__)
        end()


if __name__ == "__main__":
    main()
    raise SystemExit

# ------------------------------------------------------------------------- the process that asks
# The child needs none of this, and starts faster without it.

import atexit
import concurrent.futures
import functools
import select
import subprocess
import tempfile
import threading
import time
from pathlib import Path

from support.monty_session import shown
from tools import Python, ToolFault

LOOK_S = 0.25  # between two looks at the files
FLUSH_S = 0.2  # for code that is late to show the line that it has begun
MAX_OUTPUT_BYTES = 1_000_000  # of one call; more ends the session
KEPT_S = 86400  # how long the folder of a session stays if its owner was killed
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "MALLOC_ARENA_MAX": "2"}
ENVIRONMENT |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
STARTER = concurrent.futures.ThreadPoolExecutor(1, "python-starter")


class CPythonSession(Python):
    """A stateful session of CPython in a child process, called as `tools.Python` is.

    The pieces of code that ran stand in `memory["python_code"]`. A session that finds some there,
    because the trajectory was begun in another process, repeats them before its first call.

    Args:
        memory: see tools.Python.
        memory_mb: address space of the child, in MiB.
        unsafe: run without the sandbox: for code that you would run yourself.
        limits: timeout_s, by the clock on the wall, and output_chars; see tools.Python.
    """

    def __init__(self, memory: dict | None = None, memory_mb=1024, unsafe=False, **limits):
        super().__init__(memory, memory_mb=memory_mb, **limits)
        self.unsafe, self.ended, self.lock = unsafe, False, threading.Lock()
        self.process, self.folder, self.isolation = None, None, ""

    def describe(self) -> str:
        """What confines the code, in words of a child; ValueError if none can be started."""
        try:
            self.start()
        except ToolFault as fault:
            raise ValueError(str(fault)) from None
        self.close()
        return self.isolation

    def start(self) -> None:
        """Start the child and wait until it is confined (about 40 ms), or raise ToolFault."""
        packages = sorted({sysconfig.get_path(name) for name in ("purelib", "platlib")})
        settings = json.dumps([self.memory_mb << 20, packages, self.unsafe])
        atexit.register(self.close)  # so that no folder outlives us
        try:
            self.folder = tempfile.mkdtemp(prefix="nano-python-")
            # The child dies with the *thread* that started it (PR_SET_PDEATHSIG): one that stays.
            self.process = STARTER.submit(
                subprocess.Popen,
                [sys.executable, "-I", "-S", __file__, settings],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,  # on it the child says that it is ready, or done
                bufsize=0,
                start_new_session=True,
                cwd=self.folder,
                env=ENVIRONMENT | {"HOME": self.folder, "TMPDIR": self.folder},
            ).result()
            if self.ended:
                raise OSError("the session was closed")
            for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
                os.set_blocking(pipe.fileno(), False)
            poll = select.poll()  # select.select() cannot do file descriptors above 1023
            poll.register(self.process.stderr, select.POLLIN)
            words = self.process.stderr.read(1000) if poll.poll(30_000) else b"no word for 30 s"
            words = words.decode(errors="replace").strip()
            if not words.startswith("ready: "):
                raise OSError(words.split("\n")[-1])
        except (OSError, RuntimeError) as error:
            self.release()
            raise ToolFault(f"python cannot be started ({error})") from None
        self.isolation = words.removeprefix("ready: ")

    def __call__(self, code: str) -> str:
        """Run code; returns and raises as `tools.Python` does."""
        with self.lock:
            while self.process is None:
                self.start()
                if any(self.run(earlier)[1] for earlier in self.memory.get("python_code", [])):
                    self.lose()  # it ends here but did not elsewhere: the session begins anew
            output, problem = self.run(code)
            if problem:
                self.lose()
            else:
                self.memory.setdefault("python_code", []).append(code)
            return shown(output, problem, self.output_chars)

    def run(self, code: str) -> tuple[str, str]:
        """Send code and wait for the end of it: (output, why the session must end or "")."""
        output = bytearray()
        try:
            os.killpg(self.process.pid, signal.SIGCONT)
            problem = self.wait_for(json.dumps(code).encode() + b"\n", output)
            # A thread that was left running waits until the next call.
            os.killpg(self.process.pid, signal.SIGSTOP)
            if not problem and self.disk_bytes() > FOLDER_BYTES:
                problem = TOO_MUCH_DISK
            problem = problem and f"{problem}; the session was restarted, variables are lost"
        except OSError:  # a pipe is closed: the child has ended itself
            problem = "the session died and was restarted, variables are lost"
        return output.decode("utf-8", "replace"), problem

    def wait_for(self, unsent: bytes, output: bytearray) -> str:
        """Send code and collect its output; OSError if the child ended. Returns a problem or ""."""
        stdin, stdout, done = self.process.stdin, self.process.stdout, self.process.stderr
        poll = select.poll()
        poll.register(stdin, select.POLLOUT)
        poll.register(stdout, select.POLLIN)
        poll.register(done, select.POLLIN)
        end, look, late = time.monotonic() + self.timeout_s, time.monotonic() + LOOK_S, ""
        while (now := time.monotonic()) < end or not late:
            if now >= end:
                late, end = f"timeout after {self.timeout_s:g} s", now + FLUSH_S
                os.killpg(self.process.pid, signal.SIGUSR1)
            if now >= look:
                look = now + LOOK_S
                if self.disk_bytes() > FOLDER_BYTES:
                    return TOO_MUCH_DISK
            for fd, _ in poll.poll(1000 * (min(look, end) - now) + 1):
                if fd == stdin.fileno():
                    unsent = unsent[os.write(fd, unsent) :]
                    if not unsent:
                        poll.unregister(fd)
                    continue
                is_done = fd == done.fileno() and done.read(1000)
                printed = stdout.read(MAX_OUTPUT_BYTES)  # None: nothing now; b"": it is closed
                output += printed or b""
                if b"" in (is_done, printed):
                    raise BrokenPipeError
                if is_done:
                    return late
            if len(output) > MAX_OUTPUT_BYTES:
                return f"more than {MAX_OUTPUT_BYTES} bytes of output"
        return late

    def disk_bytes(self) -> int:
        """Disk space of the folder and of deleted files, counted until it is too much.

        A file counts as 16 KiB at least, and one that is deleted, closed and still mapped as the
        largest. A folder that cannot be looked into is too much. OSError if the child has ended.
        """
        child, fds, deleted = f"/proc/{self.process.pid}", None, {}  # inode -> bytes
        with contextlib.suppress(OSError), open(f"{child}/maps", "rb") as maps:
            ours = os.path.basename(self.folder).encode()
            for line in maps:
                if line.endswith(b" (deleted)\n") and ours in line:
                    deleted[int(line.split()[4])] = FOLDER_BYTES // 4
            fds = os.listdir(f"{child}/fd")
            for fd in fds:
                with contextlib.suppress(OSError):  # closed since
                    state = os.stat(f"{child}/fd/{fd}")
                    if state.st_nlink == 0:
                        deleted[state.st_ino] = 512 * state.st_blocks
        if fds == []:  # the first thread has ended, and only there can we look
            raise BrokenPipeError
        total, folders = sum(deleted.values()), [self.folder]
        while folders and total <= FOLDER_BYTES:
            try:
                for entry in list(os.scandir(folders.pop())):
                    with contextlib.suppress(FileNotFoundError):  # removed since
                        total += max(16384, 512 * entry.stat(follow_symlinks=False).st_blocks)
                        if entry.is_dir(follow_symlinks=False):
                            folders.append(entry.path)
            except FileNotFoundError:
                pass
            except OSError:
                return FOLDER_BYTES + 1
        return total

    def lose(self) -> None:
        """End the child, and forget what it knew."""
        self.release()
        self.memory.pop("python_code", None)

    def close(self) -> None:
        """End the session for good. A call of it that still runs in another thread ends at once."""
        self.ended = True
        self.kill()
        with self.lock:
            self.release()

    def kill(self) -> None:
        """Kill the child with everything it started."""
        if process := self.process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def release(self) -> None:
        """Kill the child and remove its folder."""
        self.kill()
        if self.process:
            with contextlib.suppress(subprocess.TimeoutExpired):  # the kernel holds it
                self.process.wait(timeout=10)
            for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
                pipe.close()
        if self.folder:
            try:
                shutil.rmtree(self.folder, ignore_errors=True)
            except RecursionError:  # nested deeper than it can go
                subprocess.run(["rm", "-rf", self.folder])
        self.process, self.folder = None, None
        atexit.unregister(self.close)


def opener(unsafe: bool):
    """A function that makes the session of a trajectory's memory; ValueError without a sandbox."""
    if not unsafe and (lacks := missing()):
        raise ValueError(
            f"--python cpython has no sandbox on this machine: {lacks}. --python monty needs none; "
            "--unsafe_python runs the model's code without one"
        )
    for old in Path(tempfile.gettempdir()).glob("nano-python-*"):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > KEPT_S:
                shutil.rmtree(old, ignore_errors=True)
    return functools.partial(CPythonSession, unsafe=unsafe)
