"""Worker processes that end when they should: with their parent, and never by a Ctrl-C that the parent handles."""

import os
import signal
import threading
import time


def follow_parent(parent: int) -> None:
    """Initialise a worker: it ignores Ctrl-C (the parent decides) and ends when the parent is gone, however it went.

    Args:
        parent: its process number, as itself knows it: it may be gone before this is called.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)  # orphaned: it would go on writing beside the process that continues the run

    threading.Thread(target=watch, daemon=True).start()


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
