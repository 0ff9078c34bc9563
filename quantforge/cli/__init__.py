"""The command line. A command is one module here, held as `COMMAND`: it parses, calls one API function, prints its report."""

from __future__ import annotations

import logging
import signal
import sys

import click

from .. import __version__
from ..discovery import marked
from ..errors import QuantForgeError

# Only click and the exception tree are imported here and in commands: `quantforge --help` answers at once.


class _OneLineFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.lower()}: {record.getMessage()}"


ALIASES = {"quantize": "convert"}
"""What other tools call a command."""


class _Group(click.Group):
    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return super().get_command(ctx, ALIASES.get(cmd_name, cmd_name))


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="quantforge %(version)s")
@click.option("-v", "--verbose", is_flag=True, help="Log what is done, and show tracebacks.")
@click.option("-q", "--quiet", is_flag=True, help="Errors only, no warnings.")
def group(verbose: bool, quiet: bool) -> None:
    """Convert any language-model checkpoint into any other, quantized as well as the science allows."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLineFormatter())
    level = logging.INFO if verbose else logging.ERROR if quiet else logging.WARNING
    logging.basicConfig(level=level, handlers=[handler], force=True)


for _command in marked(__name__, "COMMAND"):
    group.add_command(_command)


_EVERYWHERE = ("-v", "--verbose", "-q", "--quiet")


def main() -> None:
    """Entry point: every failure is one line on stderr and an exit code other than 0."""
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    everywhere = [a for a in sys.argv[1:end] if a in _EVERYWHERE]  # they may stand behind the command as well
    arguments = [*everywhere, *(a for i, a in enumerate(sys.argv[1:], 1) if i >= end or a not in _EVERYWHERE)]
    verbose = "-v" in everywhere or "--verbose" in everywhere
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended politely: temporary files go too
    try:
        code = group.main(arguments, prog_name="quantforge", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as e:
        e.show()
        sys.exit(e.exit_code)
    except click.ClickException as e:
        context = e.ctx if isinstance(e, click.UsageError) else None
        where = f" (see {context.command_path} --help)" if context else ""
        click.echo(f"error: {e.format_message().rstrip('.')}{where}".replace("\n", " "), err=True)
        sys.exit(e.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; nothing was written", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)
    except (QuantForgeError, OSError, MemoryError) as e:
        if verbose:
            raise
        click.echo(f"error: {e or type(e).__name__}".replace("\n", " "), err=True)
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)
