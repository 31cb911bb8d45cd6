"""Text in, text out: prompts to continuations, streamed or many side by side."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Generator, Iterator, Sequence

from flashgpt.generation.decode import check_prompt, decode_rows
from flashgpt.generation.rows import Reason, Row
from flashgpt.generation.sampling import Drawn
from flashgpt.generation.stop import TextStream
from flashgpt.model.gpt2 import GPTModel
from flashgpt.runconfig import SampleConfig
from flashgpt.tokenizer import Tokenizer

BATCH = 16


@dataclasses.dataclass(frozen=True)
class Text:
    """A continuation.

    Attributes:
        sample: which of its prompt's samples it is, from 0.
        text: without the prompt, and up to the stop string.
        tokens: what was drawn, those of the stop string included, `<|endoftext|>` and stop ids not.
        reason: eos (`<|endoftext|>`), stop, length (max_new_tokens), context (past_context="stop").
    """

    prompt: str
    sample: int
    text: str
    tokens: tuple[Drawn, ...]
    reason: Reason

    @property
    def ids(self) -> tuple[int, ...]:
        """The ids of the tokens."""
        return tuple(token.id for token in self.tokens)


@dataclasses.dataclass(frozen=True)
class TextGenerator:
    """Text in, text out."""

    model: GPTModel
    tokenizer: Tokenizer

    def stream(
        self, prompt: str, config: SampleConfig | None = None, *, use_cache: bool = True
    ) -> Generator[str, None, Text]:
        """The continuation of `prompt`, in pieces of whole characters as they come.

        A piece is never part of a stop string. The generator's return value is the whole.

        Raises:
            ValueError: an empty prompt or one longer than the context.
        """
        writer = self._writer(prompt, 0, config or SampleConfig())
        pieces = self._write([writer], config or SampleConfig(), use_cache, None)
        with contextlib.closing(pieces):
            for _, piece in pieces:
                if piece:
                    yield piece
        return writer.text()

    def texts(
        self,
        prompts: Sequence[str],
        config: SampleConfig | None = None,
        *,
        samples: int = 1,
        logprobs: int | None = None,
        batch: int = BATCH,
    ) -> Iterator[Text]:
        """`samples` continuations of each prompt, in order: each as it would be alone.

        Sample 0 is what `stream` gives. At temperature 0 the samples of a prompt are equal.

        Args:
            logprobs: also log-probabilities, of each token and of so many likeliest.
            batch: texts that are written side by side; memory grows with it.

        Raises:
            ValueError: no prompts, samples or batch below 1, or a prompt that is empty or longer
                than the context (its number, from 1, is named where there are several).
        """
        config = config or SampleConfig()
        for name, value in (("prompts", len(prompts)), ("samples", samples), ("batch", batch)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for number, prompt in enumerate(prompts, 1):
            try:
                check_prompt(self.tokenizer.encode(prompt), self.model.cfg)
            except ValueError as error:
                where = f"prompt {number}: " if len(prompts) > 1 else ""
                raise ValueError(f"{where}{error}") from None
        wanted = itertools.product(prompts, range(samples))
        while part := list(itertools.islice(wanted, batch)):
            writers = [self._writer(prompt, sample, config) for prompt, sample in part]
            for _ in self._write(writers, config, True, logprobs):
                pass
            yield from (writer.text() for writer in writers)

    def __call__(self, prompt: str, config: SampleConfig | None = None) -> str:
        """The whole continuation of `prompt`, without the prompt."""
        return "".join(self.stream(prompt, config))

    def _writer(self, prompt: str, sample: int, config: SampleConfig) -> _Writer:
        row = Row(self.tokenizer.encode(prompt), config.max_new_tokens, sample)
        return _Writer(prompt, row, TextStream(self.tokenizer, config.stop))

    def _write(
        self,
        writers: Sequence[_Writer],
        config: SampleConfig,
        use_cache: bool,
        logprobs: int | None,
    ) -> Generator[tuple[_Writer, str], None, None]:
        """Runs the writers to their ends; gives each piece of text as it comes."""
        of = {writer.row: writer for writer in writers}
        tokens = decode_rows(
            self.model,
            list(of),
            config,
            vocab_size=self.tokenizer.vocab_size,
            eos_id=self.tokenizer.eos_id,
            use_cache=use_cache,
            top=logprobs,
        )
        with contextlib.closing(tokens):
            for row, drawn in tokens:
                yield of[row], of[row].push(drawn)
        for writer in writers:
            yield writer, writer.flush()


@dataclasses.dataclass(frozen=True)
class _Writer:
    """A text that is being written."""

    prompt: str
    row: Row
    out: TextStream
    pieces: list[str] = dataclasses.field(default_factory=list)
    tokens: list[Drawn] = dataclasses.field(default_factory=list)

    def push(self, drawn: Drawn) -> str:
        """The text that can be shown after one more token."""
        self.tokens.append(drawn)
        self.pieces.append(self.out.push(drawn.id))
        if self.out.stopped:
            self.row.reason = "stop"
        return self.pieces[-1]

    def flush(self) -> str:
        """The end of the text."""
        self.pieces.append(self.out.flush())
        return self.pieces[-1]

    def text(self) -> Text:
        """The whole."""
        assert self.row.reason is not None, "a text has ended"
        whole = "".join(self.pieces)
        return Text(self.prompt, self.row.sample, whole, tuple(self.tokens), self.row.reason)


def generate(
    model: GPTModel, tokenizer: Tokenizer, prompt: str, config: SampleConfig | None = None
) -> str:
    """The continuation of `prompt`, without the prompt.

    Raises:
        ValueError: an empty prompt or one longer than the context.
    """
    return TextGenerator(model, tokenizer)(prompt, config)
