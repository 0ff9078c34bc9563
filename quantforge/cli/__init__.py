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


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="quantforge %(version)s")
@click.option("-v", "--verbose", is_flag=True, help="Log what is done, and show tracebacks.")
@click.pass_context
def group(context: click.Context, verbose: bool) -> None:
    """Convert any language-model checkpoint into any other, quantized as well as the science allows."""
    context.obj = {"verbose": verbose}
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLineFormatter())
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler], force=True)


for _command in marked(__name__, "COMMAND"):
    group.add_command(_command)


def main() -> None:
    """Entry point: every failure is one line on stderr and an exit code other than 0."""
    verbose = "-v" in sys.argv or "--verbose" in sys.argv
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended politely: temporary files go too
    try:
        code = group.main(prog_name="quantforge", standalone_mode=False)
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
