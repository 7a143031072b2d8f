"""The program that scripts/demo checkpoints: a busy one that checks itself, all the time.

    demo.py DIR

It holds 64 MiB of memory with a checksum for each MiB, two threads that count, a child process that answers questions
through two pipes, a file that only it appends to, and a pipe that always has something in it. Each tick uses and
checks all of them and writes a line to DIR/log. On SIGTERM it checks everything once more and ends with exit code 0;
the first thing that is not as it was left ends it with a line `FAILED: …` and exit code 1.
"""

import os
import signal
import sys
import threading
import time
import zlib

MIB = 1 << 20
BLOCKS = 64


def child(questions, answers):
    """Answers each number with its square, how many questions there were, and its pid."""
    asked = 0
    while question := os.read(questions, 64):
        asked += 1
        os.write(answers, b"%d %d %d" % (int(question) ** 2, asked, os.getpid()))
    os._exit(0)


class Counter(threading.Thread):
    """A thread with a number of its own, which it must find as it left it."""

    def __init__(self):
        super().__init__(daemon=True)
        self.local = threading.local()
        self.count = 0
        self.broken = False

    def run(self):
        self.local.count = 0
        while not self.broken:
            time.sleep(0.005)
            self.local.count += 1
            self.count += 1
            self.broken = self.local.count != self.count


class Program:
    def __init__(self, directory):
        self.pid = os.getpid()
        self.log = open(f"{directory}/log", "a", buffering=1)
        questions, self.ask = os.pipe()
        self.answer, answers = os.pipe()
        self.child_pid = os.fork()
        if self.child_pid == 0:
            os.close(self.ask)
            os.close(self.answer)
            child(questions, answers)
        os.close(questions)
        os.close(answers)
        self.journal = os.open(f"{directory}/journal", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        self.journal_crc = 0
        self.memory = bytearray(os.urandom(BLOCKS * MIB))
        self.sums = [zlib.crc32(self.block(i)) for i in range(BLOCKS)]
        self.read_end, self.write_end = os.pipe()
        os.write(self.write_end, b"tick 0")
        self.threads = [Counter(), Counter()]
        self.seen = [-1, -1]
        for thread in self.threads:
            thread.start()
        self.stop = False
        signal.signal(signal.SIGTERM, self.on_term)

    def on_term(self, *_):
        self.stop = True

    def block(self, i):
        return memoryview(self.memory)[i * MIB : (i + 1) * MIB]

    def check_block(self, i):
        expect(zlib.crc32(self.block(i)) == self.sums[i], f"MiB {i} of memory has changed")

    def check_journal(self):
        content = os.pread(self.journal, os.fstat(self.journal).st_size, 0)
        expect(zlib.crc32(content) == self.journal_crc, "the journal does not hold what was appended")

    def tick(self, n):
        expect(os.getpid() == self.pid, f"pid is {os.getpid()}, was {self.pid}")

        self.check_block(n % BLOCKS)
        self.memory[n % BLOCKS * MIB + n % MIB] ^= 0x5A
        self.sums[n % BLOCKS] = zlib.crc32(self.block(n % BLOCKS))

        expect(os.read(self.read_end, 64) == b"tick %d" % (n - 1), "the pipe does not hold what was written")
        os.write(self.write_end, b"tick %d" % n)

        os.write(self.ask, b"%d" % n)
        answer = [int(word) for word in os.read(self.answer, 64).split()]
        expect(answer == [n * n, n, self.child_pid], f"the child answered {answer}")

        line = b"entry %d\n" % n
        os.write(self.journal, line)
        self.journal_crc = zlib.crc32(line, self.journal_crc)
        self.check_journal()

        time.sleep(0.02)
        for i, thread in enumerate(self.threads):
            expect(thread.is_alive() and not thread.broken, f"thread {i} lost its count")
        self.log.write(f"tick {n} pid {self.pid} child {self.child_pid} counts {[t.count for t in self.threads]}\n")

    def run(self):
        n = 0
        while not self.stop:
            n += 1
            self.tick(n)
            if n % 10 == 0:
                counts = [thread.count for thread in self.threads]
                expect(all(now > before for now, before in zip(counts, self.seen)), "a thread stands still")
                self.seen = counts
        for i in range(BLOCKS):
            self.check_block(i)
        os.close(self.ask)
        expect(os.waitpid(self.child_pid, 0) == (self.child_pid, 0), "the child did not end with exit code 0")
        self.log.write(f"finished after {n} ticks: memory, threads, child, journal and pipe are as they should be\n")


def expect(condition, complaint):
    if not condition:
        raise AssertionError(complaint)


if __name__ == "__main__":
    # Whatever a terminal or shell has left open is not part of the show.
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    program = Program(sys.argv[1])
    try:
        program.run()
    except Exception as error:  # whatever goes wrong is the demo's verdict
        program.log.write(f"FAILED: {error!r}\n")
        os.kill(program.child_pid, signal.SIGKILL)
        sys.exit(1)
