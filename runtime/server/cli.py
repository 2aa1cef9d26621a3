"""``pocketslm serve``."""

from __future__ import annotations

import argparse
import ipaddress
import os
from pathlib import Path

from pocketslm.terminal import Commands, add_backend, add_threads, say

KEY = "POCKETSLM_API_KEY"


def add_commands(commands: Commands) -> None:
    parser = commands.add(
        "serve",
        _serve,
        "answer requests of OpenAI's and Ollama's interfaces, and talk on a page",
        "pocketslm serve out/smollm2 --port 8080",
    )
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument(
        "--parallel",
        type=int,
        default=4,
        metavar="N",
        help="answers that a model makes at once, each with a KV cache of its own (default: 4; the "
        "native backend only, others make one after the other)",
    )
    parser.add_argument("--most-waiting", type=int, default=16, help="requests that may wait")
    parser.add_argument("--most-seconds", type=float, default=600.0, help="of one answer")
    parser.add_argument("--most-tokens", type=int, default=4096, help="of one answer")
    parser.add_argument("--most-bytes", type=int, default=4 << 20, help="of one request")
    parser.add_argument(
        "--prefix-mb",
        type=int,
        default=256,
        metavar="MB",
        help="memory for chats that take turns, so that they are not read again (native; default: "
        "256; 0: none)",
    )
    add_backend(parser)
    add_threads(parser)


def _serve(arguments: argparse.Namespace) -> None:
    from pocketslm.errors import BackendError, UsageError

    try:
        import uvicorn

        from pocketslm.runtime.server.app import application
        from pocketslm.runtime.server.line import Limits
    except ImportError as error:
        raise BackendError(
            f"serving is not installed ({error}); install it with `pip install pocketslm[serve]`"
        ) from None
    from pocketslm.runtime.model import Model
    from pocketslm.runtime.prefixes import Prefixes

    key = os.environ.get(KEY)
    local = _is_loopback(arguments.host)
    if not local and not key:
        raise UsageError(
            f"--host {arguments.host} is open to other machines; set ${KEY} to a key that clients "
            "must send, or listen on 127.0.0.1"
        )
    models: dict[str, Model] = {}
    prefixes = Prefixes(memory=arguments.prefix_mb << 20)
    for path in arguments.bundles:
        model = Model.load(path, arguments.backend, arguments.threads, parallel=arguments.parallel)
        name = path.resolve().name
        if name in models:
            raise UsageError(f"two bundles have the name {name}")
        models[name] = model
        if model.keeps_prefixes and arguments.prefix_mb:
            model.use_prefixes(prefixes)
        say(f"{name}: {model.backend}, context {model.context}, {model.parallel} at once")
    limits = Limits(
        body=arguments.most_bytes,
        waiting=arguments.most_waiting,
        seconds=arguments.most_seconds,
        tokens=arguments.most_tokens,
    )
    hosts = ["localhost", "127.0.0.1"] if local else None
    say(f"http://{arguments.host}:{arguments.port}/ (OpenAI's interface: /v1); Ctrl-C ends")
    uvicorn.run(
        application(models, limits, key=key, hosts=hosts),
        host=arguments.host,
        port=arguments.port,
        log_level="warning",
        timeout_graceful_shutdown=5,
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
