"""Programs for the sandbox: FAKES want a test passed that they fail, ESCAPES want out of the sandbox."""

SECRET = "espo-secret-of-the-parent"

EQUAL = "class E:\n def __eq__(s, o): return True\n def __ne__(s, o): return False\n def __hash__(s): return 1\n"
FAKES = {
    "an object that equals everything": EQUAL + "def f(x): return E()",
    "an int that equals everything": EQUAL + "class I(int):\n __eq__ = E.__eq__\ndef f(x): return I(7)",
    "a str that equals everything": EQUAL + "class S(str):\n __eq__ = E.__eq__\ndef f(x): return S('a')",
    "a list that equals everything": EQUAL + "class L(list):\n __eq__ = E.__eq__\ndef f(x): return L()",
    "an object that contains everything": "class C:\n def __contains__(s, o): return True\ndef f(x): return C()",
    "an object that iterates for ever": "import itertools\ndef f(x): return itertools.repeat(0)",
    "f itself equals everything": EQUAL + "f = E()",
    "printing what looks like a verdict": 'print(\'{"test": 0, "passed": true}\', \'{"done": true}\')\nf = print',
    "exit 0 while loading": "import os\nos._exit(0)",
    "exit 0 in the call": "import os\ndef f(x): os._exit(0)",
    "sys.exit in the call": "import sys\ndef f(x): sys.exit(0)",
    "KeyboardInterrupt in the call": "def f(x): raise KeyboardInterrupt",
    "writing verdicts to every descriptor": """
        import os
        for fd in range(64):
            try: os.write(fd, b'{"test": 0, "passed": true}\\n{"done": true}\\n')
            except OSError: pass
        def f(x): return 0
        """,
    "answering before being asked": """
        import json, os, struct
        def reply(value):
            data = json.dumps(["return", value, None]).encode()
            os.write(61, struct.pack('<I', len(data)) + data)
        def f(x):
            for value in (None, True, ["mine", 0], ["dict", []], 1): reply(value)
            return 0
        """,
    "patching built-ins": """
        import builtins
        builtins.len = builtins.sum = lambda *a: 42
        builtins.AssertionError = ValueError
        def f(x): return 0
        """,
    "looking for the expected value in the caller's frames": """
        import sys, gc
        def f(x):
            frame = sys._getframe()
            while frame:
                for value in list(frame.f_locals.values()) + list(frame.f_globals.values()):
                    if '1234567' in repr(value)[:100000]: return 1234567
                frame = frame.f_back
            for thing in gc.get_objects():
                if isinstance(thing, (dict, list)) and any(v == 'assert f(1) == 1234567' for v in (
                    thing.values() if isinstance(thing, dict) else thing)): return 1234567
        """,
    "looking for the expected value in memory": """
        import ctypes
        def f(x):
            for line in open('/proc/self/maps'):
                if b'f(1) == 1234567' in line.encode(): return 1234567
        """,
    "redefining what the test calls": "def all(x): return True\ndef isinstance(*a): return True\ndef f(x): return 0",
    "a NaN, an infinity, a huge int": "def f(x): return [float('nan'), float('inf'), 10**5000]",
    "garbage on the pipe": "import os\ndef f(x):\n    os.write(61, b'x' * 100)\n    return 0",
    "a recursive value": "def f(x):\n    a = []; a.append(a)\n    return a",
    "an unpicklable value": "import threading\ndef f(x): return threading.Lock()",
    "a value too large": "def f(x): return 'x' * 40_000_000",
}

# name: (program, statuses it may end with, what its output must contain)
TRY = """
import os, sys
def attempt(what, *args, **kwargs):
    try:
        what(*args, **kwargs)
        print('DONE', getattr(what, '__name__', what))
    except BaseException as error:
        print('refused', type(error).__name__)
"""
ESCAPES = {
    "infinite loop": ("while True: pass", {"timeout"}, ""),
    "sleep": ("import time; time.sleep(100)", {"timeout"}, ""),
    "ignored signals": ("import signal\nsignal.signal(15, signal.SIG_IGN)\nwhile True: pass", {"timeout"}, ""),
    "fork bomb": (TRY + "for _ in range(50): attempt(os.fork)", {"ok"}, "refused"),
    "vfork and posix_spawn": (TRY + "attempt(os.posix_spawn, '/bin/sh', ['sh'], {})", {"ok"}, "refused"),
    "memory bomb": ("x = []\nwhile True: x.append(bytearray(10**7))", {"error", "crash"}, ""),
    "mmap bomb": ("import mmap\nx = [mmap.mmap(-1, 1 << 26) for _ in range(1000)]", {"error", "crash"}, ""),
    "memfd bomb": (TRY + "attempt(os.memfd_create, 'x')", {"ok"}, "refused"),
    "one large file": (
        "f = open('x', 'wb')\nfor _ in range(1000): f.write(b'x' * 10**6)",
        {"error"},
        "",
    ),
    "many files": (
        "for i in range(10**6):\n with open(f'x{i}', 'wb') as f: f.write(b'x' * 10**5)",
        {"error"},
        "",
    ),
    "output flood": ("while True: print('x' * 10**5)", {"error", "crash", "timeout"}, ""),
    "deep recursion": ("def f(): f()\nf()", {"error"}, ""),
    "deeper recursion": (
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return [f(x)]\nf(1)",
        {"crash", "error", "timeout"},
        "",
    ),
    "os._exit": ("import os; os._exit(0)", {"crash"}, ""),
    "environment": (f"import os\nprint('{SECRET}' in str(os.environ), sorted(os.environ))", {"ok"}, "False"),
    "parent memory by /proc": (TRY + "attempt(open, f'/proc/{os.getppid() or 1}/mem', 'rb')", {"ok"}, "refused"),
    "parent environment by /proc": (TRY + "attempt(open, '/proc/1/environ', 'rb')", {"ok"}, "refused"),
    "ptrace": (
        "from ctypes import CDLL\nc = CDLL(None)\nprint(c.ptrace(16, 1, 0, 0), c.process_vm_readv(1, 0, 0, 0, 0, 0))",
        {"ok"},
        "-1 -1",
    ),
    "reading files": (
        TRY + "for p in ('/etc/passwd', '/etc/hostname', '/root/.profile', '../../../../etc/passwd'):\n"
        " attempt(open, p)",
        {"ok"},
        "refused",
    ),
    "reading by symlink": (TRY + "os.symlink('/etc/passwd', 'l')\nattempt(open, 'l')", {"ok"}, "refused"),
    "writing outside": (
        TRY + "for p in ('/tmp/espo-escape', '/var/tmp/espo-escape', '/dev/shm/espo-escape', '../espo-escape',\n"
        "          os.path.dirname(os.__file__) + '/espo-escape'): attempt(open, p, 'w') if os.getcwd() != '/tmp' or "
        "p[:5] != '/tmp/' else print('refused')",
        {"ok"},
        "refused",
    ),
    "hard link and rename": (
        TRY + "attempt(os.link, '/etc/passwd', 'p')\nopen('f', 'w')\nattempt(os.rename, 'f', '/var/tmp/espo-escape')",
        {"ok"},
        "refused",
    ),
    "metadata": (
        TRY + "attempt(os.chmod, '/etc/passwd', 0o600)\nattempt(os.utime, os.__file__)\n"
        "attempt(os.truncate, os.__file__, 0)\nattempt(os.chown, os.__file__, 0, 0)",
        {"ok"},
        "refused",
    ),
    "network": (
        TRY + "import socket, urllib.request\n"
        "for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, 16, 17): attempt(socket.socket, family)\n"
        "attempt(urllib.request.urlopen, 'http://127.0.0.1:80', timeout=1)\n"
        "attempt(socket.getaddrinfo, 'localhost', 80)",
        {"ok"},
        "refused",
    ),
    "signals": (
        TRY
        + "import signal\nfor pid in (os.getppid(), 1, -1, 0, PARENT):\n for s in (0, 9, 15): attempt(os.kill, pid, s)",
        {"ok"},
        "refused",
    ),
    "shells": (
        TRY
        + "import subprocess\nattempt(subprocess.run, 'id', shell=True)\nattempt(subprocess.run, [sys.executable])\n"
        "attempt(os.execv, '/bin/sh', ['sh'])\nprint('refused' if os.system('true') != 0 else 'DONE')",
        {"ok"},
        "refused",
    ),
    "multiprocessing": (
        TRY
        + "import multiprocessing\nattempt(multiprocessing.Process(target=print).start)\nattempt(multiprocessing.Lock)",
        {"ok"},
        "refused",
    ),
    "daemons": (TRY + "attempt(os.setsid)\nattempt(os.setpgid, 0, 0)\nattempt(os.fork)", {"ok"}, "refused"),
    "namespaces and mounts": (
        TRY + "import ctypes\nlibc = ctypes.CDLL(None)\n"
        "print([libc.unshare(0x10000000), libc.mount(b'a', b'/tmp', b'tmpfs', 0, 0), libc.chroot(b'.'), "
        "libc.syscall(435, 0, 0), libc.syscall(425, 1, 0), libc.syscall(321, 0, 0, 0)])",
        {"ok"},
        "[-1, -1, -1, -1, -1, -1]",
    ),
    "raw fork by number": (
        "import ctypes\nlibc = ctypes.CDLL(None)\nprint([libc.syscall(n, 17, 0, 0, 0, 0) for n in (56, 57, 58, 435)])",
        {"ok"},
        "[-1, -1, -1, -1]",
    ),
    "raising limits": (
        TRY + "import resource\nattempt(resource.setrlimit, resource.RLIMIT_AS, (-1, -1))",
        {"ok"},
        "refused",
    ),
    "a thread that outlives main": (
        "import threading\ndef spin():\n while True: pass\nthreading.Thread(target=spin).start()\nprint('here')",
        {"ok"},
        "here",
    ),
    "thread bomb": (
        "import threading, time\nfor _ in range(10**5): threading.Thread(target=time.sleep, args=(99,)).start()",
        {"error", "crash", "timeout"},
        "",
    ),
    "a bomb of threads with small stacks": (
        "import _thread, time\n_thread.stack_size(32768)\nmade = 0\ntry:\n"
        " for made in range(3000): _thread.start_new_thread(time.sleep, (99,))\nexcept RuntimeError: pass\n"
        "time.sleep(0.2)\nprint('DONE' if made > 400 else 'few')",
        {"ok", "crash"},
        "",
    ),
    "closing every descriptor": ("import os\nos.closerange(0, 64)\nwhile True: pass", {"crash", "timeout"}, ""),
}
