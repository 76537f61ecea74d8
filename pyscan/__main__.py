"""`python -m pyscan` is the same as the command `pyscan`."""

import sys


def run() -> int:
    """Run one command. The interpreter still loads modules when the first Ctrl-C may come."""
    try:
        from pyscan.cli import main  # noqa: PLC0415 - inside of `try` on purpose
    except KeyboardInterrupt:
        return 130
    return main()


if __name__ == "__main__":
    sys.exit(run())
