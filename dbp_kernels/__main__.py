"""``python -m dbp_kernels info``: the environment report; ``verify``: are the kernels right on this GPU?"""

import argparse
import json
import sys

from dbp_kernels import info
from dbp_kernels.verify import report


def main(argv: list[str] | None = None) -> int:
    """Parses the command line (of this process by default), prints, returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m dbp_kernels")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("info", help="versions, devices and usable backends")
    command.add_argument("--json", action="store_true", help="as JSON")
    help = "check the kernels on this GPU; exit status 0: passed, 1: not, 2: nothing to check here"
    report.add_arguments(commands.add_parser("verify", help=help))
    arguments = parser.parse_args(argv)
    if arguments.command == "verify":
        return report.main(arguments)
    print(json.dumps(info.environment(), indent=2) if arguments.json else info.report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
