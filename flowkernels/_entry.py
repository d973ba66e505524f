"""Ctrl-C while the command's imports run ends it with a line, not with a traceback through torch's. Imported first."""

import itertools
import os
import signal
import sys
import threading


def _stop(*_) -> None:
    os.write(2, b"flowkernels: interrupted\n")
    os._exit(130)


def _is_command() -> bool:
    """Whether the process is `flowkernels` or `python -m flowkernels`."""
    of_module = sys.argv[:1] == ["-m"] and ("-m", "flowkernels") in itertools.pairwise(sys.orig_argv)
    return of_module or os.path.splitext(os.path.basename((sys.argv or [""])[0]))[0] == "flowkernels"


def begin() -> None:
    main = threading.current_thread() is threading.main_thread()
    if _is_command() and main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)


def imported() -> None:
    """From here on Ctrl-C is Python's KeyboardInterrupt."""
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


begin()
