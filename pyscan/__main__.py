"""`python -m pyscan` is the same as the command `pyscan`."""

from pyscan.cli import main

raise SystemExit(main())
