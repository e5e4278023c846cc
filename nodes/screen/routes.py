"""All that speaks to ComfyUI's server: texts in nodes, the REST interface and its events.

docs/api.md describes every reply. What costs time runs in threads beside the event loop.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from aiohttp import web

import server

from ...lora2_core import comfy_host
from ...lora2_core.comfy_host.surface import MISSING, Part
from ...lora2_core.files.header import LoRAFileError
from ...lora2_core.jobs.queue import JobQueue, UnknownJob, WrongState
from . import listed_names, views
from .events import Announcer
from .trainings import EVENT, JobList

Handler = Callable[[web.Request], Awaitable[web.Response]]

_LONGEST_NAME = 1000
# Control characters, absolute paths, drives, and a way up: no name in a list looks like that.
_UNFIT = re.compile(r"[\x00-\x1f]|^[/\\]|^[A-Za-z]:|(^|[/\\])\.\.([/\\]|$)")
_LARGEST_BODY = 10_000
_CLIENT = re.compile(r"[A-Za-z0-9_-]{1,100}")  # the id of a page's websocket
NOTE = "lora2.note"
# A browser that opens a reply by itself takes it for what it is said to be.
_INERT = {"X-Content-Type-Options": "nosniff"}
_PICTURE = {"Cache-Control": "private, max-age=600", **_INERT}
_NEWS = {"Cache-Control": "no-store", **_INERT}


class BadInput(ValueError):
    """A request for something that cannot be."""


# --- what nodes need ------------------------------------------------------------------------


def show_text(node_id: str, text: str) -> None:
    """Show ``text`` inside a node while it runs, in the page that queued it; none did in a script.

    Not by ComfyUI's own message for that: up to front end 1.32 its text runs as markup, and in
    every page.
    """
    instance = _instance()
    client = instance and instance.client_id
    if client is not None:
        instance.send_sync(NOTE, {"node_id": str(node_id), "text": text}, client)


def prompt_running() -> bool:
    """Whether ComfyUI executes a prompt now or has one waiting."""
    instance = _instance(Part.BACKGROUND)
    return instance is not None and instance.prompt_queue.get_tasks_remaining() > 0


def register(queue: JobQueue) -> None:
    """Offer ``queue`` by REST and send its events; when ComfyUI loads the pack. Only once."""
    instance = _instance()
    if instance is None or any(route.path == views.ADDRESS for route in _defined(instance)):
        return
    api = Api(queue, _queue_prompt, _is_pending)
    api.add_to(instance.routes)
    api.announce(lambda event: instance.send_sync(EVENT, event))


# --- the interface --------------------------------------------------------------------------


class Api:
    """The handlers, on any queue. ``queue_prompt(prompt, client, headers)`` gives the id under
    which ComfyUI has it, and raises WrongState where it is refused; ``is_pending(id)``: not yet
    over."""

    def __init__(
        self,
        queue: JobQueue,
        queue_prompt: Callable[[dict[str, Any], str, Mapping[str, str]], Awaitable[str]],
        is_pending: Callable[[str], bool],
    ):
        self.jobs = JobList(queue, listed_names.host())
        self._queue_prompt, self._is_pending = queue_prompt, is_pending
        self._again: dict[str, str] = {}  # the prompts of interrupted trainings, by training

    def add_to(self, table: web.RouteTableDef) -> None:
        """Define every route."""
        one = views.ADDRESS + "/{id}"
        table.get(views.ADDRESS)(_safe(self.list_jobs))
        table.get(one)(_safe(self.show_job))
        table.get(one + "/samples/{step}/{n}")(_safe(self.show_sample))
        table.get(one + "/report")(_safe(self.show_report))
        table.post(one + "/{what}")(_safe(self.act))
        table.get("/lora2/inspect")(_safe(self.inspect))
        table.post("/lora2/checkpoints/clear")(_safe(self.clear_checkpoints))

    def announce(self, send: Callable[[dict[str, Any]], None]) -> None:
        """Send an event of whatever happens from now on."""
        announcer = Announcer(self.jobs.news, send)
        self.jobs.queue.listen(announcer.listen)

    async def list_jobs(self, _request: web.Request) -> web.Response:
        jobs = self.jobs
        return await _json(lambda: {"jobs": jobs.summaries(), "checkpoints": jobs.checkpoints()})

    async def clear_checkpoints(self, _request: web.Request) -> web.Response:
        return await _json(self.jobs.clear_checkpoints)

    async def show_job(self, request: web.Request) -> web.Response:
        return await _json(lambda: self.jobs.details(request.match_info["id"]))

    async def show_sample(self, request: web.Request) -> web.Response:
        place = [request.match_info[name] for name in ("step", "n")]
        if not all(re.fullmatch(r"[0-9]{1,9}", text) for text in place):
            raise BadInput("A picture is asked for by the numbers of its step and its prompt.")
        step, n = map(int, place)
        data = await asyncio.to_thread(self.jobs.sample, request.match_info["id"], step, n)
        return web.Response(body=data, content_type="image/png", headers=_PICTURE)

    async def show_report(self, request: web.Request) -> web.Response:
        data = await asyncio.to_thread(self.jobs.report, request.match_info["id"])
        return web.Response(body=data, content_type="image/png", headers=_PICTURE)

    async def act(self, request: web.Request) -> web.Response:
        what, id = request.match_info["what"], request.match_info["id"]
        if what not in ("cancel", "pause", "resume"):
            raise web.HTTPNotFound(text=f"A training can cancel, pause and resume, not {what!r}.")
        done = await asyncio.to_thread(self.jobs.act, id, what)
        if done is None:
            comfy_host.need(Part.RESUME)
            await self._go_on(id, await _client_of(request), request.headers)
            done = await asyncio.to_thread(self.jobs.summary, id)
        return await _json(lambda: done)

    async def inspect(self, request: web.Request) -> web.Response:
        name = request.query.get("name", "")
        if not name or len(name) > _LONGEST_NAME or _UNFIT.search(name):
            raise BadInput("name must be that of a file in the list of LoRAs.")
        return await _json(lambda: _inspected(name))

    async def _go_on(self, id: str, client: str, headers: Mapping[str, str]) -> None:
        """Queue the prompt of an interrupted training, unless that is under way already."""
        prompt = await asyncio.to_thread(self.jobs.prompt, id)
        queued = self._again.get(id)
        if queued == "" or (queued and self._is_pending(queued)):
            raise WrongState("The workflow of this training is queued already; it goes on soon.")
        self._again[id] = ""  # a second click may come before ComfyUI has answered
        try:
            self._again[id] = await self._queue_prompt(prompt, client, headers)
        except BaseException:
            del self._again[id]
            raise


def _inspected(name: str) -> dict[str, Any]:
    if name not in comfy_host.lora_names():
        raise UnknownJob(f"{name!r} is not in the list of LoRAs; press R to refresh it.")
    path = comfy_host.lora_path(name)
    try:
        return views.inspected(name, path)
    except LoRAFileError as error:
        raise BadInput(str(error).replace(str(path), name)) from None


# --- replies --------------------------------------------------------------------------------


async def _json(make: Callable[[], Any]) -> web.Response:
    """The reply with what ``make`` returns; made and written down in a thread."""
    data = await asyncio.to_thread(lambda: json.dumps(make(), allow_nan=False).encode())
    return web.Response(body=data, content_type="application/json", headers=_NEWS)


def _error(status: int, text: str) -> web.Response:
    return web.json_response({"error": listed_names.clean(text)}, status=status, headers=_NEWS)


def _safe(handler: Handler) -> Handler:
    """``handler``, with errors as sentences and foreign pages shut out of what changes things."""

    async def answer(request: web.Request) -> web.Response:
        if request.method == "POST" and is_foreign(request.headers, _allowed_origin()):
            return _error(403, "Only ComfyUI's own page may do this.")
        try:
            return await handler(request)
        except UnknownJob as error:
            return _error(404, str(error))
        except WrongState as error:
            return _error(409, str(error))
        except (BadInput, comfy_host.HostError) as error:
            return _error(400, str(error))
        except web.HTTPException as error:
            return _error(error.status, error.text or error.reason)
        except Exception:
            logging.exception("LoRA²: %s could not be answered.", request.path)
            return _error(500, "That failed; ComfyUI's log tells why.")

    return answer


def is_foreign(headers: Any, allowed: str | None = None) -> bool:
    """Whether a browser sends this for another page than ComfyUI's own.

    ComfyUI looks itself, but only on loopback addresses, not when it is started with
    --enable-cors-header, and it lets "Origin: null" pass. ``allowed``: the argument of that.
    A proxy may change Host; then the browser's own word counts, or the name the proxy tells.
    """
    origin, site = headers.get("Origin"), headers.get("Sec-Fetch-Site")
    if allowed is not None and (allowed == "*" or origin == allowed):
        return False
    if site is not None:
        return site not in ("same-origin", "none")
    if origin is None:
        return False  # no browser: those send it with every POST
    try:
        page = urlsplit(origin).netloc.lower()
    except ValueError:  # no address at all
        return True
    own = [headers.get(name, "").lower() for name in ("Host", "X-Forwarded-Host")]
    return not page or page not in own


def _allowed_origin() -> str | None:
    return getattr(getattr(server, "args", None), "enable_cors_header", None)


async def _client_of(request: web.Request) -> str:
    """The page that wants to see how the prompt gets on, by the id of its websocket."""
    sent = bytearray()
    # Read in parts: whoever sends it so need not say how long it is.
    async for part in request.content.iter_chunked(_LARGEST_BODY):
        sent += part
        if len(sent) > _LARGEST_BODY:
            raise BadInput("The body is too large; {} will do.")
    try:
        body = json.loads(sent.decode() or "{}")
    except (ValueError, RecursionError):
        raise BadInput("The body is no JSON; {} will do.") from None
    client = body.get("client_id", "") if isinstance(body, dict) else ""
    return client if isinstance(client, str) and _CLIENT.fullmatch(client) else ""


# --- ComfyUI's own queue --------------------------------------------------------------------


def _instance(*parts: Part) -> Any:
    """The server; None in a process without one, or with one that cannot do this."""
    if MISSING.keys() & {Part.SCREEN, *parts}:
        return None
    return getattr(server.PromptServer, "instance", None)


def _defined(instance: Any) -> list[web.RouteDef]:
    return [route for route in instance.routes if isinstance(route, web.RouteDef)]


async def _queue_prompt(prompt: dict[str, Any], client: str, headers: Mapping[str, str]) -> str:
    """Queue a prompt by a POST to /prompt, as a page does: it is checked, other packs see it.

    ``headers``: of the request that asks for it, which name its user and may be needed to pass.
    """
    body: dict[str, Any] = {"prompt": prompt} | ({"client_id": client} if client else {})
    kept = {name: value for name, value in headers.items() if not _OF_ONE_REQUEST.match(name)}
    try:
        async with (
            aiohttp.ClientSession(headers=kept, timeout=_PATIENCE) as session,
            session.post(_own_address(), json=body, ssl=False) as reply,
        ):
            answer = json.loads(await reply.text() or "{}") if reply.status in (200, 400) else {}
            status = reply.status
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        raise WrongState(f"ComfyUI does not take its own prompts ({error}); {_BY_HAND}") from None
    if status == 200 and "prompt_id" in answer:
        return str(answer["prompt_id"])
    error = answer.get("error")
    reason = error.get("message", "") if isinstance(error, dict) else str(error or f"HTTP {status}")
    raise WrongState(f"ComfyUI refuses the workflow of this training ({reason}): {_BY_HAND}")


_BY_HAND = "open it, put it right and queue it again."
_PATIENCE = aiohttp.ClientTimeout(total=60)
# What is said of one connection, one body or the page; the rest belongs to the user.
_OF_ONE_REQUEST = re.compile(
    r"(?i)(host|origin|referer|sec-.*|content-.*|connection|keep-alive|transfer-encoding|te|trailer"
    r"|upgrade|expect|accept.*|if-.*|range)$"
)


def _own_address() -> str:
    """Where this server takes prompts, from this machine."""
    instance, told = _instance(), getattr(server, "args", None)
    host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(
        instance.address, instance.address
    )
    secure = getattr(told, "tls_keyfile", None) and getattr(told, "tls_certfile", None)
    host = f"[{host}]" if ":" in host else host
    return f"http{'s' if secure else ''}://{host}:{instance.port}/prompt"


def _is_pending(prompt_id: str) -> bool:
    running, queued = _instance().prompt_queue.get_current_queue_volatile()
    return any(item[1] == prompt_id for item in (*running, *queued))
