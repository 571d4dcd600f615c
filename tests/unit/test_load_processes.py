"""What is observed of a run's processes."""

from __future__ import annotations

import subprocess
import sys

from loadtest.processes import _Trees

PARENT = """
import subprocess, sys
sys.stdin.readline()
subprocess.run([sys.executable, "-c", sys.argv[1]])
"""
CHILD = """
import sys, time
while time.process_time() < 0.3:
    pass
print("done", flush=True)
sys.stdin.readline()
"""


def test_a_child_counts_from_its_birth_and_not_from_when_it_is_seen() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        trees = _Trees([parent.pid])
        assert trees.usage(1.0).cpu_percent == 0.0
        parent.stdin.write("go\n")
        assert parent.stdout.readline() == "done\n"
        assert trees.usage(1.0).cpu_percent >= 29.0
        parent.stdin.write("end\n")
    assert trees.usage(1.0).memory_mb == 0.0
