"""What a person should know of a run, in the log and in the node."""

import logging

from .screen import routes


class Notes:
    """Lines that stay, and one below them that says how things stand."""

    def __init__(self, node_id: str):
        self.node_id = node_id
        self.lines: list[str] = []
        self.status = ""

    def say(self, line: str) -> None:
        """One more line, for both."""
        logging.info("LoRA²: %s", "".join(c if c.isprintable() else " " for c in line))
        self.show(line)

    def show(self, line: str) -> None:
        """One that the log has by now; nothing where it is empty or there already."""
        if line and line not in self.lines:
            self.lines.append(line)
            self._send()

    def stand(self, status: str) -> None:
        """How things stand now, instead of what was said of it before."""
        if status != self.status:
            self.status = status
            self._send()

    def _send(self) -> None:
        routes.show_text(self.node_id, "\n".join(filter(None, (*self.lines, self.status))))
