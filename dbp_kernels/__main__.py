"""``python -m dbp_kernels``: info, the environment report; verify, are the kernels right on this GPU?;
calibrate and tune, which measure this machine for the planner and the kernels.
"""

import argparse
import json
import shlex
import sys

from dbp_kernels import info
from dbp_kernels.tools import calibrate, tune
from dbp_kernels.verify import report


def main(argv: list[str] | None = None) -> int:
    """Parses the command line (of this process by default), prints, returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m dbp_kernels")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("info", help="versions, devices and usable backends")
    command.add_argument("--json", action="store_true", help="as JSON")
    help = "check the kernels on this GPU; exit status 0: passed, 1: not, 2: nothing to check here"
    report.add_arguments(commands.add_parser("verify", help=help))
    for name, tool, help in (
        ("calibrate", calibrate, "measure the figures that the planner reckons with"),
        ("tune", tune, "find this GPU's fastest tile shapes and pin them"),
    ):
        command = commands.add_parser(name, help=help, description=tool.__doc__)
        command.formatter_class = argparse.RawDescriptionHelpFormatter
        tool.add_arguments(command)
    options = parser.parse_args(argv)
    if options.command == "verify":
        return report.main(options)
    if options.command == "calibrate":
        return calibrate.main(options, shlex.join(["python", "-m", "dbp_kernels", *argv]))
    if options.command == "tune":
        return tune.main(options)
    print(json.dumps(info.environment(), indent=2) if options.json else info.report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
