"""Attempts to exceed the limits on processes, memory, disk, output and time."""

from envs.swe.escapes import SHORT, Attempt, all_lines, fits, killed, prints

RESOURCES = [
    Attempt("a fork bomb", ":(){ :|:& };:\nsleep 50", killed("processes", "not done"), SHORT),
    Attempt(
        "a fork bomb, deaf to signals, whose parents go on in sessions of their own",
        """#python
        for s in range(1, 65):
            try: signal.signal(s, signal.SIG_IGN)
            except (OSError, ValueError): pass
        while True:
            try: os.fork() and os.setsid()
            except OSError: pass
        """,
        killed("processes", "memory", "not done"),
        SHORT,
    ),
    Attempt(
        "threads without end",
        """#python
        threading.stack_size(65536)
        try:
            for n in range(500): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()
        except RuntimeError: pass
        print(n < 30, flush=True)
        os._exit(0)
        """,
        prints("True"),
    ),
    Attempt(
        "filling every disk there is",
        """
        for d in /testbed /tmp /dev/shm /dev / /opt /etc /run /var /home /proc; do
            for i in 0 1 2 3 4 5 6 7; do head -c 4M /dev/zero > $d/big$i; done
        done 2>&1 | sort | uniq -c
        du --apparent-size -cBM /testbed /tmp /dev/shm 2> /dev/null | tail -1 | tr -dc 0-9
        """,
        fits,
    ),
    Attempt(
        "a sparse file of a terabyte",
        "truncate -s 1T a; dd if=/dev/zero of=b bs=1 count=1 seek=1T; fallocate -l 1T c; stat -c %s a b c | sort -u",
        lambda outcome: outcome.output.endswith("\n0\n"),
    ),
    Attempt(
        "files without end",
        """#python
        for d in range(100):
            os.mkdir(f"d{d}")
            for f in range(1000): os.mknod(f"d{d}/{f}")
        """,
        killed("files"),
    ),
    Attempt(
        "memory of one process",
        """#python
        try: print(len(bytearray(2**28)))
        except MemoryError: print("refused")
        """,
        prints("refused"),
    ),
    Attempt(
        "memory of several processes",
        "for i in 1 2 3 4; do python -c 'import time; x = bytearray(90 << 20); time.sleep(50)' & done; wait",
        killed("memory"),
    ),
    Attempt(
        "memory hidden in shared mappings",
        """#python
        for i in range(20):
            if os.fork() == 0:
                m = mmap.mmap(-1, 100 << 20)
                for at in range(0, len(m), 4096): m[at] = 1
                m.madvise(mmap.MADV_DONTNEED)
                time.sleep(50)
        time.sleep(50)
        """,
        killed("memory"),
    ),
    Attempt(
        "memory hidden in sockets",
        """#python
        for i in range(4):
            if os.fork() == 0:
                keep = []
                while True:
                    try:
                        keep.extend(socket.socketpair())
                        keep[-1].setblocking(False)
                        while True: keep[-1].send(bytes(65536))
                    except BlockingIOError: pass
                    except OSError: time.sleep(50)
        time.sleep(50)
        """,
        killed("memory"),
    ),
    Attempt(
        "memory that belongs to no process",
        """#python
        call("memfd_create", ctypes.c_char_p(b"x"), 0)
        call("shmget", 0, 1 << 20, 0o1600)
        call("msgget", 0, 0o1600)
        call("semget", 0, 1, 0o1600)
        """,
        all_lines("ENOSYS", 4),
    ),
    Attempt(
        "output without end",
        "head -c 500M /dev/zero; echo end",
        lambda o: o.output.endswith("end\n") and "bytes of output cut out" in o.output and len(o.output) < 9000,
    ),
]

TIME = [
    Attempt(
        "children that outlive their command",
        """
        (setsid nohup bash -c 'trap "" TERM HUP INT; while :; do echo x >> /tmp/alive; sleep 0.01; done' &> /dev/null &)
        while [ ! -s /tmp/alive ]; do sleep 0.01; done
        echo started
        """,
        prints("started"),
    ),
    Attempt(
        "a deadline, deaf to signals",
        "trap '' TERM INT HUP QUIT CHLD; while :; do sleep 1; done",
        lambda outcome: outcome.timed_out and outcome.exit_code is None and outcome.seconds < 10,
        SHORT,
    ),
    Attempt("holding the output open", "sleep 60 & disown; exec >&- 2>&-; sleep 0.1", lambda o: o.exit_code == 0),
    Attempt(
        "signals to process 1",
        "for s in KILL STOP INT TERM HUP USR1 CHLD SEGV TSTP; do kill -$s 1; done; echo alive",
        prints("alive"),
    ),
    Attempt("stopping everything", "kill -STOP -1; kill -STOP $$; echo on", killed("not done"), SHORT),
    Attempt(
        "limits, priority and processors of process 1",
        """#python
        zero = (ctypes.c_ulong * 2)(0, 0)
        for limit in (0, 2, 7, 9): call("prlimit64", 1, limit, zero, 0)
        call("setpriority", 0, 1, 19)
        call("setpriority", 2, 0, 19)
        call("sched_setaffinity", 1, 8, zero)
        call("sched_setscheduler", 1, 5, zero)
        """,
        all_lines("EPERM", 8),
    ),
    Attempt(
        "files of process 1 in /proc",
        """
        for f in oom_score_adj mem clear_refs $(printf 'fd/%s ' $(seq 0 30)); do echo 1000 > /proc/1/$f; done
        """,
        all_lines("Permission denied", 34),
    ),
]

TAKE = [*RESOURCES, *TIME]
