"""Attacks on the `python` tool, one piece of code each, run by tests/test_sandbox.py.

An attack prints BREACH if it got what it must not get; some are also seen from outside (files
changed, processes left, requests that arrived). Prints a JSON object: name -> [breached, what the
policy saw]. Each attack gets a fresh session: a worn-out one would make later attacks fail for the
wrong reason.

    python tests/attacks.py [--uid 1500] [--only NAME] [--abi 1] [--unsafe]

--unsafe is the positive control: without the sandbox the attacks on other processes, files, the
kernel and the network must succeed, or the harness sees nothing. It refuses to run as root, where
they would do harm.
"""

import argparse
import atexit
import concurrent.futures
import contextlib
import ctypes
import http.server
import json
import os
import re
import resource
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import tempfile
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil

from support import cpython_sandbox
from support.cpython_sandbox import CPythonSession

HELP = """
import ctypes, os, socket, struct, sys, time
libc = ctypes.CDLL(None, use_errno=True)
def syscall(number, *arguments):
    result = libc.syscall(number, *arguments)
    if result < 0: raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
def denied(action):
    try: result = action()
    except (OSError, ImportError, MemoryError, RuntimeError, ValueError) as error:
        print(type(error).__name__, error)
        return
    print("BREACH", str(result)[:60])
"""
HELP_MONTY = """
def denied(action):
    try:
        result = action()
    except Exception as error:
        print(type(error).__name__, error)
        return
    print("BREACH", str(result)[:60])
"""
DENIED = "PermissionError|OSError|FileNotFoundError|InterpreterError|BlockingIOError"
# name -> (code, regular expression that the result must match)
ATTACKS = {
    # ---- ordinary work must go on
    "compute": ("sum(range(10))", "^45$"),
    "state": ("x = 5\nassert x == 5\nprint('said'); x", "^said\n5$"),
    "threads": (
        "import threading\n"
        "t = [threading.Thread(target=print, args=('hi',)) for _ in range(4)]\n"
        "[a.start() for a in t]; [a.join() for a in t]; 'end'",
        "(hi\n+){4}'end'",
    ),
    "own file": (
        "open('a.txt', 'w').write('text'); os.mkdir('d'); os.rename('a.txt', 'd/b.txt'); "
        "open('d/b.txt').read()",
        "^'text'$",
    ),
    "temporary file": (
        "import tempfile\n"
        "f = tempfile.NamedTemporaryFile('w+'); f.write('ok'); f.seek(0); f.read()",
        "^'ok'$",
    ),
    "asyncio": (
        "import asyncio\nasync def f():\n    await asyncio.sleep(0.01)\n    return 7\n"
        "asyncio.run(f())",
        "^7$",
    ),
    # ---- time, memory, output, descriptors
    "infinite loop": ("while True: pass", "^timeout"),
    "sleep": ("time.sleep(60)", "^timeout"),
    "signals ignored": (
        "import signal\nfor s in range(1, 65):\n"
        "    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass",
        "^timeout",
    ),
    "except everything": (
        "while True:\n    try:\n        while True: time.sleep(1)\n    except BaseException: pass",
        "^timeout",
    ),
    "regular expression": ("import re\nre.match('(a+)+b', 'a' * 60)", "^timeout"),
    "recursion": ("def f(): return f()\nf()", "RecursionError"),
    "recursion without limit": (
        "sys.setrecursionlimit(10**9)\ndef f(): return f()\nf()",
        "^timeout|died|Error",
    ),
    "memory bomb": ("b = []\nwhile True: b.append(bytearray(10 << 20))", "MemoryError|died"),
    "giant integer": ("len(bytes(10**10))", "MemoryError"),
    "print forever": ("while True: print('x' * 1000)", "more than 1000000 bytes of output"),
    "os.write forever": (
        "while True: os.write(1, b'x' * 65536)",
        "more than 1000000 bytes of output",
    ),
    "print 300 MB": ("print('x' * (300 << 20))", "more than 1000000 bytes of output|MemoryError"),
    "deleted but open files": (
        "fs = [open(f'f{i}', 'wb') for i in range(20)]\nfor i, f in enumerate(fs):\n"
        "    f.write(bytes(10 << 20)); f.flush(); os.remove(f'f{i}')\ntime.sleep(0.6)",
        "MiB in files",
    ),
    "deleted files in flight": (
        "import array\na, b = socket.socketpair()\nf = open('f', 'wb'); os.remove('f')\n"
        "denied(lambda: a.sendmsg([b'x'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, "
        "array.array('i', [f.fileno()]))]))",
        DENIED,
    ),
    "deleted but mapped files": (
        "libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, [ctypes.c_long] * 6\n"
        "for i in range(12):\n    f = open('f', 'w+b'); f.write(bytes(10 << 20)); f.flush()\n"
        "    os.remove('f'); libc.mmap(0, 4096, 1, 1, f.fileno(), 0); f.close()\n"
        "time.sleep(0.6)",
        "MiB in files",
    ),
    "open files of a thread of its own kind": (
        "stack = ctypes.create_string_buffer(1 << 16)\n"
        "top = ctypes.c_void_p(ctypes.addressof(stack) + (1 << 15) & ~15)\n"
        "denied(lambda: 1 + syscall(56, 0x10900, top, None, None, None))",
        DENIED,
    ),
    "files of a process without its first thread": (
        "import threading\ndef fill():\n    time.sleep(0.1)\n"
        "    fs = [open(f'f{i}', 'wb') for i in range(12)]\n"
        "    for i in range(12): os.remove(f'f{i}')\n"
        "    for f in fs: f.write(bytes(10 << 20)); f.flush()\n"
        "    time.sleep(0.6); os.write(1, b'BREACH'); time.sleep(60)\n"
        "threading.Thread(target=fill).start(); libc.syscall(60, 0)",
        "MiB in files|died",
    ),
    "files that come and go": (
        "import threading\ndef flicker(name):\n    while True:\n"
        "        os.close(os.open(name, os.O_CREAT | os.O_WRONLY)); os.remove(name)\n"
        "[threading.Thread(target=flicker, args=(str(n),), daemon=True).start() "
        "for n in range(3)]\nkept = []\nfor i in range(12):\n"
        "    kept.append(open(f'f{i}', 'wb')); kept[-1].write(bytes(10 << 20)); kept[-1].flush()\n"
        "    if i % 2: os.remove(f'f{i}')\ntime.sleep(2); print('BREACH')",
        "MiB in files",
    ),
    "fallocate": (
        "f = open('big', 'wb')\ndenied(lambda: syscall(285, f.fileno(), 0, 0, 1 << 30) or 1)",
        DENIED,
    ),
    "file without a name": ("denied(lambda: os.open('.', os.O_TMPFILE | os.O_RDWR))", DENIED),
    "folder that cannot be listed": ("denied(lambda: os.mkdir('d', 0))", DENIED),
    "folder at that cannot be listed": (
        "here = os.open('.', os.O_RDONLY)\ndenied(lambda: os.mkdir('d', 0o300, dir_fd=here))",
        DENIED,
    ),
    "umask": ("denied(lambda: os.umask(0o777))", DENIED),
    "asynchronous input and output": (
        "c = ctypes.c_ulong()\ndenied(lambda: syscall(206, 4, ctypes.byref(c)))",
        DENIED,
    ),
    "timer that continues": (
        "t = ctypes.c_int()\ndenied(lambda: syscall(222, 0, None, ctypes.byref(t)))",
        DENIED,
    ),
    "descriptor bomb": (
        "n = 0\ntry:\n    while True: open('/dev/null'); f = os.dup(1); n += 1\n"
        "except OSError as e: print(e)\nprint('BREACH' if n >= 64 else 'stopped')",
        "stopped",
    ),
    "file of 400 MB": (
        "f = open('big', 'wb')\nfor _ in range(40): f.write(bytes(10 << 20))\nprint('BREACH')",
        "File too large|died",
    ),
    "60 files of 10 MB": (
        "for i in range(60): open(f'f{i}', 'wb').write(bytes(10 << 20))\n"
        "time.sleep(0.6); print('BREACH')",
        "MiB in files",
    ),
    "5,000 files": ("for i in range(5_000): open(f'f{i}', 'w')", "MiB in files"),
    "deep folders": (
        "for i in range(1100): os.mkdir('d'); os.chdir('d')",
        "MiB in files|OSError|no output",
    ),
    "more than one core": (
        "print(len(os.sched_getaffinity(0)))\n"
        "denied(lambda: os.sched_setaffinity(0, set(range(64))) or 1)",
        "^1\nPermissionError",
    ),
    # ---- processes
    "fork": ("denied(lambda: os.fork() or os._exit(0))", DENIED),
    "fork by ctypes": (
        "pid = libc.fork()\nif pid == 0: os._exit(0)\n"
        "print('BREACH' if pid > 0 else 'PermissionError')",
        DENIED,
    ),
    "vfork, clone, clone3": (
        "for n, a in ((58, ()), (56, (17, 0, 0, 0, 0)), (435, (bytes(88), 88)), (57, "
        "())):\n    try: pid = syscall(n, *a)\n"
        "    except OSError as e: print('OSError', e); continue\n"
        "    if pid == 0: os._exit(0)\n    print('BREACH')",
        DENIED,
    ),
    "subprocess": ("import subprocess\ndenied(lambda: subprocess.run(['/bin/true']))", DENIED),
    "os.system": ("print('BREACH' if os.system('true') == 0 else 'OSError')", DENIED),
    "exec": ("denied(lambda: os.execv('/bin/true', ['true']))", DENIED),
    "multiprocessing": (
        "import multiprocessing\n"
        "denied(lambda: multiprocessing.get_context('fork').Process(target=print).start()"
        ")",
        DENIED,
    ),
    "thread bomb": (
        "import threading\nn = 0\ntry:\n"
        "    while n < 5000: threading.Thread(target=time.sleep, args=(9,), "
        "daemon=True).start(); n += 1\nexcept (RuntimeError, MemoryError): pass\n"
        "print('BREACH' if n >= 2000 else f'stopped')",
        "stopped|died",
    ),
    "daemon": (
        "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
        "        open('/proc/self/comm', 'w').write('nanoattack'); time.sleep(20)\n"
        "    os._exit(0)\ntime.sleep(0.3)",
        DENIED,
    ),
    "daemon by ctypes": (
        "if libc.fork() == 0:\n    libc.setsid()\n    if libc.fork() == 0:\n"
        "        libc.prctl(15, b'nanoattack', 0, 0, 0); time.sleep(20)\n"
        "    os._exit(0)\ntime.sleep(0.3)",
        "",
    ),
    "setsid": ("denied(os.setsid)", DENIED),
    "setpgid": ("denied(lambda: syscall(109, 0, 0))", DENIED),
    "signal to the parent": ("denied(lambda: os.kill(PARENT, 0))", DENIED),
    "kill another process": ("denied(lambda: os.kill(DECOY, 9))", DENIED),
    "kill by tkill": ("denied(lambda: syscall(200, DECOY, 9))", DENIED),
    "kill by tgkill": ("denied(lambda: syscall(234, DECOY, DECOY, 9))", DENIED),
    "kill by queue": ("denied(lambda: syscall(129, DECOY, 9, bytes(128)))", DENIED),
    "kill by pidfd": ("denied(lambda: syscall(424, syscall(434, DECOY, 0), 9, None, 0))", DENIED),
    "kill everything": ("denied(lambda: os.kill(-1, 0))", DENIED),
    "kill a group": ("denied(lambda: os.killpg(os.getpgid(PARENT), 0))", DENIED),
    "prlimit of another": (
        "import resource\ndenied(lambda: resource.prlimit(DECOY, resource.RLIMIT_NOFILE, (3, 3)))",
        DENIED,
    ),
    "raise own limits": (
        "import resource\n"
        "denied(lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (100000, 100000)))",
        "ValueError",
    ),
    "ptrace": ("denied(lambda: syscall(101, 16, DECOY, 0, 0))", DENIED),
    "read memory of another": (
        "b = ctypes.create_string_buffer(16)\ndenied(lambda: syscall(310, DECOY, b, 1, b, 1, 0))",
        DENIED,
    ),
    "environment of the parent": (
        "denied(lambda: open(f'/proc/{PARENT}/environ').read(20))",
        DENIED,
    ),
    "memory of the parent": ("denied(lambda: open(f'/proc/{PARENT}/mem', 'rb'))", DENIED),
    "descriptors of the parent": ("denied(lambda: os.listdir(f'/proc/{PARENT}/fd'))", DENIED),
    "signal by the owner of a pipe": (
        "import fcntl\nr, w = os.pipe()\ndenied(lambda: fcntl.fcntl(r, fcntl.F_SETOWN, DECOY))",
        DENIED,
    ),
    "signal of a pipe": (
        "import fcntl\nr, w = os.pipe()\ndenied(lambda: fcntl.fcntl(r, 10, 9))",
        DENIED,
    ),
    "signal by ioctl": (
        "import fcntl\nr, w = os.pipe()\n"
        "denied(lambda: fcntl.ioctl(r, 0x8901, DECOY.to_bytes(4, 'little')))",
        DENIED,
    ),
    "signal of a pipe by its thread": (
        "import fcntl\nr, w = os.pipe()\n"
        "denied(lambda: fcntl.fcntl(r, 15, struct.pack('ii', 1, DECOY)))",
        DENIED,
    ),
    "signal of a socket": (
        "import fcntl\na, b = socket.socketpair()\n"
        "denied(lambda: fcntl.ioctl(a, 0x8902, struct.pack('i', DECOY)))",
        DENIED,
    ),
    "write lease": (
        "import fcntl\nf = open('l', 'w')\n"
        "denied(lambda: fcntl.fcntl(f, fcntl.F_SETLEASE, fcntl.F_WRLCK))",
        DENIED,
    ),
    "lease": (
        "import fcntl\nf = open('l', 'w'); f.close(); f = open('l')\n"
        "denied(lambda: fcntl.fcntl(f, fcntl.F_SETLEASE, fcntl.F_RDLCK))",
        DENIED,
    ),
    "notice of changes": (
        "import fcntl\nf = os.open('.', os.O_RDONLY)\n"
        "denied(lambda: fcntl.fcntl(f, fcntl.F_NOTIFY, 2))",
        DENIED,
    ),
    "priority of another": ("denied(lambda: os.setpriority(os.PRIO_PROCESS, DECOY, 19))", DENIED),
    "scheduler": ("denied(lambda: os.sched_setaffinity(DECOY, {0}))", DENIED),
    "keep alive": (
        "result = libc.prctl(1, 0, 0, 0, 0)\nprint('BREACH' if result == 0 else 'OSError')",
        DENIED,
    ),
    # ---- secrets
    "own environment": (
        "print('BREACH' if 'NANO_API_KEY' in os.environ else sorted(os.environ)[0])",
        "HOME|LANG|LC_",
    ),
    "own environment by /proc": (
        "denied(lambda: [x for x in open('/proc/self/environ').read().split('\\0') if "
        "'NANO_API_KEY' in x][0])",
        DENIED + "|IndexError",
    ),
    "inherited descriptor": (
        "denied(lambda: [os.pread(fd, 9, 0) for fd in range(3, 64) if not "
        "os.get_blocking(fd) or True and os.fstat(fd).st_ino == INODE][0])",
        DENIED + "|IndexError|Bad file",
    ),
    "read a file": ("denied(lambda: open(SECRET).read())", DENIED),
    "read through ..": ("denied(lambda: open('../' * 12 + SECRET).read())", DENIED),
    "read /etc/shadow": ("denied(lambda: open('/etc/shadow').read())", DENIED),
    "read the home folder": ("denied(lambda: os.listdir(HOME))", DENIED),
    "list /tmp": ("denied(lambda: os.listdir('/tmp'))", DENIED),
    "read the answers": ("denied(lambda: open(REPOSITORY + '/data/test.jsonl').read(5))", DENIED),
    "target of a link": ("denied(lambda: os.readlink(LINK))", DENIED),
    "target of a link at": (
        "here = os.open('/usr/lib', os.O_RDONLY)\ndenied(lambda: os.readlink(LINK, dir_fd=here))",
        DENIED,
    ),
    "read by symlink": ("denied(lambda: os.symlink(SECRET, 'l') or open('l').read())", DENIED),
    "read by hard link": ("denied(lambda: os.link(SECRET, 'h') or open('h').read())", DENIED),
    "open by handle": (
        "b = ctypes.create_string_buffer(struct_size := 136); b[0] = 128\n"
        "m = ctypes.c_int()\n"
        "denied(lambda: syscall(303, -100, SECRET.encode(), b, ctypes.byref(m), 0))",
        DENIED,
    ),
    "open by openat2": (
        "denied(lambda: syscall(437, -100, SECRET.encode(), bytes(24), 24))",
        DENIED,
    ),
    "core file": (
        "import resource\n"
        "print('BREACH' if resource.getrlimit(resource.RLIMIT_CORE)[1] else 'none')",
        "none",
    ),
    # ---- changes outside
    "write outside": ("denied(lambda: open(VICTIMS + '/new', 'w'))", DENIED),
    "write to the home folder": ("denied(lambda: open(HOME + '/nano-attack', 'w'))", DENIED),
    "write to site-packages": (
        "import sysconfig\n"
        "denied(lambda: open(sysconfig.get_path('purelib') + '/nano_attack.py', 'w'))",
        DENIED,
    ),
    "write to /dev/shm": ("denied(lambda: open('/dev/shm/nano-attack', 'w'))", DENIED),
    "append": ("denied(lambda: open(VICTIMS + '/append', 'a').write('x'))", DENIED),
    "truncate": ("denied(lambda: os.truncate(VICTIMS + '/truncate', 0))", DENIED),
    "delete": ("denied(lambda: os.remove(VICTIMS + '/delete'))", DENIED),
    "rename": ("denied(lambda: os.rename(VICTIMS + '/rename', VICTIMS + '/renamed'))", DENIED),
    "move out": (
        "open('x', 'w').write('x')\ndenied(lambda: os.rename('x', VICTIMS + '/moved'))",
        DENIED,
    ),
    "make a folder": ("denied(lambda: os.mkdir(VICTIMS + '/folder'))", DENIED),
    "chmod": ("denied(lambda: os.chmod(VICTIMS + '/chmod', 0o777))", DENIED),
    "chmod by fchmodat2": (
        "denied(lambda: syscall(452, -100, (VICTIMS + '/chmod').encode(), 0o777, 0))",
        DENIED,
    ),
    "chown": ("denied(lambda: os.chown(VICTIMS + '/chown', os.getuid(), os.getgid()))", DENIED),
    "times": ("denied(lambda: os.utime(VICTIMS + '/times', (0, 0)))", DENIED),
    "truncate by opening": (
        "denied(lambda: os.open(VICTIMS + '/truncate', os.O_RDONLY | os.O_TRUNC))",
        DENIED,
    ),
    "truncate by opening for nothing": (
        "denied(lambda: os.open(VICTIMS + '/truncate', 3 | os.O_TRUNC))",
        DENIED,
    ),
    "open for nothing": ("denied(lambda: os.open(VICTIMS + '/truncate', 3))", DENIED),
    "value of an attribute": (
        "denied(lambda: os.getxattr(VICTIMS + '/xattr', 'user.kept'))",
        DENIED,
    ),
    "read attributes": ("denied(lambda: os.listxattr(VICTIMS + '/xattr') or 1)", DENIED),
    "attributes": ("denied(lambda: os.setxattr(VICTIMS + '/xattr', 'user.x', b'1'))", DENIED),
    "setuid file": ("open('s', 'w'); denied(lambda: os.chmod('s', 0o4777))", DENIED),
    "device file": ("denied(lambda: os.mknod('dev', 0o20666, os.makedev(1, 1)))", DENIED),
    "watch a folder": (
        "denied(lambda: libc.inotify_add_watch(syscall(294, 0), VICTIMS.encode(), 0xfff))",
        DENIED,
    ),
    # ---- privileges and kernel surface
    "become root": ("denied(lambda: os.setuid(0) if os.getuid() else 1)", DENIED),
    "capabilities": (
        "b = (ctypes.c_uint32 * 6)()\n"
        "libc.capget(bytes([0x22, 5, 8, 0x20, 0, 0, 0, 0]), b)\n"
        "print('BREACH' if b[1] & ~4 else 'few')",
        "few",
    ),
    "user namespace": ("denied(lambda: syscall(272, 0x10000000))", DENIED),
    "enter a namespace": ("denied(lambda: syscall(308, 1, 0))", DENIED),
    "chroot": ("denied(lambda: os.chroot('.'))", DENIED),
    "mount": ("denied(lambda: syscall(165, b'none', b'.', b'tmpfs', 0, None))", DENIED),
    "io_uring": ("denied(lambda: syscall(425, 4, ctypes.create_string_buffer(120)))", DENIED),
    "memfd": ("denied(lambda: os.memfd_create('m'))", DENIED),
    "shared memory": ("denied(lambda: syscall(29, 0x6e616e6f, 4096, 0o1600))", DENIED),
    "message queue": ("denied(lambda: syscall(68, 0x6e616e6f, 0o1600))", DENIED),
    "keyring": ("denied(lambda: syscall(250, 0, -4, 1))", DENIED),
    "bpf": ("denied(lambda: syscall(321, 0, ctypes.create_string_buffer(120), 120))", DENIED),
    "perf": (
        "denied(lambda: syscall(298, ctypes.create_string_buffer(120), 0, -1, -1, 0))",
        DENIED,
    ),
    "userfaultfd": ("denied(lambda: syscall(323, 1))", DENIED),
    "filter of its own": (
        "denied(lambda: syscall(317, 2, 0, ctypes.byref(ctypes.c_uint32(0))) or 1)",
        DENIED,
    ),
    "x32 system call": ("denied(lambda: syscall(0x40000000 | 39))", DENIED),
    # ---- network
    "loopback": (
        "denied(lambda: __import__('urllib.request').request.urlopen(f'http://127.0.0.1:{"
        "PORT}/search?q=answer').read())",
        DENIED + "|URLError",
    ),
    "socket by ctypes": ("denied(lambda: syscall(41, 2, 1, 0))", DENIED),
    "UDP": (
        "denied(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', "
        "('127.0.0.1', PORT)))",
        DENIED,
    ),
    "listen": ("s = None\ndenied(lambda: socket.create_server(('127.0.0.1', 0)))", DENIED),
    "unix socket": ("denied(lambda: socket.socket(socket.AF_UNIX).connect(UNIX))", DENIED),
    "abstract unix socket": (
        "denied(lambda: socket.socket(socket.AF_UNIX).connect('\\0nano-attack'))",
        DENIED + "|refused",
    ),
    "netlink": ("denied(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0))", DENIED),
    "datagram pair": (
        "denied(lambda: socket.socketpair(socket.AF_UNIX, "
        "socket.SOCK_DGRAM)[0].sendto(b'x', DATAGRAM))",
        DENIED,
    ),
    "pair of another family": (
        "for family in range(2, 46):\n    libc.socketpair(family, 1, 0, bytes(8))\n"
        "    assert ctypes.get_errno() == 1, family\nprint('PermissionError')",
        "^PermissionError",
    ),
    "stream pair that connects": (
        "a, b = socket.socketpair(); b.close()\ndenied(lambda: a.connect(UNIX))",
        DENIED,
    ),
    # ---- the session itself
    "stdin": ("input()", "EOFError"),
    "class of the session": (
        "import pickle\nclass A: pass\ntype(pickle.loads(pickle.dumps(A()))) is A",
        "^True$",
    ),
    "unittest": (
        "import unittest\nclass T(unittest.TestCase):\n"
        "    def test(self): self.assertEqual(1, 2)\nunittest.main()",
        "FAIL: test",
    ),
    "unittest of two": (
        "import unittest\nclass T(unittest.TestCase):\n"
        "    def test_a(self): self.assertEqual(1, 2)\n    def test_b(self): pass\n"
        "unittest.main(argv=['x'], exit=False)",
        "(?s)Ran 2 tests.*failures=1",
    ),
    "name of the module": (
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    n: int\n"
        "import __main__, copy; __name__, __main__.A is A, copy.deepcopy(A(2))",
        r"^\('__main__', True, A\(n=2\)\)$",
    ),
    "copy": (
        "import shutil\nopen('a', 'w').write('x'); os.mkdir('d'); open('d/e', 'w').write('y')\n"
        "print(shutil.copy('a', 'b'), shutil.copy2('a', 'd'), shutil.copytree('d', 'f'))\n"
        "print(shutil.move('b', 'f'), sorted(os.listdir('f')), open('f/a').read())",
        r"^b d/a f\nf/b \['a', 'b', 'e'\] x$",
    ),
    "numpy": (
        "import importlib.util\nif importlib.util.find_spec('numpy'):\n    import numpy\n"
        "    print(int(numpy.arange(5).sum()))\nelse: print(10)",
        "^10$",
    ),
    "output without a line's end": ("print('said', end='')\nwhile True: pass", "^said\ntimeout"),
    "sys.exit": ("sys.exit(3)", "SystemExit: 3"),
    "os._exit": ("os._exit(7)", "died"),
    "segmentation fault": ("ctypes.string_at(1)", "died"),
    "abort": ("os.abort()", "died"),
    "close stdout": ("os.close(1)", "died|no output"),
    "close everything": ("os.closerange(0, 64)", "died"),
    "all bytes": ("os.write(1, bytes(range(256)))", "256"),
    "lone surrogate": ("print('\\ud800')", r"\?"),
    "syntax error": ("def", "SyntaxError"),
    "100,000 parentheses": ("(" * 100_000, "characters|Error|died"),
    "empty code": ("", r"\(no output\)"),
    "code of 1 MB": ("x = '" + "x" * 1_000_000 + "'; len(x)", "^1000000$"),
    "forged end": (
        "[os.write(fd, b'done\\n') for fd in range(3, 9) if fd and os.path.exists]\nprint('later')",
        "",
    ),
    "stop itself": ("os.kill(os.getpid(), 19); print('went on')", "^timeout"),
    "broken exception": (
        "class E(Exception):\n    def __str__(self): raise ValueError\nraise E",
        "E",
    ),
    "print replaced": (
        "import builtins\nbuiltins.print = None\n1/0",
        "died|ZeroDivisionError|TypeError",
    ),
}


def become(uid: int) -> None:
    """Become an ordinary user, who can still read where the interpreter is.

    An ambient capability sees to that, in case it is in root's home.
    """
    libc = ctypes.CDLL(None)
    libc.prctl(8, 1, 0, 0, 0)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    libc.capset(struct.pack("<Ii", 0x20080522, 0), struct.pack("<6I", 4, 4, 4, 0, 0, 0))
    libc.prctl(47, 2, 2, 0, 0)


def emulate(abi: int) -> None:
    """Let sessions be those of an older kernel, whose Landlock has this version."""
    asked = "return libc().syscall(444, None, ctypes.c_size_t(0), ctypes.c_uint32(1))"
    source = Path(cpython_sandbox.__file__).read_text()
    assert asked in source
    folder = tempfile.TemporaryDirectory()
    os.chmod(folder.name, 0o755)
    atexit.register(folder.cleanup)
    copy = Path(folder.name) / "cpython_sandbox.py"
    copy.write_text(source.replace(asked, f"return {abi}"))
    cpython_sandbox.__file__ = str(copy)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--unsafe", action="store_true")
    parser.add_argument("--uid", type=int, default=0)
    parser.add_argument("--only", default="")
    parser.add_argument("--abi", type=int, default=0, help="as if the kernel had this Landlock")
    parser.add_argument(
        "--third", type=int, default=None, help="0, 1 or 2: a sample of the attacks"
    )
    args = parser.parse_args()
    hits = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            hits.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"THE ANSWER")

        def log_message(self, *_):
            pass

    if args.uid:
        become(args.uid)
    if args.abi:
        emulate(args.abi)
    if args.unsafe and os.geteuid() == 0:
        sys.exit("tests/attacks.py: --unsafe only as an ordinary user (--uid N)")
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    os.environ["NANO_API_KEY"] = "secret"
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        folder.chmod(0o755)
        secret, victims = folder / "secret", folder / "victims"
        secret.write_text("the secret")
        os.set_inheritable(os.open(secret, os.O_RDONLY), True)
        victims.mkdir()
        victims.chmod(0o777)  # so that nothing but the sandbox protects them
        for name in ("append", "truncate", "delete", "rename", "chmod", "chown", "times", "xattr"):
            (victims / name).write_text("whole")
            (victims / name).chmod(0o666)
        listeners = [
            socket.socket(socket.AF_UNIX),
            socket.socket(socket.AF_UNIX),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM),
        ]
        for listener, address in zip(
            listeners, (str(folder / "unix"), "\0nano-attack", str(folder / "datagram"))
        ):
            listener.bind(address)
        for name in ("unix", "datagram"):
            (folder / name).chmod(0o777)
        listeners[0].listen()
        listeners[1].listen()
        state = lambda: sorted(
            (p.name, p.stat().st_mode, p.stat().st_uid, p.stat().st_size, p.stat().st_mtime)
            for p in victims.iterdir()
        )
        (folder / "link").symlink_to(secret)
        with contextlib.suppress(OSError):  # a file system without attributes
            os.setxattr(victims / "xattr", "user.kept", b"value")
        before = state()

        def attack(name: str) -> list:
            code, pattern = ATTACKS[name]
            decoy = subprocess.Popen(["sleep", "60"])
            limits = resource.prlimit(decoy.pid, resource.RLIMIT_NOFILE)
            names = dict(
                SECRET=str(secret),
                LINK=str(folder / "link"),
                INODE=secret.stat().st_ino,
                VICTIMS=str(victims),
                HOME=os.path.expanduser("~"),
                PARENT=os.getpid(),
                REPOSITORY=str(Path(__file__).resolve().parent.parent),
                DECOY=decoy.pid,
                PORT=web.server_address[1],
                UNIX=str(folder / "unix"),
                DATAGRAM=str(folder / "datagram"),
            )
            session = CPythonSession(timeout_s=60, unsafe=args.unsafe)
            try:
                session(code=HELP + "".join(f"{key} = {value!r}\n" for key, value in names.items()))
                session.timeout_s = (
                    0.7 if "timeout" in pattern.split("|")[0] else 60 if not args.unsafe else 3
                )
                text = session(code=code)
                alive = (
                    decoy.poll() is None
                    and resource.prlimit(decoy.pid, resource.RLIMIT_NOFILE) == limits
                )
                session.timeout_s = 60
                again = [
                    session(code="40 + 2"),
                    session(code="40 + 2"),
                ]  # whatever happened: the session works again
                return [
                    "BREACH" in text or not alive,
                    text[:150]
                    + text[150:][-150:]
                    + ("" if again[1].endswith("42") else f" [next call: {again}]"),
                ]
            finally:
                session.close()
                decoy.kill()
                decoy.wait()

        chosen = [
            name
            for name, (_, pattern) in ATTACKS.items()
            if re.search(args.only, name)
            and (not args.unsafe and not args.abi or pattern.startswith(DENIED))
        ]
        if args.third is not None:
            chosen = chosen[args.third :: 3]
        with concurrent.futures.ThreadPoolExecutor(1 if args.unsafe else 6) as pool:
            results = dict(zip(chosen, pool.map(attack, chosen)))
        comms = [str(p.pid) for p in psutil.process_iter() if p.name() == "nanoattack"]
        for pid in map(int, comms):
            os.kill(pid, signal.SIGKILL)
        session = CPythonSession(unsafe=args.unsafe)
        session.start()
        session.close()
        results["isolation"] = [False, session.isolation]
        results["files outside are unchanged"] = [state() != before, ""]
        results["no request arrived"] = [bool(hits), ""]
        results["no process is left"] = [bool(comms), " ".join(comms)]
    for trace in (
        "/dev/shm/nano-attack",
        os.path.expanduser("~/nano-attack"),
        sysconfig.get_path("purelib") + "/nano_attack.py",
    ):
        if os.path.exists(trace):
            os.remove(trace)
    if args.unsafe:
        subprocess.run(
            "ipcrm -M 0x6e616e6f; ipcrm -Q 0x6e616e6f", shell=True, stderr=subprocess.DEVNULL
        )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
