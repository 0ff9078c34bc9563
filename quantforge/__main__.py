"""python -m quantforge."""

from .cli import main

main()
