"""The command line: parse, call one function, print.

A user's mistake is one line and exit code 2. Importing this loads neither torch nor transformers:
each command imports what it runs.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from zlib import crc32

import click

from mllm_audio.cli import (  # noqa: F401  registers their commands
    bench,
    data,
    evaluate,
    importers,
    listen,
    peer,
    plan,
    reproduce,
    serve,
    train,
    use,
)
from mllm_audio.cli.group import cli


def main() -> None:
    """Run the command line; the entry point of `mllm-audio`."""
    try:
        code = cli.main(standalone_mode=False)
    except click.exceptions.Abort as error:  # what click makes of KeyboardInterrupt
        done = ", ".join(filter(None, ["interrupted", str(error.__cause__ or "")]))
        _fail(f"{done}; type the same command again to continue", 130)
    except click.ClickException as error:
        _fail(" ".join(error.format_message().split()) + _hint(error), 2)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if os.environ.get("MLLM_AUDIO_TRACEBACK"):
            traceback.print_exc()
        _fail(" ".join(str(error).split()) or type(error).__name__, 2)
    else:
        sys.exit(code if isinstance(code, int) else 0)


def _hint(error: click.ClickException) -> str:
    """Say which help to type after a usage error."""
    context = getattr(error, "ctx", None)
    return f" (type {context.command_path} --help)" if context else ""


def _fail(message: str, code: int) -> None:
    if _is_news(message):
        click.echo(f"error: {message}", err=True)
    sys.exit(code)


def _is_news(message: str) -> bool:
    """Tell whether no other process of this node has said so: all of them make the same mistake.

    `torchrun` names a file for each process, in one folder for each time that it starts them.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is None:
        return True
    try:
        (Path(file).parents[1] / f"said-{crc32(message.encode()):08x}").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # better twice than never
        return True
    return True
