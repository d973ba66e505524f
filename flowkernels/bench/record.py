"""`flowkernels record`: the calls of an op that a script makes, stored with their inputs."""

import argparse
import os
import runpy
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from flowkernels import _options
from flowkernels._checks import expect
from flowkernels._files import expect_target
from flowkernels.ops.public import OPS
from flowkernels.ops.recorded_calls import record_calls


def add_arguments(add: Callable) -> None:
    add("op", metavar="OP", help=f"which of {', '.join(OPS)}")
    about = "Python script to run; its arguments come last, after --"
    add("--from", dest="script", metavar="SCRIPT", type=_options.path, required=True, help=about)
    add("--out", type=_options.path, help="file to write; OP.safetensors if not given")
    add("--calls", type=_options.positive, default=8, help="calls to store at most, the first of each signature")
    add("--max-gb", type=_options.above_0, default=4.0, help="largest size of the file in GB")


def run(args: argparse.Namespace) -> int:
    """Run the script and store its calls; returns the script's exit code, 1 for an exception."""
    expect(args.script.is_file(), "--from", "a Python script", f"{args.script}, which is no file")
    path = args.out or Path(f"{args.op}.safetensors")
    expect_target(path, "--out", [("--from", args.script)])
    recording = None
    try:
        with record_calls(args.op, path, calls=args.calls, max_gb=args.max_gb) as recording:
            return _run_script(str(args.script), args.script_args)
    finally:  # after Ctrl-C too
        if recording is not None and recording.calls:
            print(recording)


def _run_script(script: str, args: list[str]) -> int:
    """As `python script args` would run it: the exit code, after the traceback of an exception."""
    argv, path = sys.argv, sys.path
    sys.argv, sys.path = [script, *args], [os.path.dirname(os.path.abspath(script)), *path]
    try:
        runpy.run_path(script, run_name="__main__")
        return 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
        if code:
            said = "" if isinstance(e.code, int) else f": {e.code}"
            print(f"flowkernels: {script} exited with code {code}{said}", file=sys.stderr)
        return code
    except Exception as e:
        tb = e.__traceback__  # from the script's own frames on
        while tb is not None and tb.tb_frame.f_code.co_filename != script:
            tb = tb.tb_next
        traceback.print_exception(type(e), e, tb)
        print(f"flowkernels: {script} raised {type(e).__name__}", file=sys.stderr)
        return 1
    finally:
        sys.argv, sys.path = argv, path
