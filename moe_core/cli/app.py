"""The command group: what all commands share, and the list of them."""

from __future__ import annotations

from typing import Any

import click

import moe_core
from moe_core.cli.bench import bench
from moe_core.cli.conformance import conformance
from moe_core.cli.convert import convert
from moe_core.cli.demo import demo
from moe_core.cli.docs import docs
from moe_core.cli.doctor import doctor
from moe_core.cli.explain import explain
from moe_core.cli.new_plugin import new_plugin
from moe_core.cli.plan import plan
from moe_core.cli.plugins import plugins
from moe_core.cli.run import run
from moe_core.cli.shadow import shadow
from moe_core.cli.tune import tune
from moe_core.errors import MoEError


class _Group(click.Group):
    """Turns what a user can mend into one message on stderr and exit code 1; our own defects keep their traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (MoEError, ValueError) as error:
            if ctx.params.get("traceback"):
                raise
            raise click.ClickException(str(error)) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(moe_core.__version__, prog_name="moe-core")
@click.option("--traceback", is_flag=True, help="Show where an error comes from, with the whole traceback.")
def app(traceback: bool) -> None:
    """Run Mixture-of-Experts models through plugins, and see which plugin runs and why."""


for command in (plugins, doctor, explain, plan, shadow, run, demo, bench, new_plugin, conformance, convert, tune, docs):
    app.add_command(command)
