"""Manage steerings over HTTP while `vllm serve` runs: register, replace, remove, list.

vLLM adds a plugin's routes to its server only if `VLLM_PLUGINS` names the plugin. Changes need the key in
`$TRIMTAB_ADMIN_KEY`, which is not the key that the model's clients have. `GET /trimtab` needs no key; it confirms to
clients that every worker can steer, and lists the registered names.
"""

from __future__ import annotations

import hmac
import os
from typing import Any

from trimtab.engines.vllm.frontend import NAMES, Names, check, connect, drop_unused, send
from trimtab.engines.vllm.rpc import run_async
from trimtab.errors import TrimtabError
from trimtab.files.steering_file import steering_from_bytes

ADMIN_KEY = "TRIMTAB_ADMIN_KEY"
LARGEST = 256 * 2**20  # maximum size of a steering file in bytes


class Endpoint:
    """vLLM's interface for endpoint plugins."""

    name = "trimtab"
    required_tasks = ("generate",)

    def __init__(self, names: Names = NAMES) -> None:
        self.names = names

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Check the engine before the first client is served. If it can't be steered, the server doesn't start."""
        workers = getattr(args, "api_server_count", None) or 1
        if workers > 1:
            raise TrimtabError("steerings are registered with one server process; start with --api-server-count 1")
        link = await run_async(connect(engine_client), engine_client)
        for name in self.names:
            await run_async(check(link, engine_client, self.names[name]), engine_client)
            await run_async(send(link, self.names[name]), engine_client)
        state.trimtab_engine = engine_client

    def attach_router(self, app: Any) -> None:
        """Add the routes `GET /trimtab`, `PUT` and `DELETE /trimtab/steerings/{name}`."""
        from starlette.requests import Request
        from starlette.responses import JSONResponse

        async def hello(request: Request) -> JSONResponse:
            engine = request.app.state.trimtab_engine
            link = await run_async(connect(engine), engine)
            return JSONResponse({"steerings": list(self.names), "layers": link.layers, "width": link.width})

        async def change(request: Request) -> JSONResponse:
            refused = _refused(request)
            if refused is not None:
                return JSONResponse({"error": refused[1]}, refused[0])
            engine, name = request.app.state.trimtab_engine, request.path_params["name"]
            try:
                link = await run_async(connect(engine), engine)
                if request.method == "DELETE":
                    self.names.unregister(name)
                else:
                    steering = steering_from_bytes(await request.body(), name)
                    await run_async(check(link, engine, steering), engine)
                    await run_async(send(link, steering), engine)
                    self.names.register(name, steering)
                await run_async(drop_unused(link, self.names), engine)
            except TrimtabError as error:
                return JSONResponse({"error": str(error)}, 400)
            return JSONResponse({"steerings": list(self.names)})

        app.add_route("/trimtab", hello, methods=["GET"])
        app.add_route("/trimtab/steerings/{name}", change, methods=["PUT", "DELETE"])


def _refused(request: Any) -> tuple[int, str] | None:
    """Status and reason if a request may not change anything, otherwise `None`."""
    key = os.environ.get(ADMIN_KEY)
    if not key:
        return 403, f"the server was started without {ADMIN_KEY}, so steerings can't be changed over HTTP"
    header = request.headers.get("authorization", "")
    if not hmac.compare_digest(header.encode(), f"Bearer {key}".encode()):
        return 401, f"give the key in {ADMIN_KEY} as a bearer token"
    if int(request.headers.get("content-length") or 0) > LARGEST:
        return 413, f"a steering file can have at most {LARGEST} bytes here"
    return None
