"""The command line: parse, call one API function, print its report."""

import click


@click.group()
def main() -> None:
    """Convert any language-model checkpoint into any other, quantized as well as the science allows."""
