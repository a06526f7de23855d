"""Answer prompts, or chat, with an adapter: python -m jaxlora.generate --run runs/NAME --prompt "..." """

import os
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple

from jaxlora.config.build import chosen
from jaxlora.config.load import CommandParser
from jaxlora.core import cli
from jaxlora.core.errors import InputError

if TYPE_CHECKING:  # what is slow to import is imported where it is used, so that --help answers at once
    from jaxlora.data.chat import ChatEncoder
    from jaxlora.models.decoding import Session
    from jaxlora.models.sampling import Sampling
    from jaxlora.runs.progress import Progress

DEFAULT_MAX_NEW_TOKENS = 512
COMMANDS = "/reset begins a new conversation, /quit (or Ctrl-D) leaves, Ctrl-C ends an answer"

Messages = list[dict[str, str]]


def main(argv: Sequence[str]) -> int:
    arguments = _parse(argv)
    try:
        return _generate(arguments)
    except BrokenPipeError:  # whoever read the answers (a pager, `head`) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return cli.EXIT_OK


def _parse(argv: Sequence[str]) -> Namespace:
    parser = CommandParser(
        prog="python -m jaxlora.generate",
        description="Answer a prompt, each line of the input when it is no terminal, or chat. Answers go to standard "
        "output, everything else to standard error.",
        epilog=f"In a chat: {COMMANDS}.",
    )
    chosen.add_arguments(parser)
    parser.add_argument("--prompt", help="the prompt; without it, a chat")
    parser.add_argument("--system", help="a system message before it")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (0)")
    parser.add_argument(
        "--top-p", type=float, default=0.9, help="with a temperature: mass to draw from (0.9)"
    )
    parser.add_argument("--max-new-tokens", type=int, help=f"longest answer ({DEFAULT_MAX_NEW_TOKENS})")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn with a temperature (0)")
    arguments = parser.parse_args(argv)
    # Written so that NaN fails too.
    if not 0 <= arguments.temperature < float("inf"):
        raise InputError(f"--temperature {arguments.temperature:g} must be 0 (greedy) or a positive number.")
    if not 0 < arguments.top_p <= 1:
        raise InputError(f"--top-p {arguments.top_p:g} must be above 0 and at most 1.")
    if arguments.max_new_tokens is not None and arguments.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens {arguments.max_new_tokens} must be at least 1.")
    if not 0 <= arguments.seed < 2**31:
        raise InputError(f"--seed {arguments.seed} must be from 0 to {2**31 - 1}.")
    for name in ("prompt", "system"):
        text = getattr(arguments, name)
        if text is not None and not text.strip():
            raise InputError(f"--{name} is empty.")
        with _utf8(f"--{name}"):
            (text or "").encode()
    return arguments


def _generate(arguments: Namespace) -> int:
    from jaxlora.runs.progress import Progress

    source = chosen.choose(arguments)
    with Progress(output=sys.stderr) as progress:
        with progress.stage("starting JAX"):
            import jax

            from jaxlora.config.build import generation, inputs
            from jaxlora.core.compilation import use_persistent_cache
            from jaxlora.models.sampling import Sampling

            use_persistent_cache()
            jax.devices()
        model = generation.answering_model(
            source.model, source.revision, source.dtype, source.quantize, source.quantize_embeddings
        )
        limit = model.spec.max_position_embeddings
        with progress.stage("loading the tokenizer"):
            encoder = inputs.encoder(model)
        # What is wrong with the prompt shows before the long wait.
        prompt = _messages(arguments.system, arguments.prompt or "?")
        room(len(encoder.encode_prompt(prompt)), limit, arguments.max_new_tokens)
        with progress.stage("reading the adapter"):
            adapter = chosen.load(source, model)
        with progress.stage("loading the base") as stage:
            base = inputs.base(model, stage)
        lora = generation.effective(model, base, *adapter) if adapter else {}
        progress.say(f"loaded {source.description}")
        # Scalars of one type, whatever was typed: another type would be another program.
        sampling = Sampling(*(jax.numpy.float32(x) for x in (arguments.temperature, arguments.top_p)))
        session = generation.session(model, base, lora)
        answerer = Answerer(session, encoder, sampling, arguments.seed, arguments.max_new_tokens, progress)
        if arguments.prompt is not None:
            answerer.tell(answerer.answer(prompt))
        elif sys.stdin.isatty():
            _chat(answerer, arguments.system)
        else:
            _answer_lines(answerer, arguments.system)
    return cli.EXIT_OK


def _messages(system: str | None, prompt: str) -> Messages:
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": prompt}]


def room(prompt_tokens: int, limit: int, asked: int | None, strict: bool = True) -> int:
    """How many tokens an answer may have.

    Args:
        prompt_tokens: length of the prompt. limit: positions the model was made for.
        asked: --max-new-tokens, None where it was not given.
        strict: whether more than fits is refused; otherwise the answer may only be shorter.
    Raises:
        InputError: the prompt leaves no room, or less than was asked for.
    """
    left = limit - prompt_tokens
    if left < 1:
        raise InputError(
            f"the prompt has {prompt_tokens:,} tokens, the model was made for {limit:,} with the answer: shorten it."
        )
    if strict and asked is not None and asked > left:
        raise InputError(
            f"--max-new-tokens {asked:,} does not fit: the model was made for {limit:,} tokens, and the prompt has "
            f"{prompt_tokens:,}; give at most {left:,}."
        )
    return min(asked or DEFAULT_MAX_NEW_TOKENS, left)


class Spoken(NamedTuple):
    """An answer that was written out.

    Attributes:
        text: of the answer. tokens: how many. position: tokens of the conversation with it.
        wait: seconds to the first token. seconds: from the first to the last.
        end: "stop" (by itself), "length" (--max-new-tokens), "full" (the context), "interrupted".
    """

    text: str
    tokens: int
    position: int
    wait: float
    seconds: float
    end: str


class Answerer:
    """Answers conversations to standard output, token by token.

    Args:
        session: computes the ids. encoder: the model's template and tokenizer.
        sampling, seed: how ids are chosen. max_new_tokens: None for the default.
        progress: for what is said on standard error.
    """

    def __init__(
        self,
        session: "Session",
        encoder: "ChatEncoder",
        sampling: "Sampling",
        seed: int,
        max_new_tokens: int | None,
        progress: "Progress",
    ):
        self.session, self.progress = session, progress
        self._encoder, self._sampling, self._seed, self._asked = encoder, sampling, seed, max_new_tokens
        self._compiled = False

    def answer(
        self, messages: Messages, *, strict: bool = True, interrupted: Callable[[], bool] = lambda: False
    ) -> Spoken:
        """Writes the answer as it comes, and the end of its line.

        Args:
            messages: the conversation, ending with the user's turn.
            strict: see `room`.
            interrupted: asked after each token; ends the answer.
        Raises:
            InputError: a conversation that the template cannot show, or that does not fit.
        """
        from jaxlora.data.detokenizer import Detokenizer

        prompt = self._encoder.encode_prompt(messages)
        most = room(len(prompt), self.session.limit, self._asked, strict)
        detokenizer, pieces, count = Detokenizer(self._encoder.tokenizer), [], 0
        ids = self.session.answer(
            prompt,
            max_new_tokens=most,
            stop_ids=self._encoder.end_of_turn_ids,
            sampling=self._sampling,
            seed=self._seed,
        )

        def write(piece: str) -> None:
            pieces.append(piece)
            sys.stdout.write(piece)
            sys.stdout.flush()

        asked, end = time.perf_counter(), "stop"
        fresh, self._compiled = self.session.reserve(len(prompt) + most) or not self._compiled, True
        with self.progress.stage("compiling, and reading the prompt" if fresh else "reading the prompt"):
            token = next(ids, None)
        first = last = time.perf_counter()
        while token is not None:
            count, last = count + 1, time.perf_counter()
            write(detokenizer.push(token))
            if interrupted():
                end = "interrupted"
                break
            token = next(ids, None)
        else:
            if count == most:
                end = "length" if most == (self._asked or DEFAULT_MAX_NEW_TOKENS) else "full"
        ids.close()
        write(detokenizer.end())
        sys.stdout.write("\n")
        sys.stdout.flush()
        return Spoken("".join(pieces), count, len(prompt) + count, first - asked, last - first, end)

    def tell(self, *spoken: Spoken) -> None:
        """Says how many tokens were written, how fast, and what cut the last answer short."""
        tokens, seconds = sum(s.tokens for s in spoken), sum(s.seconds for s in spoken)
        timed = sum(max(0, s.tokens - 1) for s in spoken)
        speed = f"{timed / seconds:,.1f} tokens/s" if timed and seconds else ""
        waited = f"the first after {spoken[0].wait:.1f} s"
        cut = {
            "length": "cut at --max-new-tokens",
            "full": "cut: the context is full",
            "interrupted": "interrupted",
        }
        facts = (f"{tokens:,} tokens", speed, waited, cut.get(spoken[-1].end, ""))
        self.progress.say(f"[{', '.join(filter(None, facts))}]")


def _answer_lines(answerer: Answerer, system: str | None) -> None:
    """Answers each line of the input by itself."""
    spoken = []
    for number, line in enumerate(sys.stdin.buffer, 1):
        with _utf8(f"line {number} of the input"):
            prompt = line.decode().strip()
        if prompt:
            try:
                spoken.append(answerer.answer(_messages(system, prompt)))
            except InputError as error:
                raise InputError(f"line {number} of the input: {error}") from error
    if not spoken:
        raise InputError("the input holds no prompt; give one a line, or --prompt.")
    answerer.tell(*spoken)


def _chat(answerer: Answerer, system: str | None) -> None:
    """Talks until the person leaves."""
    with suppress(ImportError):
        import readline  # noqa: F401  with it, input() has a history and arrow keys

    start: Messages = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    answerer.progress.say(COMMANDS)
    while (line := _ask()) is not None:
        if line == "/quit":
            return
        if line == "/reset":
            messages = list(start)
            answerer.progress.say("a new conversation")
        elif line.startswith("/") and len(line.split()) == 1:
            answerer.progress.say(f"{line} is no command: {COMMANDS}")
        elif line:
            asked = [*messages, {"role": "user", "content": line}]
            try:
                with _interruptible() as interrupted:
                    spoken = answerer.answer(asked, strict=False, interrupted=interrupted)
            except InputError as error:
                full = " /reset begins a new conversation." if messages != start else ""
                answerer.progress.say(f"error: {error}{full}")
                continue
            answerer.tell(spoken)
            messages = [*asked, {"role": "assistant", "content": spoken.text}]
            if spoken.end == "full":
                limit = answerer.session.limit
                answerer.progress.say(f"{spoken.position:,} of {limit:,} tokens are used: go on with /reset")


def _ask() -> str | None:
    """The person's next line; None when they leave."""
    while True:
        try:
            # Where the answers go to a file, input() would write its prompt there too.
            if not sys.stdout.isatty():
                print("> ", end="", file=sys.stderr, flush=True)
            line = input("> " if sys.stdout.isatty() else "").strip()
            line.encode()
            return line
        except EOFError:
            print(file=sys.stderr)
            return None
        except KeyboardInterrupt:
            print("\n(/quit or Ctrl-D leaves)", file=sys.stderr)
        except UnicodeError:
            print("that line is not UTF-8", file=sys.stderr)


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """While open, Ctrl-C is only noted.

    An exception between a call that donates the cache and the assignment of its result would lose the conversation.
    """
    received: list[int] = []

    def note(number: int, _frame: object) -> None:
        received.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _utf8(what: str) -> Iterator[None]:
    try:
        yield
    except UnicodeError as error:
        raise InputError(f"{what} is not UTF-8 text.") from error


if __name__ == "__main__":
    cli.run(main)
