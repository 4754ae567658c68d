"""`python -m weightpatch` is the command line."""

from weightpatch.cli import main

main()
