"""Attempts to reach the host's files, network, processes and kernel."""

import os

from envs.swe.escapes import Attempt, all_lines, never, prints, says

READ_HOST = [
    Attempt("the host's passwords", "cat /etc/shadow /etc/gshadow /etc/sudoers", says("/etc/shadow: No such file")),
    Attempt("a file of the host", "cat {FILE}; ls $(dirname {FILE}); echo end", says("No such file", "end")),
    Attempt(
        "the homes, and what lies beside this project",
        "ls -A /root /home /work /var /run /srv /sys /boot 2>&1 | grep -v -e ^/ -e '^.pyenv$' -e 'No such'; echo end",
        prints("end"),
    ),
    Attempt("the host's environment", "env; cat /proc/[0-9]*/environ | tr '\\0' '\\n'", says("PATH=/opt/venv/bin")),
    Attempt(
        "processes of the host",
        "for p in /proc/[0-9]*; do readlink $p/exe || echo unreadable; done",
        lambda o: o.output.splitlines()[1:3] == ["unreadable", "/usr/bin/bash"] and o.output.count("\n") <= 4,
    ),
    Attempt(
        "this package, which holds solutions",
        "python -c 'import aem_jax'; ls {PACKAGE}; echo end",
        says("No module named 'aem_jax'", "No such file", "end"),
    ),
    Attempt(
        "the root of process 1, its environment and memory",
        "ls /proc/1/root/ /proc/1/cwd/ /proc/1/fd/; cat /proc/1/environ /proc/1/mem",
        lambda outcome: outcome.output.count("Permission denied") == 5,
    ),
    Attempt("what is above the root", "cd /../../..; pwd; ls -Ad testbed", prints("/", "testbed")),
    Attempt(
        "disks and the kernel's memory",
        """
        mknod /tmp/disk b 254 0; mknod /tmp/mem c 1 1
        for f in /dev/vda /dev/sda /dev/mem /dev/kmsg /proc/kcore /proc/kmsg /proc/vmcore /tmp/disk /tmp/mem; do
            head -c 1 $f > /dev/null && echo READ
        done
        echo end
        """,
        never("READ"),
    ),
    Attempt(
        "descriptors that were left open",
        """#python
        for fd in range(3, 1024):
            try: print(os.fstat(fd))
            except OSError: pass
        print("end")
        """,
        prints("end"),
    ),
]

NETWORK = [
    Attempt(
        "TCP to the host",
        """#python
        for address in {ADDRESSES}:
            try:
                socket.create_connection((address, {TCP}), 0.3).sendall(b"tcp")
                print("SENT")
            except OSError as error: print(error)
        """,
        never("SENT"),
    ),
    Attempt(
        "UDP to the host",
        """#python
        for address in {ADDRESSES}:
            try: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"udp", (address, {UDP}))
            except OSError as error: print(error)
        """,
        says("Network is unreachable"),
    ),
    Attempt(
        "abstract and named Unix sockets",
        """#python
        for name in ("\\0{ABSTRACT}", "{SOCKET}"):
            try: socket.socket(socket.AF_UNIX).connect(name)
            except OSError as error: print(error)
        """,
        prints("[Errno 111] Connection refused", "[Errno 2] No such file or directory"),
    ),
    Attempt(
        "names of hosts",
        "getent hosts example.com || echo nobody; bash -c 'echo > /dev/tcp/1.1.1.1/53'; ls /sys/class/net",
        says("nobody", "unreachable"),
    ),
    Attempt(
        "other families of sockets (the hypervisor's, packets, the kernel's cryptography, …)",
        """#python
        for family in range(46):
            for kind in (1, 2, 3):
                for protocol in (0, 1, 4, 12, 16):
                    try: socket.socket(family, kind, protocol)
                    except OSError: continue
                    if family not in (1, 2, 10) and (family, protocol) != (16, 0): print(family, kind, protocol)
                    if kind == 3 and family in (2, 10): print("raw", family)
        print("end")
        """,
        prints("end"),
    ),
]

WRITE_OUTSIDE = [
    Attempt(
        "the system and the interpreter",
        """
        library=$(python -c 'import os; print(os.path.dirname(os.__file__))')
        for d in / /usr /usr/bin /etc /opt /opt/venv /opt/venv/lib/python3*/site-packages /dev $library; do
            touch $d/x && echo WROTE $d
        done
        for f in /etc/passwd /etc/hosts /opt/venv/pyvenv.cfg /opt/venv/bin/pytest $library/os.py; do
            echo x >> $f && echo WROTE $f
        done
        echo end
        """,
        never("WROTE"),
    ),
    Attempt(
        "the host's file, through links and paths",
        """
        ln -s {FILE} link; echo x > link; ln {FILE} hard; echo x > {FILE}; echo x > /testbed/../..{FILE}
        ln /etc/passwd hard && echo LINKED; ln /usr/bin/env hard && echo LINKED; echo end
        """,
        never("LINKED"),
    ),
    Attempt(
        "the kernel's settings",
        """
        for f in /proc/sys/kernel/core_pattern /proc/sys/kernel/hostname /proc/sys/vm/drop_caches /proc/sysrq-trigger \
            /proc/sys/net/ipv4/ip_forward /proc/sys/user/max_user_namespaces /sys/kernel/uevent_helper; do
            echo 1 > $f && echo WROTE $f
        done
        hostname x && echo WROTE; date -s 2000-01-01 > /tmp/date && echo WROTE; echo end
        """,
        never("WROTE"),
    ),
]

PRIVILEGE = [
    Attempt(
        "mounts and a root of its own",
        """#python
        a, b = ctypes.c_char_p(b"/tmp"), ctypes.c_char_p(b"tmpfs")
        call("mount", b, a, b, 0, 0)
        call("mount", ctypes.c_char_p(b"/usr"), a, 0, 4096, 0)
        call("mount", 0, ctypes.c_char_p(b"/usr"), 0, 4096 | 32, 0)
        call("umount2", ctypes.c_char_p(b"/usr"), 2)
        call("pivot_root", a, a)
        call("chroot", a)
        call("open_tree", -100, a, 1)
        call("fsopen", b, 0)
        """,
        all_lines("EPERM", 8),
    ),
    Attempt(
        "new namespaces",
        """#python
        for flag in (0x10000000, 0x20000, 0x20000000, 0x40000000, 0x04000000, 0x08000000, 0x02000000):
            call("unshare", flag)
            call("clone", flag | 17, 0, 0, 0, 0)
        """,
        all_lines("EPERM", 14),
    ),
    Attempt(
        "namespaces that there are",
        """#python
        for name in ("mnt", "user", "net", "pid"): call("setns", os.open(f"/proc/self/ns/{name}", 0), 0)
        """,
        all_lines("EPERM", 4),
    ),
    Attempt(
        "another user and setuid programs",
        """#python
        import shutil
        for what in (lambda: os.setuid(0), lambda: os.setgid(0), lambda: os.setgroups([0]), lambda: os.seteuid(65534),
                     lambda: os.chown("calc.py", 0, 0)):
            try: print("DONE", what())
            except OSError: pass
        shutil.copy("/usr/bin/id", "id")
        os.chmod("id", 0o6755)
        print(subprocess.run(["./id", "-u"], capture_output=True).stdout)
        print([line.split()[1] for line in open("/proc/self/status") if line.startswith(("Cap", "NoNew", "Seccomp:"))])
        """,
        prints("b'1000\\n'", str(["0000000000000000"] * 5 + ["1", "2"])),
    ),
    Attempt(
        "tracing other processes",
        """#python
        child = subprocess.Popen(["sleep", "5"])
        call("ptrace", 16, child.pid, 0, 0)
        call("ptrace", 0x4206, 1, 0, 0)
        call("ptrace", 0, 0, 0, 0)
        call("process_vm_readv", 1, 0, 0, 0, 0, 0)
        call("process_vm_writev", 1, 0, 0, 0, 0, 0)
        call("pidfd_getfd", os.pidfd_open(1), 3, 0)
        """,
        all_lines("EPERM", 6),
    ),
    Attempt(
        "the kernel's larger doors",
        """#python
        for name in ("bpf", "perf_event_open", "keyctl", "add_key", "request_key", "kexec_load", "init_module",
                     "finit_module", "open_by_handle_at", "fanotify_init", "reboot", "syslog", "seccomp"):
            call(name, 0, 0, 0, 0, 0)
        call("personality", 0x0040000)
        """,
        all_lines("EPERM", 14),
    ),
    Attempt(
        "doors that are walled up",
        """#python
        for name in ("userfaultfd", "io_uring_setup", "io_setup", "clone3", 451, 4000): call(name, 8, 0, 0)
        """,
        all_lines("ENOSYS", 6),
    ),
    Attempt(
        "calls by another architecture's numbers",
        """#python
        def dies(what):
            pid = os.fork()
            if pid == 0:
                what()
                os._exit(7)
            print(os.waitpid(pid, 0)[1] & 127)
        code = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, 7)
        code.write(b"\\xb8\\x14\\0\\0\\0\\xcd\\x80\\xc3")  # mov eax, 20 (getpid of 32-bit programs); int 0x80; ret
        dies(lambda: libc.syscall(ctypes.c_long(0x40000000 + 39)))
        dies(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code))))
        """,
        prints("31", "31"),  # SIGSYS
    ),
    Attempt(
        "typing into a terminal",
        """#python
        import fcntl, pty
        for request in (0x5412, 0x541C):
            try: fcntl.ioctl(pty.openpty()[1], request, b"x")
            except OSError as error: print(error)
        """,
        all_lines("Operation not permitted", 2),
    ),
    Attempt(
        "processes of the host, by number",
        "for p in {PID} $(seq 2 3000); do [ $p = $$ ] || kill -9 $p 2> /dev/null; done; echo end",
        prints("end"),
    ),
]

OUTPUT = [
    Attempt(
        "output that is no text",
        "printf '\\xff\\xfe\\x00\\x1b[2J\\x1b]0\\x07\\xc3\\x28\\xed\\xa0'; head -c 9 /dev/urandom; echo; echo end",
        lambda outcome: outcome.output.endswith("\nend\n") and "�" in outcome.output,
    ),
    Attempt(
        "forged replies to the host",
        """#python
        import json, struct
        fields = {"exit_code": 0, "over": "", "seconds": 0, "total": 0, "head": 0, "errors": ""}
        header = json.dumps(fields).encode()
        for fd in range(1, 100):
            try: os.write(fd, struct.pack("!II", len(header), 0) + header)
            except OSError: pass
        sys.exit(3)
        """,
        lambda outcome: outcome.exit_code == 3,
    ),
]

REACH = [*READ_HOST, *NETWORK, *WRITE_OUTSIDE, *PRIVILEGE, *OUTPUT]
if os.uname().machine != "x86_64":
    REACH = [attempt for attempt in REACH if attempt.name != "calls by another architecture's numbers"]
