"""``python -m distft``: the same as the ``distft`` command."""

from distft.cli import main

main()
