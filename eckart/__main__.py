"""`python -m eckart` is the command line."""

from .cli import main

main()
