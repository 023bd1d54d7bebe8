"""Answers in OpenAI's forms: completions and chat completions, whole or streamed."""

import asyncio
from collections.abc import AsyncIterator, Sequence

from eep_jax.runtime.serving.contract import CompletionRequest
from eep_jax.runtime.text.detokenizer import TextAssembler
from eep_jax.runtime.text.tokenizer import Tokenizer


class Failed(Exception):
    """The service accepted the request and then could not complete it."""


class Choice:
    """State of one answer: its text so far, and its end."""

    def __init__(self, request: CompletionRequest, stream, tokenizer: Tokenizer):
        self.request, self.stream = request, stream
        self.finish_reason: str | None = None
        self.degraded: set[int] = set()
        # A message has a text of its own; a completion continues its prompt.
        decoder = tokenizer.decoder(() if request.chat else request.prompt)
        self._assembler = TextAssembler(request.stop, decoder)
        self._echo = request.echo

    @property
    def num_tokens(self) -> int:
        return self._assembler.num_tokens

    def advance(self, progress) -> str:
        """Takes in one StreamProgress and returns its text. Raises Failed for its error."""
        self.degraded.update(progress.degraded)
        text, self._echo = self._echo + self._assembler.feed(progress.tokens), ""
        if progress.finish_reason is not None:
            text += self._assembler.finish()
        if self._assembler.stopped:
            # An earlier reader of this key cancelled it here: an error behind it is expected.
            self.stream.cancel()
        elif progress.error is not None:
            raise Failed(progress.error)
        self.finish_reason = "stop" if self._assembler.stopped else progress.finish_reason
        return text

    async def deltas(self) -> AsyncIterator[str]:
        """Yields the text of each increment until the answer is complete. Raises Failed."""
        async for progress in self.stream:
            yield self.advance(progress)
            if self.finish_reason is not None:
                return
        raise Failed("the stream ended without a reason; send the request again")

    def form(self, **content) -> dict:
        """The choice with this content."""
        found = {"index": self.request.index, **content, "logprobs": None}
        return found | {"finish_reason": self.finish_reason}


class Answer:
    """The choices that answer one HTTP request, in the order of their index."""

    def __init__(self, requests: Sequence[CompletionRequest], streams: Sequence, tokenizer):
        pairs = zip(requests, streams, strict=True)
        self.choices = [Choice(request, stream, tokenizer) for request, stream in pairs]
        self.request = requests[0]

    async def deltas(self) -> AsyncIterator[tuple[Choice, str]]:
        """Yields the increments of all choices, as they come. Raises Failed."""
        if len(self.choices) == 1:
            (choice,) = self.choices
            async for delta in choice.deltas():
                yield choice, delta
            return
        streams = [choice.deltas() for choice in self.choices]
        waiting = {asyncio.ensure_future(anext(s)): i for i, s in enumerate(streams)}
        try:
            while waiting:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in sorted(done, key=waiting.__getitem__):
                    index = waiting.pop(task)
                    try:
                        delta = task.result()
                    except StopAsyncIteration:
                        continue
                    yield self.choices[index], delta
                    waiting[asyncio.ensure_future(anext(streams[index]))] = index
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            for stream in streams:
                await stream.aclose()

    def cancel(self) -> None:
        """Ends the requests of all choices that are not complete."""
        for choice in self.choices:
            if choice.finish_reason is None:
                choice.stream.cancel()

    def opening(self) -> list[dict]:
        """The chunks of a stream before any text."""
        if not self.request.chat:
            return []
        speaks = {"role": "assistant", "content": ""}
        return [self._envelope(True, [choice.form(delta=speaks)]) for choice in self.choices]

    def chunk(self, choice: Choice, text: str) -> dict:
        """One increment of a stream; the last one of a choice has its finish reason."""
        if not self.request.chat:
            return self._envelope(True, [choice.form(text=text)])
        return self._envelope(True, [choice.form(delta={"content": text} if text else {})])

    def final(self) -> dict:
        """The chunk behind all others, for a client that asked for the usage."""
        return self._envelope(True, []) | {"usage": self.usage()}

    def whole(self, texts: Sequence[str]) -> dict:
        """The answer to a request without `stream`, from the text of each choice."""
        if self.request.chat:
            says = [{"role": "assistant", "content": text, "refusal": None} for text in texts]
            contents = [{"message": message} for message in says]
        else:
            contents = [{"text": text} for text in texts]
        pairs = zip(self.choices, contents, strict=True)
        forms = [choice.form(**content) for choice, content in pairs]
        return self._envelope(False, forms) | {"usage": self.usage()}

    def usage(self) -> dict:
        """Tokens of this request; a prompt with several answers counts once."""
        asked = {id(choice.request.prompt): choice.request.prompt for choice in self.choices}
        prompt = sum(map(len, asked.values()))
        completion = sum(choice.num_tokens for choice in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }

    def _envelope(self, is_chunk: bool, choices: list[dict]) -> dict:
        chat, stream = self.request.chat, self.choices[0].stream
        kind = "chat.completion.chunk" if is_chunk else "chat.completion"
        found = {
            "id": f"chat{stream.id}" if chat else stream.id,
            "object": kind if chat else "text_completion",
            "created": stream.created,
            "model": self.request.model,
            "choices": choices,
        }
        if degraded := set().union(*(choice.degraded for choice in self.choices)):
            found["degraded"] = {"experts": sorted(degraded)}
        return found
