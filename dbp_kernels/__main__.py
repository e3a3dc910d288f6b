"""``python -m dbp_kernels info``: the environment report to paste into a bug report."""

import argparse
import json

from . import info


def main(argv: list[str] | None = None) -> None:
    """Parses the command line (of this process by default) and prints."""
    parser = argparse.ArgumentParser(prog="python -m dbp_kernels")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("info", help="versions, devices and usable backends")
    command.add_argument("--json", action="store_true", help="as JSON")
    arguments = parser.parse_args(argv)
    print(json.dumps(info.environment(), indent=2) if arguments.json else info.report())


if __name__ == "__main__":
    main()
