"""What one rank does to generate text, and what rank 0 prints: the text as it grows, or the results as JSON."""

import sys
import time
from collections.abc import Callable, Sequence

from common.text import to_json
from data.tokens.tokenizer import TextTokenizer
from moe.generation.generate import generate
from parallel.mesh import broadcast_from_first, close_process_group, init_process_group
from parallel.startup.launch import world_from_env
from parallel.startup.rendezvous import START_TIMEOUT_S, choose_on_rank0, open_store
from training.device import compute_dtype, pick_device
from training.formats.loading import load_model
from training.formats.model_directory import open_given_tokenizer
from training.formats.reader import open_model
from training.generation.config import GenerateConfig
from training.generation.request import Request, read_request

REPLACEMENT = "\ufffd"
"""What a decoder writes for bytes that are not a whole character, or not yet."""
INCOMPLETE_BYTES = 3
"""The most bytes of a UTF-8 character that is not complete. A decoder writes at most one `REPLACEMENT` for each."""
KEPT_TOKENS = 24
"""The number of tokens that are decoded again with the next one. Four characters have at most 16 byte tokens."""


class StreamedText:
    """Decodes one row token by token, and ends its text at the first stop string.

    The parts that it releases together are the text that `decode` returns for all tokens, after the text of the prompt,
    for any sequence of tokens. It therefore releases only text that no later token can change, and holds back text that
    may be the start of a stop string.

    Args:
        decode: turns token ids into text.
        prompt: the token ids before the generated ones.
        stops: strings that end the text and are not part of it. The one that is complete first ends it.

    Attributes:
        text: the text released so far.
        stopped: whether a stop string was found. Text after it is ignored.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int], stops: Sequence[str]) -> None:
        self.text, self.stopped = "", False
        self._decode, self._stops = decode, stops
        # Ids are decoded together with the ids before them, because some tokenizers drop the space at the beginning of
        # what they decode. The first `_known` characters of the window's text are released or belong to the prompt.
        self._window, self._window_text = list(prompt), decode(prompt)
        self._known = len(self._window_text)
        self._pending = ""  # Text that no later token can change, but that may be the start of a stop string.

    def add(self, token: int) -> str:
        """Add a token. Return the text that can be released now; it continues what earlier calls returned."""
        self._window.append(token)
        return self._release(self._decode_new(final=False), final=False)

    def end(self) -> str:
        """End the row. Return the text that was held back."""
        return self._release(self._decode_new(final=True), final=True)

    def _decode_new(self, final: bool) -> str:
        text, text_before = self._decode(self._window), self._window_text
        incomplete = 0 if final else min(len(text) - len(text.rstrip(REPLACEMENT)), INCOMPLETE_BYTES)
        new = text[self._known : len(text) - incomplete]
        self._known, self._window_text = max(self._known, len(text) - incomplete), text
        if text == text_before and text and not incomplete and not final:
            self._window.pop()  # The token has no text, such as <s>. Without this, many of them make a long window.
        elif len(self._window) > 2 * KEPT_TOKENS:
            self._shorten_window()
        return new

    def _shorten_window(self) -> None:
        """Keep the last tokens of the window only, unless the cut would change the text.

        The two parts have the same text as the whole, except for a space at the beginning of the second part. If the
        cut were within a character or within a run of bytes, they would have more replacement characters. The second
        part has more bytes than a character, so that later tokens cannot change the decision.
        """
        kept = self._window[-KEPT_TOKENS:]
        text, before, after = self._window_text, self._decode(self._window[:-KEPT_TOKENS]), self._decode(kept)
        is_exact = text.startswith(before) and text.endswith(after) and len(before) + len(after) <= len(text)
        if is_exact and len(after) > INCOMPLETE_BYTES:
            self._window, self._window_text = kept, after
            self._known -= len(text) - len(after)

    def _release(self, new: str, final: bool) -> str:
        if self.stopped:
            return ""
        self._pending += new
        found = [(place + len(stop), place) for stop in self._stops if (place := self._pending.find(stop)) >= 0]
        if found:
            self.stopped = True
            released, self._pending = self._pending[: min(found)[1]], ""
        else:
            keep = 0 if final else max((_overlap(self._pending, stop) for stop in self._stops), default=0)
            released = self._pending[: len(self._pending) - keep]
            self._pending = self._pending[len(released) :]
        self.text += released
        return released


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that is a beginning of `stop`, and not all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class TextPrinter:
    """Prints growing rows one below the other.

    The first row that has not ended is printed as it grows. The text of later rows is kept until it is their turn.
    """

    def __init__(self, titles: Sequence[str]) -> None:
        self._titles, self._waiting, self._ended = titles, ["" for _ in titles], [False for _ in titles]
        self._start(0)

    def add(self, row: int, text: str) -> None:
        """Print the new text of a row, or keep it until it is the row's turn."""
        if row == self._current:
            _write(text)
        else:
            self._waiting[row] += text

    def end(self, row: int) -> None:
        """End a row. If it is the one on the terminal, go on to the next row that has not ended."""
        self._ended[row] = True
        while self._current < len(self._titles) and self._ended[self._current]:
            _write("\n")
            self._start(self._current + 1)

    def _start(self, row: int) -> None:
        """Print the row's title, if there are several rows, and the text that was kept."""
        self._current, rows = row, len(self._titles)
        if row < rows:
            title = " ".join(self._titles[row].split())
            title = f"[{row + 1}/{rows}] {title if len(title) <= 60 else title[:57] + '...'}\n"
            _write((title if rows > 1 else "") + self._waiting[row])


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


class Report:
    """Collects the tokens of all rows, finds stop strings, and prints.

    Every rank has a report, because every rank must end a row at the same token. Only one rank prints.

    Args:
        tokenizer: turns token ids into text.
        prints: whether this rank prints.
    """

    def __init__(self, config: GenerateConfig, request: Request, tokenizer: TextTokenizer, *, prints: bool) -> None:
        self.config, self.request, self.prints = config, request, prints
        self.rows = [StreamedText(tokenizer.decode, prompt, config.all_stops) for prompt in request.prompts]
        self.printer = TextPrinter(request.titles) if prints and config.format == "text" else None
        self.start_time, self.first_token_time = time.monotonic(), 0.0

    def on_token(self, row: int, token: int) -> bool:
        """Add a token to a row. Return whether a stop string ended the row."""
        self.first_token_time = self.first_token_time or time.monotonic()
        new_text = self.rows[row].add(token)
        if self.printer is not None:
            self.printer.add(row, new_text)
        return self.rows[row].stopped

    def on_end(self, row: int) -> None:
        """End a row."""
        rest = self.rows[row].end()
        if self.printer is not None:
            self.printer.add(row, rest)
            self.printer.end(row)

    def end(self, tokens: list[list[int]]) -> None:
        """Print the speed (text) or everything (JSON) after all rows have ended.

        Args:
            tokens: the generated token ids of each row.
        """
        if not self.prints:
            return
        now = time.monotonic()
        first, generated = self.first_token_time or now, sum(map(len, tokens))
        # The first token of each row comes from the forward pass of its prompt, so it is not counted in the speed.
        steps = generated - sum(map(bool, tokens))
        speed = steps / (now - first) if steps else 0.0
        prompt_tokens, prompt_s = sum(map(len, self.request.prompts)), first - self.start_time
        if self.printer is not None:
            speeds = f"{generated} tokens, {speed:.1f} tokens/s; {prompt_tokens} prompt tokens in {prompt_s:.2f} s"
            print(speeds, file=sys.stderr)
            return
        results = [
            {
                "prompt": title,
                "text": row.text,
                "tokens": ids,
                "finish": "stop" if row.stopped or len(ids) < self.config.max_tokens else "length",
            }
            for title, row, ids in zip(self.request.titles, self.rows, tokens, strict=True)
        ]
        figures = {"prompt_tokens": prompt_tokens, "tokens": generated, "prompt_s": prompt_s, "tokens_per_s": speed}
        print(to_json({"results": results, **figures}, ensure_ascii=False, indent=2))


def generate_on_rank(config: GenerateConfig, request: Request | None = None) -> None:
    """Load this rank's part of the model, generate, and print on rank 0. All ranks of the launch must call it.

    The experts are spread over the ranks; everything else is replicated.

    Args:
        request: what to generate from. With None, rank 0 reads it and sends it to the other ranks.
    """
    world = world_from_env()
    store = open_store(world, START_TIMEOUT_S)
    if request is None:
        request = Request(*choose_on_rank0(store, world, "request", lambda: read_request(config)))
    device = pick_device(config.device, world.local_rank, world.local_world_size)
    dtype = compute_dtype(config.precision, device)
    source = open_model(request.path, check=False)
    tokenizer = open_given_tokenizer(source)
    init_process_group(store, world.rank, world.world_size, device, START_TIMEOUT_S)
    model, mesh = load_model(source, device, dtype, config.quantize)

    note = source.router.generation_note(source.model.top_k) if source.model.top_k is not None else None
    if world.rank == 0 and note is not None:
        print(note, file=sys.stderr)
    report = Report(config, request, tokenizer, prints=world.rank == 0)
    tokens = generate(
        model,
        request.prompts,
        max_tokens=config.max_tokens,
        sampling=config.sampling(),
        stop=request.end_ids,
        prefill_chunk=config.prefill_chunk,
        on_token=report.on_token,
        on_end=report.on_end,
        agree=lambda logits_BV: broadcast_from_first(logits_BV, mesh),
    )
    report.end(tokens)
    close_process_group()
