"""`python -m tensortap`: the same as the console script."""

from tensortap.cli import main

main()
