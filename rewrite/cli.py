"""The command line: options, help and exit codes. What commands do is in `commands`, imported when one runs.

Answers go to stdout, logs and progress to stderr. Exit codes: 0 fine; 1 a check failed, or no plan satisfies the
constraints; 2 wrong use or unreadable input; 3 internal error.
"""

from __future__ import annotations

import errno
import math
import traceback
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, TypeVar

import click

from colrow.cost_models.errors import ColrowError

INTERNAL_ERROR = 3
COVERAGE_STAGES = ("trace", "plan", "verify", "generate")
PLACEMENTS = ("column", "row", "vocab", "replicated")


class _Commands(click.Group):
    """Turns colrow's errors into one line on stderr and their exit code, and everything else into an internal error."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the chosen command."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except ColrowError as error:
            _fail(ctx, f"colrow: {error}", error.exit_code)
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # the reader left; click ends quietly
            first = next(iter(str(error).splitlines()), "")
            hint = "" if ctx.obj["debug"] else " (colrow --debug shows where)"
            _fail(ctx, f"colrow: internal error: {type(error).__name__}: {first}{hint}", INTERNAL_ERROR)


def _fail(ctx: click.Context, message: str, code: int) -> None:
    if ctx.obj["debug"]:
        click.echo(traceback.format_exc(), err=True)
    click.echo(message, err=True)
    ctx.exit(code)


def _debug(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    ctx.ensure_object(dict)
    ctx.obj["debug"] = ctx.obj.get("debug", False) or value


class Finite(click.FloatRange):
    """A number in a range; NaN compares as if it were in all of them."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number, if it is one."""
        number = super().convert(value, param, ctx)
        if number is not None and not math.isfinite(number):
            self.fail(f"{value!r} is no finite number.", param, ctx)
        return number


debug = click.option(
    "--debug", is_flag=True, expose_value=False, is_eager=True, callback=_debug, help="Show tracebacks of errors."
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
tp_of = click.option("--tp", type=click.IntRange(min=1), help="Ranks of the tensor-parallel group.")
plan_of = click.option("--plan", "plan_file", type=click.Path(), help="Use this plan instead of making one.")


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(version("colrow"), prog_name="colrow")
@debug
def main() -> None:
    """Plans how to split a model's matmuls over the ranks of a tensor-parallel group, and runs it that way.

    SOURCE is a Hugging Face model directory or config.json; hf:MODEL_TYPE; or package.module:factory, a callable that
    returns (model, example_inputs).
    """


checkpointing_of = click.option(
    "--checkpointing", type=click.Choice(["none", "blocks"]), default="none", show_default=True,
    help="blocks: training keeps blocks' inputs alone and runs blocks again.",
)  # fmt: skip


def _pins(ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    pins = {}
    for value in values:
        pattern, equals, placement = value.rpartition("=")
        if not equals or not pattern or placement not in PLACEMENTS:
            raise click.BadParameter(f"{value!r} is not GLOB=PLACEMENT with a placement of {', '.join(PLACEMENTS)}")
        pins[pattern] = placement
    return pins


@main.command()
@click.argument("source")
@click.option("--tp", type=click.IntRange(min=1), help="Ranks; omitted: the smallest power of two that fits.")
@click.option("--phase", type=click.Choice(["prefill", "decode", "train"]), default="prefill", show_default=True)
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Sequences per step.")
@click.option("--seq", type=click.IntRange(min=1), default=2048, show_default=True, help="Tokens per sequence.")
@click.option("--context", type=click.IntRange(min=0), help="Tokens in the KV cache (decode).  [default: --seq]")
@click.option("--dtype", type=click.Choice(["bf16", "fp16", "fp32", "fp64"]), default="bf16", show_default=True)
@click.option("--hardware", default="h100-sxm", show_default=True, help="Name of a profile, or path of one.")
@click.option("--memory-gb", type=Finite(min=0, min_open=True), help="Cap per rank, 1 GB = 1e9 bytes.")
@click.option(
    "--sequence-parallel", type=click.Choice(["off", "on", "auto"]), default="off", show_default=True,
    help="Split the sequence between matmuls.",
)  # fmt: skip
@checkpointing_of
@click.option(
    "--replicate", type=click.Choice(["never", "auto"]), default="never", show_default=True,
    help="never: split every weight that can be; auto: least time.",
)  # fmt: skip
@click.option("--pin", multiple=True, callback=_pins, metavar="GLOB=PLACEMENT", help="Fix parameters' placement.")
@click.option(
    "--from", "edited", type=click.Path(), help="Re-check, re-price and re-sign this plan, edited by hand."
)  # fmt: skip
@click.option("--out", type=click.Path(dir_okay=False), help="Write the plan to this file.")
@as_json
@debug
@click.pass_context
def plan(ctx: click.Context, /, **options: Any) -> None:
    """Plan a model: the cheapest exact split, proven."""
    from .commands import plan_command, replan_command

    if options.pop("edited") is None:
        plan_command(**options)
        return
    given = [name for name in options if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE]
    other = [name for name in given if name not in ("source", "edited", "hardware", "out", "as_json")]
    if other:
        option = other[0].replace("_", "-")
        raise click.UsageError(f"--{option} does not go with --from: the plan file says what it was made for.")
    hardware = options["hardware"] if "hardware" in given else None
    replan_command(options["source"], ctx.params["edited"], hardware, options["out"], options["as_json"])


@main.command()
@click.argument("plan_file", metavar="PLAN", type=click.Path())
@as_json
@debug
def show(**options: Any) -> None:
    """Print a plan: blocks, placements, collectives, memory, time."""
    from .commands import show_command

    show_command(**options)


@main.command()
@click.argument("plan_file", metavar="PLAN", type=click.Path())
@click.option("--max-all-reduces", type=click.IntRange(min=0), help="All-reduces of one step.")
@click.option(
    "--max-all-reduces-per-block", type=click.IntRange(min=0),
    help="All-reduces of activations and their gradients in the worst block.",
)  # fmt: skip
@click.option("--max-bytes", type=click.IntRange(min=0), help="Bytes of all collectives of one step, per rank.")
@click.option("--direction", type=click.Choice(["forward", "backward"]), help="Count only these.  [default: both]")
@click.option("--min-sharded", type=Finite(0, 1), help="Share of the weights' bytes that is split, 0 to 1.")
@click.option("--require-proven", is_flag=True, help="The plan must be proven optimal.")
@as_json
@debug
def check(plan_file: str, as_json: bool, **limits: Any) -> None:
    """Check a plan against limits; exits 1 where one is exceeded."""
    from .commands import check_command

    check_command(plan_file, limits, as_json)


@main.command()
@click.argument("source")
@tp_of
@plan_of
@click.option("--small", is_flag=True, help="Check the small version of a Hugging Face model.")
@click.option("--ranks", type=click.Choice(["simulated", "gloo"]), default="simulated", show_default=True)
@as_json
@debug
def verify(**options: Any) -> None:
    """Compare the rewritten model with the dense one: outputs, gradients, training, collectives."""
    from .commands import verify_command

    verify_command(**options)


_Command = TypeVar("_Command", bound=Callable[..., Any])


class _Listed(click.ParamType[tuple[Any, ...]]):
    """Comma-separated values of one type, numbers above 0."""

    def __init__(self, each: Callable[[str], Any], name: str) -> None:
        self.each, self.name = each, name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        """The values; click also passes what is converted already."""
        if isinstance(value, tuple):
            return value
        try:
            found = tuple(self.each(part.strip()) for part in value.split(","))
        except ValueError:
            found = ()
        if not found or any(isinstance(one, (int, float)) and not 0 < one < float("inf") for one in found):
            self.fail(f"{value!r} is not a list of positive numbers, such as 1,2,4", param, ctx)
        return found


def _listed(each: Callable[[str], Any], name: str, default: str, text: str) -> Callable[[_Command], _Command]:
    """An option that takes several values at once."""
    metavar = "NAME,..." if each is str else "N,..."
    return click.option(
        name, type=_Listed(each, metavar), default=default, metavar=metavar, show_default=True, help=text
    )


def _ids(ctx: click.Context, parameter: click.Parameter, value: str | None) -> list[int] | None:
    try:
        return None if value is None else [int(part) for part in value.replace(",", " ").split()]
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of token ids, such as 1,15043,3186") from None


@main.command()
@click.argument("source", metavar="SOURCE|CHECKPOINT")
@tp_of
@plan_of
@click.option("--prompt-ids", callback=_ids, metavar="ID,ID,...", help="Token ids of the prompt.")
@click.option("--tokens", type=click.IntRange(min=1), help="How many tokens to generate.")
@debug
def run(**options: Any) -> None:
    """Run a model on N ranks: starts them, or joins torchrun's."""
    from .commands import run_command

    run_command(**options)


@main.group(invoke_without_command=True)
@as_json
@debug
@click.pass_context
def hardware(ctx: click.Context, as_json: bool) -> None:
    """List the hardware profiles: what --hardware takes, and how well each is known."""
    if ctx.invoked_subcommand is None:
        from .hardware_command import hardware_command

        hardware_command(as_json)


@hardware.command("show")
@click.argument("name", metavar="NAME|FILE")
@click.option("--out", type=click.Path(dir_okay=False), help="Also draw the charts into this .png or .svg.")
@as_json
@debug
def show_hardware(**options: Any) -> None:
    """Plot a profile's collectives, time against size, with sources and errors."""
    from .hardware_command import show_hardware_command

    show_hardware_command(**options)


@main.command()
@click.option("--ranks", type=click.IntRange(min=2), help="Ranks.  [default: one per GPU, else 2 CPU ranks]")
@click.option(
    "--out", type=click.Path(dir_okay=False), default="calibrated.json", show_default=True,
    help="The profile; its name is the file's.",
)  # fmt: skip
@as_json
@debug
def calibrate(**options: Any) -> None:
    """Measure this machine and write a profile for --hardware, in under two minutes.

    Starts the ranks (NCCL where each has a GPU, else gloo), or joins torchrun's.
    """
    from .calibration_command import calibrate_command

    calibrate_command(**options)


def _shard(ctx: click.Context, parameter: click.Parameter, value: str) -> tuple[int, int]:
    first, slash, count = value.partition("/")
    if slash and first.isdecimal() and count.isdecimal() and 1 <= int(first) <= int(count):
        return int(first), int(count)
    raise click.BadParameter(f"{value!r} is not i/n with 1 <= i <= n")


def _stages(ctx: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
    stages = tuple(value.split(","))
    if unknown := [stage for stage in stages if stage not in COVERAGE_STAGES]:
        raise click.BadParameter(f"{unknown[0]!r} is not one of {', '.join(COVERAGE_STAGES)}")
    return stages


@main.command()
@click.argument("sources", nargs=-1, metavar="[hf:PATTERN|MODULE:FACTORY]...")
@click.option(
    "--stages", default=",".join(COVERAGE_STAGES), show_default=True, callback=_stages, help="Cheapest first."
)  # fmt: skip
@click.option("--shard", default="1/1", show_default=True, callback=_shard, metavar="i/n", help="Only part i of n.")
@click.option("--status", "statuses", multiple=True, help="Only stages that ended this way.  [default: new and stale]")
@click.option(
    "--folder", default="docs", show_default=True, type=click.Path(file_okay=False), help="Where the files are."
)
@click.option("--seconds", default=60.0, show_default=True, help="CPU seconds a stage of one source may take.")
@click.option("--memory-gb", default=4.0, show_default=True, help="Memory that it may allocate.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Sources at a time.")
@debug
def coverage(**options: Any) -> None:
    """Trace, plan and verify every model type of transformers, or the sources given; resumes where it stopped."""
    from .coverage import coverage_command

    coverage_command(**options)


@main.command()
@click.argument("source")
@_listed(int, "--tp", "1,2,4,8", "Ranks.")
@_listed(int, "--batch", "1", "Sequences per step.")
@_listed(int, "--seq", "2048", "Tokens per sequence; in decode, in the KV cache.")
@_listed(str, "--hardware", "h100-sxm", "Profiles, by name or path.")
@_listed(float, "--link-speed", "1", "Multiples of each profile's link bandwidth.")
@click.option("--phase", type=click.Choice(["prefill", "decode", "train"]), default="prefill", show_default=True)
@click.option("--dtype", type=click.Choice(["bf16", "fp16", "fp32", "fp64"]), default="bf16", show_default=True)
@click.option("--sequence-parallel", type=click.Choice(["off", "on", "auto"]), default="off", show_default=True)
@checkpointing_of
@click.option("--memory-gb", type=Finite(min=0, min_open=True), help="Cap per rank, 1 GB = 1e9 bytes.")
@click.option("--out", type=click.Path(dir_okay=False), help="Also draw the charts into this .png or .svg.")
@as_json
@debug
def sweep(**options: Any) -> None:
    """Compare tp, batches, lengths and machines: time, memory, R = T_comm / T_comp, and which tp to use."""
    from .sweep_command import sweep_command

    sweep_command(**options)
