"""The root command. A command's module is imported when it is called, not before."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, NamedTuple

import click


class Entry(NamedTuple):
    """One command: the module that holds it as `command`, and its line in `smdbg --help`."""

    module: str
    help: str


# The help line stands here too, so that `smdbg --help` need not import the commands; a test holds the two equal.
COMMANDS = {
    "ls": Entry("ls", "List the tensors of a run."),
    "inspect": Entry("inspect_", "Show one tensor, step by step."),
    "check": Entry("check", "Run rules over a run and say what is wrong."),
    "blame": Entry("blame", "Say what made the first NaN or infinity, and whom it reached."),
    "rules": Entry("rules", "List the rules, or explain one."),
    "runs": Entry("runs", "List the runs of a folder, or describe one."),
    "verify": Entry("verify", "Check every object of a run, and say what is damaged."),
    "cp": Entry("cp", "Copy a run, between a folder and S3 or any two places."),
    "prune": Entry("prune", "Delete values, collections or old runs; a dry run without --yes."),
    "demo": Entry("demo", "Write a broken run and a healthy one, and look at both."),
}


@dataclass(frozen=True)
class Session:
    """What the options before the command say."""

    run: str | None = None
    quiet: bool = False

    def updated(self, run: str | None, quiet: bool) -> Session:
        """Return the session with the options that came after the command; these win."""
        return replace(self, run=run if run is not None else self.run, quiet=self.quiet or quiet)


class LazyGroup(click.Group):
    """A group that knows its commands by COMMANDS and imports one when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return the command, or None where there is none of that name."""
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        command = import_module(f"smdbg.cli.{entry.module}").command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; a misspelt name is answered with the nearest one."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            from smdbg.errors import near

            raise click.UsageError(f"No such command '{name}'.{near(name, COMMANDS, 1)}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the command table of the help without importing a command."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in COMMANDS.items()])


def _version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    """Print the version and stop."""
    if value and not ctx.resilient_parsing:
        from smdbg import __version__

        click.echo(f"smdbg {__version__}")
        ctx.exit()


HELP = """Find out what went wrong in a training run: which tensor, at which step, on which worker.

\b
Examples:
  smdbg demo                                  write two runs to look at
  smdbg --run runs/mine ls                    what was saved
  smdbg --run s3://bucket/mine inspect loss   one tensor, step by step
  smdbg -r runs/mine check                    run the rules; status 1 when one is violated

A run is a folder or a URL such as s3://bucket/run. Without --run it is taken from SMDBG_RUN, else from `run:` in the
nearest smdbg.yaml, else it is the newest run under ./runs.

Exit status: 0 clean, 1 violations found, 2 anything that kept the command from being done.
"""


@click.group(cls=LazyGroup, help=HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-r", "--run", metavar="URL", help="The run: a folder or a URL.  [env var: SMDBG_RUN]")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.option("-q", "--quiet", is_flag=True, help="Only results and errors, no other talk on stderr.")
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version.")
@click.pass_context
def root(ctx: click.Context, /, **options: Any) -> None:
    """Keep the options before the command for the command."""
    ctx.obj = Session(run=options["run"], quiet=options["quiet"])
