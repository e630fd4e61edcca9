"""The `tailrace` command. Each sub-command imports what it needs when it runs, so that --help is quick."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tailrace import __version__
from tailrace.cli.bench.commands import bench_app
from tailrace.cli.options import Settings, with_config
from tailrace.cli.simulate_command import simulate
from tailrace.cli.store import store_app
from tailrace.config import CommonConfig, GatewayConfig, KvStoreConfig, UpConfig, WorkerConfig, base_environment
from tailrace.cores import PASSIVE_WAITING
from tailrace.errors import ConfigError, TailraceError


class _Group(TyperGroup):
    """Our own errors are a line on stderr, never a traceback: exit code 2 for a wrong setting, 1 for the rest."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except TailraceError as error:
            print(f"tailrace: {error.message}", file=sys.stderr)
            raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from None


app = typer.Typer(cls=_Group, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
model_app = typer.Typer(no_args_is_help=True, help="Models on this machine.")
app.add_typer(model_app, name="model")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"tailrace {__version__}")
        raise typer.Exit


@app.callback()
def tailrace(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    """Serves large language models with prefill and decode on separate workers."""


def _up(settings: Settings) -> None:
    """Start a gateway and its workers on this machine, and serve until Ctrl-C."""
    from tailrace.cli.up import up

    up(UpConfig(**settings))


def _service(role: str, config: type[CommonConfig]) -> Callable[[Settings], None]:
    def run(settings: Settings) -> None:
        environment = {**PASSIVE_WAITING, **base_environment(), **config(**settings).to_environment()}
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, "-m", f"services.{role}.main"], environment)  # noqa: S606

    return run


def _add_service(role: str, config: type[CommonConfig], doc: str) -> None:
    run = _service(role, config)
    run.__doc__ = doc
    app.command(role)(with_config(config, run))


app.command("up")(with_config(UpConfig, _up))
_add_service("gateway", GatewayConfig, "Run the gateway in the foreground.")
_add_service("prefill", WorkerConfig, "Run a prefill worker in the foreground (set TAILRACE_SECRET as at the gateway).")
_add_service("decode", WorkerConfig, "Run a decode worker in the foreground (set TAILRACE_SECRET as at the gateway).")
_add_service("kvstore", KvStoreConfig, "Run a store of KV blocks in the foreground (set TAILRACE_SECRET as elsewhere).")


@app.command()
def chat(
    url: Annotated[str, typer.Option(help="The API to talk to.")] = "http://127.0.0.1:8000/v1",
    model: Annotated[str, typer.Option(help="Default: the first that the API lists.")] = "",
    once: Annotated[str, typer.Option(help="Ask this, print the answer, and end.", metavar="QUESTION")] = "",
    system: Annotated[str, typer.Option(help="A system message to begin with.")] = "",
    api_key: Annotated[str, typer.Option(help="Or OPENAI_API_KEY.", envvar="OPENAI_API_KEY")] = "",
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Default: what the context leaves.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, max=2.0)] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Show where the time of each answer went.")] = False,
) -> None:
    """Talk to a model."""
    from tailrace.cli.chat import run_chat
    from tailrace.cli.openai_stream import ChatOptions

    options = ChatOptions(url=url, api_key=api_key, model=model, max_tokens=max_tokens, temperature=temperature)
    run_chat(options, system=system, once=once, show_stats=stats)


def _demo(settings: Settings) -> None:
    """Start one gateway, one prefill and one decode worker; ask, stream the answer, show where the time went."""
    from tailrace.cli.demo import demo

    demo(UpConfig(**{"port": 0, "log_level": "warning", **settings}))


def _doctor(settings: Settings) -> None:
    """Check this machine: versions, transports, a real hand-off, and its tokens (float32) against one process."""
    from tailrace.cli.doctor import doctor

    raise typer.Exit(doctor(UpConfig(**{"port": 0, "dtype": "float32", "log_level": "warning", **settings})))


app.command("demo")(with_config(UpConfig, _demo))
app.command("doctor")(with_config(UpConfig, _doctor))

app.add_typer(bench_app, name="bench")
app.add_typer(store_app, name="store")
app.command("simulate")(simulate)


ModelName = Annotated[str, typer.Argument(help="A directory, a built-in name, or org/name on the Hugging Face hub.")]
Revision = Annotated[str | None, typer.Option(help="Commit, tag or branch on the hub.")]
CacheDir = Annotated[Path | None, typer.Option(help="Where models are kept.")]


@model_app.command("get")
def model_get(name: ModelName, revision: Revision = None, cache_dir: CacheDir = None) -> None:
    """Fetch a model, so that it is there when it is served."""
    from tailrace.cli.model import fetch_model

    print(f"{name} is in {fetch_model(name, revision, cache_dir)}")


@model_app.command("path")
def model_path(name: ModelName, revision: Revision = None, cache_dir: CacheDir = None) -> None:
    """Print the model's directory, and nothing else, on stdout; fetch it first where it is not there."""
    from tailrace.cli.model import fetch_model

    print(fetch_model(name, revision, cache_dir))


if __name__ == "__main__":
    app()
