"""`ktransformers tenants …`: what the command line takes; commands/tenants.py does it."""

from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, help="Tenants, their keys and limits; a running server follows.")

Name = Annotated[str, typer.Argument(help="Name or id of a tenant.")]
Weight = Annotated[
    float | None, typer.Option(help="Share of the engine relative to other tenants' [1].", show_default=False)
]
Priority = Annotated[
    str | None,
    typer.Option(help="low, normal or high: 1/4, 1 or 4 times the weight [normal].", show_default=False),
]
Models = Annotated[
    str | None, typer.Option(help="Models it may use, by commas; all is every model.", show_default=False)
]


def _limit(text: str) -> Any:
    return typer.Option(min=0, help=f"{text}; 0 is no limit.", show_default=False)


RequestsPerMinute = Annotated[int | None, _limit("Requests in a minute")]
TokensPerMinute = Annotated[int | None, _limit("Prompt and output tokens in a minute")]
TokensPerDay = Annotated[int | None, _limit("The same in a day (UTC)")]
RequestsPerDay = Annotated[int | None, _limit("Requests in a day (UTC)")]
MaxRunning = Annotated[int | None, _limit("Answers computed at once")]
MaxWaiting = Annotated[int | None, _limit("Answers that may wait")]
KvDevice = Annotated[
    int | None, _limit("Bytes of KV kept for it on the device, in place of a share by weight")
]
KvHost = Annotated[int | None, _limit("The same on the host")]
KvDisk = Annotated[int | None, _limit("The same on disk")]
Expires = Annotated[
    str | None, typer.Option(help="When: 90d, 12h, 30m, or a date as 2027-01-31 [never].", show_default=False)
]


KeyId = Annotated[
    str, typer.Argument(metavar="KEY", help="Id of a key, key_…, as `show` has it, also an administrator's.")
]


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Its name.")],
    weight: Weight = None,
    priority: Priority = None,
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    tokens_per_day: TokensPerDay = None,
    requests_per_day: RequestsPerDay = None,
    max_running: MaxRunning = None,
    max_waiting: MaxWaiting = None,
    kv_device_bytes: KvDevice = None,
    kv_host_bytes: KvHost = None,
    kv_disk_bytes: KvDisk = None,
    models: Models = None,
) -> None:
    """Make a tenant. From the first one on, every request needs a key."""
    given = dict(locals())
    from ktransformers.server.commands import tenants as command

    command.create(given.pop("name"), given)


@app.command("list")
def list_() -> None:
    """All tenants."""
    from ktransformers.server.commands import tenants as command

    command.show_all()


@app.command()
def show(name: Name) -> None:
    """One tenant: its limits, its keys, what it used today."""
    from ktransformers.server.commands import tenants as command

    command.show(name)


@app.command("set")
def set_(
    name: Name,
    rename: Annotated[str | None, typer.Option(help="A new name.", show_default=False)] = None,
    weight: Weight = None,
    priority: Priority = None,
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    tokens_per_day: TokensPerDay = None,
    requests_per_day: RequestsPerDay = None,
    max_running: MaxRunning = None,
    max_waiting: MaxWaiting = None,
    kv_device_bytes: KvDevice = None,
    kv_host_bytes: KvHost = None,
    kv_disk_bytes: KvDisk = None,
    models: Models = None,
) -> None:
    """Change a tenant. What is not named stays as it is."""
    given = dict(locals())
    from ktransformers.server.commands import tenants as command

    command.change(given.pop("name"), given)


@app.command()
def delete(name: Name) -> None:
    """Archive a tenant: its keys work no longer, what it used stays on record."""
    from ktransformers.server.commands import tenants as command

    command.delete(name)


@app.command()
def key(
    tenant: Annotated[str, typer.Argument(metavar="NAME", help="Name or id of a tenant.")],
    name: Annotated[str, typer.Option(help="Whose key it is: a user of the tenant.")] = "default",
    expires: Expires = None,
    scope: Annotated[
        list[str] | None,
        typer.Option(help="Narrow it: api.model.read, api.model.request, api.all.read.", show_default=False),
    ] = None,
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    tokens_per_day: TokensPerDay = None,
    requests_per_day: RequestsPerDay = None,
    max_running: MaxRunning = None,
    max_waiting: MaxWaiting = None,
) -> None:
    """Make a key and print it, this once. Another key of the same name lets one be replaced without a gap."""
    limits = dict(locals())
    from ktransformers.server.commands import tenants as command

    for option in ("tenant", "name", "expires", "scope"):
        del limits[option]
    command.key(tenant, name, expires, scope or [], limits)


@app.command("set-key")
def set_key(
    key: KeyId,
    expires: Annotated[
        str | None,
        typer.Option(help="When: 90d, 12h, 30m, a date as 2027-01-31, or never.", show_default=False),
    ] = None,
    scope: Annotated[
        list[str] | None, typer.Option(help="Its scopes from now on; all is every one.", show_default=False)
    ] = None,
    requests_per_minute: RequestsPerMinute = None,
    tokens_per_minute: TokensPerMinute = None,
    tokens_per_day: TokensPerDay = None,
    requests_per_day: RequestsPerDay = None,
    max_running: MaxRunning = None,
    max_waiting: MaxWaiting = None,
) -> None:
    """Change a key. What is not named stays as it is."""
    limits = dict(locals())
    from ktransformers.server.commands import tenants as command

    for option in ("key", "expires", "scope"):
        del limits[option]
    command.change_key(key, expires, scope, limits)


@app.command()
def rotate(
    key: KeyId,
    grace: Annotated[
        str | None,
        typer.Option(help="So long the old one works, too: 24h, 30m, 7d [not at all].", show_default=False),
    ] = None,
    expires: Annotated[
        str | None,
        typer.Option(help="When the new one does [after as long as the old one].", show_default=False),
    ] = None,
) -> None:
    """Make a key in the place of another, with its name, scopes and limits, and print it, this once."""
    from ktransformers.server.commands import tenants as command

    command.rotate(key, grace, expires)


@app.command()
def revoke(key: KeyId) -> None:
    """Make a key work no longer."""
    from ktransformers.server.commands import tenants as command

    command.revoke(key)


@app.command("admin-key")
def admin_key(
    name: Annotated[str, typer.Argument(help="Whose key it is.")] = "admin", expires: Expires = None
) -> None:
    """Make a key of an administrator, for the admin API, and print it, this once."""
    from ktransformers.server.commands import tenants as command

    command.admin_key(name, expires)


@app.command()
def publish(
    name: Annotated[str, typer.Argument(help="What to call it.")],
    file: Annotated[str, typer.Argument(help="A text, or with --messages a list of messages as JSON.")],
    messages: Annotated[bool, typer.Option("--messages", help="The beginning of conversations.")] = False,
) -> None:
    """Let every tenant find the KV of a beginning of prompts: whoever sends it can tell that it is there."""
    from ktransformers.server.commands import tenants as command

    command.publish(name, file, messages)


@app.command()
def published() -> None:
    """What is public."""
    from ktransformers.server.commands import tenants as command

    command.published()


@app.command()
def withdraw(name: Annotated[str, typer.Argument(help="Name or id, as `published` has it.")]) -> None:
    """Make a beginning of prompts public no longer."""
    from ktransformers.server.commands import tenants as command

    command.withdraw(name)


@app.command()
def audit(limit: Annotated[int, typer.Option(min=1, max=10000, help="The latest so many.")] = 50) -> None:
    """What administrators did, the latest first."""
    from ktransformers.server.commands import tenants as command

    command.audit(limit)
