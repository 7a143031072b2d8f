"""A python program with threads, a child process behind pipes, an open file and a big array.

It verifies itself all the time; SIGUSR1 makes it write a verdict, SIGTERM ends it. Usage: threads.py DIR
"""

import array
import hashlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time

CONTROL = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
THREADS = 4


class Checker:
    """Counts comparisons and remembers the failed ones."""

    def __init__(self):
        self.lock = threading.Lock()
        self.checks = 0
        self.failures = []

    def equal(self, what, got, want):
        with self.lock:
            self.checks += 1
            if got != want and len(self.failures) < 40:
                self.failures.append(f"{what}: is {got!r}, should be {want!r}")


class Chain(threading.Thread):
    """Hashes a counter over and over; every state follows from the number of rounds alone."""

    def __init__(self, number, checker):
        super().__init__(name=f"chain-{number}", daemon=True)
        self.number = number
        self.checker = checker
        self.rounds = 0
        self.local = threading.local()
        self.jobs = queue.Queue()
        self.answers = queue.Queue()

    def run(self):
        self.local.secret = self.number * 1000
        ident = threading.get_native_id()
        state = b"%d" % self.number
        while True:
            for _ in range(200):
                state = hashlib.sha256(state).digest()
                self.rounds += 1
            self.checker.equal("thread-local value", self.local.secret, self.number * 1000)
            self.checker.equal("native thread id", threading.get_native_id(), ident)
            try:
                self.jobs.get(timeout=0.01)
            except queue.Empty:
                continue
            self.answers.put((self.rounds, state))

    def verify(self):
        """Asks for the state and computes it a second time."""
        self.jobs.put(None)
        rounds, state = self.answers.get(timeout=20)
        known, again = getattr(self, "known", (0, b"%d" % self.number))
        self.checker.equal("a thread goes on", rounds > known, True)
        for _ in range(rounds - known):
            again = hashlib.sha256(again).digest()
        self.checker.equal("state of a hash chain", state, again)
        self.known = rounds, again


class Meter(threading.Thread):
    """Longest gap between two looks at the clock."""

    def __init__(self):
        super().__init__(name="meter", daemon=True)
        self.longest = 0.0

    def run(self):
        last = time.monotonic()
        while True:
            time.sleep(0.001)
            now = time.monotonic()
            self.longest = max(self.longest, now - last)
            last = now


class Echo:
    """A child process that answers line by line."""

    PROGRAM = "import sys\nfor line in sys.stdin: print(line.strip()[::-1], flush=True)\n"

    def __init__(self):
        command = [sys.executable, "-u", "-c", self.PROGRAM]
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.count = 0

    def verify(self, checker):
        self.count += 1
        line = f"question {self.count}"
        self.child.stdin.write(line + "\n")
        self.child.stdin.flush()
        checker.equal("answer of the child", self.child.stdout.readline(), line[::-1] + "\n")
        checker.equal("child is alive", self.child.poll(), None)


class Notes:
    """A file that grows by one line per verdict, read back through the same description."""

    def __init__(self, directory):
        self.file = open(os.path.join(directory, "notes"), "w+")
        self.lines = []

    def verify(self, checker):
        self.lines.append(f"line {len(self.lines)}\n")
        self.file.write(self.lines[-1])
        self.file.flush()
        position = self.file.tell()
        self.file.seek(0)
        checker.equal("lines of the file", self.file.readlines(), self.lines)
        checker.equal("position in the file", self.file.tell(), position)


def identity():
    return {
        "pid": os.getpid(),
        "pgid": os.getpgrp(),
        "sid": os.getsid(0),
        "cwd": os.getcwd(),
        "mask": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "argv": sys.argv,
        "exe": os.readlink("/proc/self/exe"),
    }


def main():
    directory = sys.argv[1]
    requests = queue.SimpleQueue()
    for number in CONTROL:
        signal.signal(number, lambda number, frame: requests.put(number))
    checker = Checker()
    numbers = array.array("Q", (n * n for n in range(2_000_000)))
    digest = hashlib.sha256(numbers).hexdigest()
    chains = [Chain(number, checker) for number in range(THREADS)]
    meter = Meter()
    for thread in (*chains, meter):
        thread.start()
    echo = Echo()
    notes = Notes(directory)
    echo.verify(checker)
    before = identity()
    print("READY", flush=True)
    seq = 0
    started = time.monotonic()
    while time.monotonic() - started < 900:
        time.sleep(0.05)
        checker.equal("identity", identity(), before)
        if requests.empty():
            continue
        request = requests.get()
        if request == signal.SIGUSR2:
            meter.longest = 0.0
            seq += 1
            write(directory, seq, checker, meter)
            continue
        checker.equal("digest of the array", hashlib.sha256(numbers).hexdigest(), digest)
        for chain in chains:
            chain.verify()
        echo.verify(checker)
        notes.verify(checker)
        seq += 1
        write(directory, seq, checker, meter)
        if request == signal.SIGTERM:
            break
    echo.child.stdin.close()
    status = echo.child.wait(timeout=10)
    sys.exit(1 if checker.failures or status else 0)


def write(directory, seq, checker, meter):
    verdict = {
        "workload": "threads.py",
        "pid": os.getpid(),
        "seq": seq,
        "ok": not checker.failures,
        "checks": checker.checks,
        "failures": checker.failures,
        "longest_pause_us": int(meter.longest * 1e6),
    }
    path = os.path.join(directory, "verdict.root.json")
    with open(path + ".new", "w") as file:
        json.dump(verdict, file)
    os.rename(path + ".new", path)


main()
