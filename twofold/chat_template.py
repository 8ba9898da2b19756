"""Chat templates: the program, in Jinja, that writes a conversation as the text a model was trained on.

It comes with the model, so a stranger wrote it. Jinja's immutable sandbox keeps it from files and from Python's
insides, but not from time and memory: ``{{ 'a' * 10**10 }}`` is one operation, and no timer in the same process can
stop it. So templates run in a process of their own, with a limit on its memory, that is killed when it takes too long.

That process is started fresh (not forked: this one may hold threads, a gigabyte of weights, a GPU), imports Jinja and
nothing else, and stays for the next conversation: the first rendering costs about a tenth of a second, the others
well under a millisecond. It ends when this process does, or closes its end.
"""

import contextlib
import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from twofold.errors import TwofoldError

SECONDS = 4.0  # for one rendering
SECONDS_TO_START = (
    30.0  # of the process, before any template runs: generous, as a busy machine is no fault of a template
)
MAX_ANSWER_BYTES = 64 << 20
STOPPED = f"the chat template was stopped: it took longer than {SECONDS:g} s, or too much memory"
WORKER = Path(__file__).with_name("_chat_template_worker.py")


class ChatTemplate:
    """A model's chat template.

    ``special_tokens`` are the texts that templates call ``bos_token``, ``eos_token`` and so on.

    Example:
        >>> template = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ eos_token }}",
        ...                         {"eos_token": "</s>"})
        >>> template.render([{"role": "user", "content": "Hi"}])
        '<user>Hi</s>'
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None):
        self.source = source
        self.special_tokens = dict(special_tokens or {})
        self._lock = threading.Lock()
        self._worker: _Worker | None = None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Any] | None = None,
        **variables: Any,
    ) -> str:
        """The conversation as text.

        Args:
            messages: Each with a ``role`` ("system", "user", "assistant", ...) and a ``content``.
            add_generation_prompt: End with what comes before an answer.
            tools: Descriptions of the tools that the model may call, for templates that know of any.
            variables: Whatever else this template reads (``enable_thinking``, say).

        Raises:
            TwofoldError: If a message has no role, the template refuses the messages, fails, or takes longer than
                ``SECONDS`` or more memory than it may.
        """
        names = {"messages": messages, "add_generation_prompt": add_generation_prompt, "tools": tools}
        names = {"documents": None, **self.special_tokens, **variables, **names}
        _check_messages(messages)
        try:
            request = json.dumps([self.source, names]).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise TwofoldError(f"messages and tools must be what JSON can say ({error})") from None
        with self._lock:
            answer = self._ask(request)
        if "text" in answer:
            return answer["text"]
        raise TwofoldError(answer["error"])

    def _ask(self, request: bytes) -> dict[str, str]:
        """One question to the process; one that gives no answer is given up, and the next question gets a new one."""
        worker, self._worker = self._worker, None
        if worker is None or not worker.is_alive():
            worker = _Worker()
        try:
            answer = worker.ask(request + b"\n", SECONDS, STOPPED)
        except BaseException:
            worker.close()
            raise
        self._worker = worker
        return answer


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise TwofoldError("messages must be a list of at least one {'role': ..., 'content': ...}")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TwofoldError(f"message {index} has no role: expected {{'role': 'user', 'content': '...'}}")


class _Worker:
    """The process. Questions and answers are a line of JSON each."""

    def __init__(self):
        # -I and -S: nothing of the user's environment or site is imported; the worker is told where Jinja is.
        command = [sys.executable, "-I", "-S", str(WORKER), json.dumps(sys.path)]
        does_not_start = "the process that renders chat templates does not start"
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        except OSError as error:
            raise TwofoldError(f"{does_not_start} ({error})") from None
        self.close = weakref.finalize(self, _end, self.process)
        try:
            self.ask(b"", SECONDS_TO_START, does_not_start)
        except BaseException:
            self.close()
            raise

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def ask(self, question: bytes, seconds: float, otherwise: str) -> dict[str, str]:
        """The answer. None comes from a process that has ended, by itself or because its time is up."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        out_of_time = threading.Timer(seconds, self.process.kill)
        out_of_time.start()
        try:
            with contextlib.suppress(BrokenPipeError):
                stdin.write(question)
                stdin.flush()
            line = stdout.readline(MAX_ANSWER_BYTES)
        finally:
            out_of_time.cancel()
        if not line.endswith(b"\n"):
            raise TwofoldError(otherwise)
        return json.loads(line)


def _end(process: subprocess.Popen) -> None:
    process.kill()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):  # what was not yet written will never be read
                stream.close()
    process.wait()
