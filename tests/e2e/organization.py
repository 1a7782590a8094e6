"""A server with its admin API, as an administrator has it: what makes tenants, and what they used."""

import socket
import time

import openai


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def office_of(start, **settings: object):
    """A server with these settings, and its admin API's client."""
    port = free_port()
    server = start(admin_port=port, **settings)
    admin_key = server.command("tenants", "admin-key").strip()  # the listener opens once there is one
    admin = openai.OpenAI(admin_api_key=admin_key, base_url=f"http://127.0.0.1:{port}/v1")
    deadline = time.monotonic() + 60
    while True:
        try:
            admin.admin.organization.projects.list()
            return server, admin.admin.organization
        except openai.APIConnectionError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def new_tenant(organization, name: str, **limits: int) -> tuple[str, dict[str, str]]:
    project = organization.projects.create(name=name)
    key = organization.projects.service_accounts.create(project.id, name="user").api_key
    if limits:
        organization.projects.rate_limits.update_rate_limit("rl_all", project_id=project.id, **limits)
    return project.id, {"Authorization": f"Bearer {key.value}"}


def ledger(organization, project: str) -> dict[str, int]:
    """Sums over the ledger, when the last second is in it: nothing comes any more."""
    before: dict[str, int] = {}
    while (now := ledger_now(organization, project)) != before:
        before = now
        time.sleep(1.2)
    return now


def ledger_now(organization, project: str) -> dict[str, int]:
    page = organization.usage.completions(
        start_time=int(time.time()) - 86400, bucket_width="1d", limit=3, project_ids=[project]
    )
    sums = {"requests": 0, "prompt": 0, "cached": 0, "output": 0, "reasoning": 0}
    for bucket in page.data:
        for result in bucket.results:
            sums["requests"] += result.num_model_requests
            sums["prompt"] += result.input_tokens
            sums["cached"] += result.input_cached_tokens
            sums["output"] += result.output_tokens
            sums["reasoning"] += result.output_reasoning_tokens
    return sums
