"""Answers in OpenAI's forms: completions and chat completions, whole or streamed."""

from eep_jax.runtime.http.completion import CompletionRequest
from eep_jax.runtime.text.detokenizer import TextAssembler
from eep_jax.runtime.text.tokenizer import Tokenizer


class Failed(Exception):
    """The service accepted the request and then could not complete it."""


class Answer:
    """State of one answer: its text so far, and its end."""

    def __init__(self, request: CompletionRequest, stream, tokenizer: Tokenizer):
        self.request, self.stream = request, stream
        self.finish_reason: str | None = None
        # A message has a text of its own; a completion continues its prompt.
        decoder = tokenizer.decoder(() if request.chat else request.prompt)
        self._assembler = TextAssembler(request.stop, decoder)
        self._degraded: set[int] = set()

    def advance(self, progress) -> str:
        """Takes in one StreamProgress and returns its text. Raises Failed for its error."""
        self._degraded.update(progress.degraded)
        text = self._assembler.feed(progress.tokens)
        if progress.finish_reason is not None:
            text += self._assembler.finish()
        if self._assembler.stopped:
            # An earlier reader of this key cancelled it here: an error behind it is expected.
            self.stream.cancel()
        elif progress.error is not None:
            raise Failed(progress.error)
        self.finish_reason = "stop" if self._assembler.stopped else progress.finish_reason
        return text

    def opening(self) -> list[dict]:
        """The chunks of a stream before any text."""
        return (
            [self._envelope("chat.completion.chunk", delta=_SPEAKER)] if self.request.chat else []
        )

    def chunk(self, text: str) -> dict:
        """One increment of a stream; the last one has the finish reason."""
        if not self.request.chat:
            return self._envelope("text_completion", text=text)
        return self._envelope("chat.completion.chunk", delta={"content": text} if text else {})

    def whole(self, text: str) -> dict:
        """The answer to a request without `stream`."""
        if not self.request.chat:
            found = self._envelope("text_completion", text=text)
        else:
            message = {"role": "assistant", "content": text, "refusal": None}
            found = self._envelope("chat.completion", message=message)
        return found | {"usage": self.usage()}

    def usage(self) -> dict:
        prompt, completion = len(self.request.prompt), self._assembler.num_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }

    def _envelope(self, kind: str, **content) -> dict:
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": self.finish_reason}
        found = {
            "id": f"chat{self.stream.id}" if self.request.chat else self.stream.id,
            "object": kind,
            "created": self.stream.created,
            "model": self.request.model,
            "choices": [choice],
        }
        if self._degraded:
            found["degraded"] = {"experts": sorted(self._degraded)}
        return found


_SPEAKER = {"role": "assistant", "content": ""}
