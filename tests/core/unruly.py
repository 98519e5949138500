"""Run as a program by `test_trying.py`: some names are well-behaved, others take the process down."""

from __future__ import annotations

import os
import signal
import sys
import time

from hasten.core.diagnosis import Finding
from hasten.core.trying import report


def examine(name: str) -> Finding:
    match name:
        case "crashes":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "leaves":
            os._exit(3)
        case "hangs":
            time.sleep(60)
        case "exits":
            sys.exit("enough")
        case "raises":
            raise RuntimeError("no kernel\nimage")
        case _:
            print("chatter", end="")
    return Finding(kind="test", name=name, status="usable", detail=f"on {sys.argv[1]}")


if __name__ == "__main__":
    report("test", sys.argv[2:], examine)
