"""Talk to a running ComfyUI server: requests, workflows, and what went wrong in them.

`aiohttp`, which ComfyUI brings along, is needed by `Client.run` only.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import aiohttp

REQUEST_SECONDS = 60
POLL_SECONDS = 0.1
LOOK_UP_SECONDS = 1.0

Progress = Callable[[str, dict[str, Any]], None]


class ServerError(Exception):
    """The server did not start, died, or does not answer."""


class WorkflowError(Exception):
    """A node refused its inputs or failed; what and where is in the attributes."""

    def __init__(self, node_id: str, node_type: str, exception_type: str, message: str) -> None:
        super().__init__(f"node {node_id} ({node_type}): {message}")
        self.node_id = node_id
        self.node_type = node_type
        self.exception_type = exception_type
        self.message = message


class WorkflowInterrupted(Exception):
    """Somebody pressed Cancel while the workflow ran."""


class Client:
    """The HTTP and websocket side of a ComfyUI server at `url`."""

    def __init__(self, url: str) -> None:
        self.url = url
        # Without a proxy: an environment that names one would send even loopback through it.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def check_alive(self, trouble: str) -> None:
        """Raise `ServerError` if the server is known to be gone; here nothing is known."""

    def get(self, path: str) -> Any:
        """Return the JSON of a GET."""
        return self._request(path, None)

    def post(self, path: str, body: Any = None) -> Any:
        """Return the JSON that a POST of `body` answers, or None."""
        return self._request(path, {} if body is None else body)

    def fetch(self, path: str) -> bytes:
        """Return the bytes of a GET."""
        return self._bytes(urllib.request.Request(self.url + path))

    def _request(self, path: str, body: Any) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} if data is not None else {}
        text = self._bytes(urllib.request.Request(self.url + path, data, headers))
        return json.loads(text) if text else None

    def _bytes(self, request: urllib.request.Request) -> bytes:
        try:
            with self._opener.open(request, timeout=REQUEST_SECONDS) as response:
                return response.read()
        except urllib.error.HTTPError:
            raise  # an answer, for the caller to read
        except OSError as error:
            raise ServerError(f"No answer from {request.full_url}: {error}") from error

    # --- workflows -------------------------------------------------------------------------------

    def submit(self, workflow: dict[str, Any], client_id: str | None = None) -> str:
        """Queue an API-format workflow and return its prompt id."""
        body = {"prompt": workflow, "client_id": client_id or uuid.uuid4().hex}
        try:
            answer = self.post("/prompt", body)
        except urllib.error.HTTPError as error:
            raise _validation_error(json.loads(error.read()), workflow) from None
        if answer.get("node_errors"):
            # ComfyUI would run the rest and leave these outputs out in silence.
            self.post("/queue", {"delete": [answer["prompt_id"]]})
            raise _validation_error(answer, workflow)
        return answer["prompt_id"]

    def wait(self, prompt_id: str, timeout: float = 600) -> dict[str, Any]:
        """Wait for a queued workflow and return its history entry, or raise what went wrong."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            entry = self._finished(prompt_id)
            if entry is not None:
                return _verdict(entry)
            time.sleep(POLL_SECONDS)
        raise ServerError(f"The workflow did not end within {timeout:g} s.")

    def run(
        self,
        workflow: dict[str, Any],
        on_progress: Progress | None = None,
        timeout: float = 600,
    ) -> dict[str, Any]:
        """Run an API-format workflow to its end and return its history entry.

        `on_progress(event, data)` gets every websocket message about it. Raises `WorkflowError`,
        `WorkflowInterrupted`, or `ServerError` when the time is up or the server dies.
        """
        import aiohttp

        try:
            return asyncio.run(self._run(workflow, on_progress, timeout))
        except aiohttp.ClientError as error:
            self.check_alive("died while the workflow ran")
            raise ServerError(f"No websocket at {self.url}: {error}") from error

    def interrupt(self, prompt_id: str | None = None) -> None:
        """Press Cancel, for one workflow or for whatever runs."""
        self.post("/interrupt", {"prompt_id": prompt_id} if prompt_id else {})

    @staticmethod
    def outputs(history: dict[str, Any], node_id: str | int) -> dict[str, Any]:
        """Return what a node of a finished workflow showed in the UI."""
        return history["outputs"].get(str(node_id), {})

    async def _run(
        self, workflow: dict[str, Any], on_progress: Progress | None, timeout: float
    ) -> dict[str, Any]:
        import aiohttp

        client_id = uuid.uuid4().hex
        deadline = time.monotonic() + timeout
        address = f"{self.url.replace('http', 'ws', 1)}/ws?clientId={client_id}"
        # The listener is there before the workflow is, so no message is missed.
        async with aiohttp.ClientSession() as session, session.ws_connect(address) as channel:
            prompt_id = self.submit(workflow, client_id)
            while time.monotonic() < deadline:
                # Messages tell the progress, the history tells the end, and it is looked up now
                # and then: a listener that the server forgot must not wait for ever.
                heard = await _listen(channel, prompt_id, on_progress, LOOK_UP_SECONDS)
                entry = self._finished(prompt_id)
                if entry is not None:
                    if not heard:  # on a busy machine messages come later than the history
                        await _listen(channel, prompt_id, on_progress, LOOK_UP_SECONDS)
                    return _verdict(entry)
        self.interrupt(prompt_id)
        raise ServerError(f"The workflow did not end within {timeout:g} s.")

    def _finished(self, prompt_id: str) -> dict[str, Any] | None:
        """Return the history entry of a workflow if it is over."""
        try:
            return self.get(f"/history/{prompt_id}").get(prompt_id)
        except ServerError:
            self.check_alive("died while the workflow ran")
            raise


async def _listen(
    channel: aiohttp.ClientWebSocketResponse,
    prompt_id: str,
    on_progress: Progress | None,
    seconds: float,
) -> bool:
    """Pass on messages about a workflow until the time is up; True if its end was among them."""
    with contextlib.suppress(asyncio.TimeoutError):
        async with asyncio.timeout(seconds):
            async for message in channel:
                if not isinstance(message.data, str):  # a preview picture
                    continue
                content = json.loads(message.data)
                event, data = content.get("type", ""), content.get("data") or {}
                if data.get("prompt_id", prompt_id) != prompt_id:
                    continue
                if on_progress:
                    on_progress(event, data)
                if event == "executing" and data.get("node") is None:
                    return True
            # The server closed the channel: let the caller look up why, but not in a hurry.
            await asyncio.sleep(POLL_SECONDS)
    return False


def _validation_error(answer: dict[str, Any], workflow: dict[str, Any]) -> WorkflowError:
    """Return the first complaint of ComfyUI about a workflow that it did not accept."""
    for node_id, found in (answer.get("node_errors") or {}).items():
        for error in found["errors"]:
            message = f"{error['message']}: {error['details']}"
            return WorkflowError(node_id, found["class_type"], error["type"], message)
    error = answer.get("error") or {}
    node_id = str((error.get("extra_info") or {}).get("node_id", ""))
    message = f"{error.get('message', answer)} {error.get('details', '')}".strip()
    node_type = workflow.get(node_id, {}).get("class_type", "")
    return WorkflowError(node_id, node_type, error.get("type", ""), message)


def _verdict(entry: dict[str, Any]) -> dict[str, Any]:
    """Return the history entry of a workflow that went well, raise for any other."""
    status = entry["status"]
    for event, data in status["messages"]:
        if event == "execution_error":
            raise WorkflowError(
                str(data["node_id"]),
                data["node_type"],
                data["exception_type"],
                data["exception_message"].strip(),
            )
        if event == "execution_interrupted":
            raise WorkflowInterrupted(f"Interrupted in node {data['node_id']}.")
    if not status["completed"]:
        raise ServerError(f"The workflow ended without success: {status}")
    return entry
