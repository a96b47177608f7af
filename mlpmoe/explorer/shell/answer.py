"""The answer: dense and converted model go on from one prompt, and each word is tinted by how much
likelier or unlikelier the conversion made it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from numbers import Integral, Real
from time import monotonic, sleep
from typing import Any, TypeVar

import gradio as gr
import torch
from transformers import PreTrainedModel

from ...core.checks import check_characters
from ...core.errors import UserError
from ...core.stopping import may_stop, stoppable
from ...measure.quality.routing import routing
from ...measure.quality.tokens import TokenChange, text_changes
from ...measure.text.generation import Writing, encode_prompt, parted_at
from ...models.catalogue import DEMO_KEY
from ..server.asked import Conversion, spec_of
from ..server.background import each_in_thread
from ..server.events import status
from ..server.jobs import Job, Jobs
from ..server.loaded import LoadedModel
from ..server.looks import Looks
from ..server.turns import Place
from ..server.workbench import Workbench
from .answer_panel import BEGINNINGS, MAX_NEW_TOKENS, MAX_PROMPT, QUESTIONS, STORIES
from .front import network_of
from .network import cells_used
from .settings import parted, read_asked
from .tint import Tint

T = TypeVar("T")

SETTLED = 0.8  # seconds for which a visitor looks at a setting before it is written with
TICK = 0.1
TURN = 0.4  # seconds of writing before others have theirs
WRITING_SECONDS = 120.0  # after that, writing stops
TEMPERATURE = 0.6  # for stories, which repeat themselves at 0


@dataclass(frozen=True)
class Answer:
    """What both models wrote, with what each token of it is to both of them."""

    writings: tuple[Writing, Writing]  # dense, converted
    changes: tuple[list[TokenChange], list[TokenChange]]
    # of the converted text, if the conversion routes: per token and layer the cells it ran
    used: list[list[list[int]]] | None = field(default=None, repr=False)

    @cached_property
    def tint(self) -> Tint:
        """One scale for both texts."""
        return Tint.of([change for some in self.changes for change in some])


class AnswerHandlers:
    """The events of the answer over one workbench."""

    def __init__(self, workbench: Workbench, looks: Looks) -> None:
        self.workbench, self.looks, self.jobs = workbench, looks, Jobs()

    def another_model(self, model: str, prompt: str) -> tuple:
        """Prompt and examples of the model's kind, and how it is best tried; empty panes. A prompt
        of the visitor's own stays."""
        loaded = self.workbench.loaded(model)
        prompts = prompts_for(loaded)
        ours = not prompt.strip() or prompt in (*STORIES, *QUESTIONS, *BEGINNINGS)
        return (
            prompts[0] if ours else gr.skip(),
            gr.update(samples=[[example] for example in prompts]),
            TEMPERATURE if prompts is STORIES else 0,
            pane(""), pane(""), "",
        )  # fmt: skip

    def write(self, request: gr.Request, model: str, *values: Any) -> Iterator[tuple]:
        """Dense text, converted text, report, and the network with what each token ran. What was
        being written for this visitor stops."""
        with self.jobs.doing(request) as job:
            yield from self._until_stopped(request, job, self._write(job.check, model, values))

    def write_by_itself(
        self, request: gr.Request, follow: bool, model: str, *values: Any
    ) -> Iterator[tuple]:
        """The same once a setting has settled: the visitor looks at it for a while, and the
        measurement, which converts, has begun. Nothing where they have gone on meanwhile, or do
        not want it."""
        settings, (text, *_) = parted(values)
        loaded = self.workbench.loaded(model)
        at = loaded.key, read_asked(loaded, settings), text
        look = self.looks.of(request)
        if not follow or look is None or look.at != at or look.stay.written:
            return
        look.stay.written = True
        with self.jobs.doing(request) as job:
            gone_on, since = self.looks.check_stay(request, look.stay), monotonic()

            def check() -> None:
                gone_on()
                job.check()

            def settled() -> Iterator[tuple]:
                while monotonic() - since < SETTLED or loaded.known_evaluation(*at[1:]) is None:
                    check()
                    if self.looks.of(request).failed:
                        return
                    sleep(TICK)
                yield from self._write(check, model, values)

            yield from self._until_stopped(request, job, settled())

    def _until_stopped(
        self, request: gr.Request, job: Job, steps: Iterator[tuple]
    ) -> Iterator[tuple]:
        """The steps until the visitor goes on or presses Stop, and that it was Stop."""
        try:
            yield from steps
        except CancelledError:
            if job.stopped and self.jobs.of(request) is job:  # and not for another text
                yield gr.skip(), gr.skip(), status("Stopped."), gr.skip()

    def _write(self, check: Callable[[], None], model: str, values: tuple) -> Iterator[tuple]:
        """check: raises CancelledError once nobody waits for it any more."""
        settings, (_, prompt, tokens, temperature, layer) = parted(values)
        check_writing(prompt, tokens, temperature)
        loaded = self.workbench.loaded(model)
        asked = read_asked(loaded, settings)
        for message in loaded.convert(asked):
            check()
            yield gr.skip(), gr.skip(), status(f"{message} …"), gr.skip()
        steps = _answered(loaded, asked, (prompt, tokens, temperature), check)
        waited = False
        for step in each_in_thread(steps):
            if isinstance(step, Place):
                waited = True
                yield gr.skip(), gr.skip(), status(f"{step} …"), gr.skip()
            elif isinstance(step, Answer):
                network = network_of(loaded, asked, layer, step.used) if step.used else gr.skip()
                yield *_tinted(step), report(loaded, step), network
            else:
                said, waited = "" if waited else gr.skip(), False
                yield *(pane(escape(text.lstrip())) for text in step), said, gr.skip()


def _answered(
    loaded: LoadedModel,
    asked: Conversion,
    wish: tuple[str, int, float],
    check: Callable[[], None],
) -> Iterator[tuple[str, str] | Answer]:
    """Both texts as they grow, then the answer. What the dense model wrote once is not written
    again."""
    known = loaded.answers.get((asked, wish))
    if known is not None:
        yield known
        return
    prompt, tokens, temperature = wish
    dense, model = loaded.answers.get(wish), loaded.converted(asked)
    started, writings, ended = monotonic(), (), False
    steps = loaded.write(asked, prompt, tokens, temperature, dense=not dense)
    turns = in_turns(loaded, steps)
    while not ended:
        with stoppable(check):
            written = next(turns, None)
        ended = written is None
        if written:
            writings = (dense, *written[-1]) if dense else written[-1]
            yield tuple(writing.text for writing in writings)
        if monotonic() - started > WRITING_SECONDS:
            gr.Info(f"Stopped after {WRITING_SECONDS:.0f} seconds.")
            break
    with stoppable(check), loaded.turns.turn():
        answer = _scored(loaded, model, asked, prompt, writings)
    if ended:  # else it may be written to its end another time
        loaded.answers.put(wish, writings[0])
        loaded.answers.put((asked, wish), answer)
    yield answer


def in_turns(loaded: LoadedModel, steps: Iterator[T]) -> Iterator[list[T]]:
    """What models write, as much of it at a time as a turn of TURN seconds gives. Nothing is
    yielded within a turn: a slow page would hold others up."""
    ended = object()
    step = None
    with loaded.in_use():
        while step is not ended:
            written = []
            with loaded.turns.turn():
                until = monotonic() + TURN
                while step is not ended and (not written or monotonic() < until):
                    may_stop()
                    step = next(steps, ended)
                    written += [] if step is ended else [step]
            yield written


def _scored(
    loaded: LoadedModel, converted: PreTrainedModel, asked: Conversion, prompt: str,
    writings: tuple[Writing, Writing],
) -> Answer:  # fmt: skip
    """With the losses of both texts under both models."""
    before = encode_prompt(loaded.tokenizer, prompt)[0].tolist()
    pair = (loaded.model, converted)
    changes = tuple(
        text_changes(pair, [*before, *writing.tokens], len(before), loaded.tokenizer)
        for writing in writings
    )
    used = None
    if spec_of(asked).experts is not None:
        ids = torch.tensor([*before, *writings[1].tokens])
        used = cells_used(routing(pair[1], ids))[len(before) :]
    return Answer(writings, changes, used)


def _tinted(answer: Answer) -> tuple[str, str]:
    """Both texts. The words of a routed model carry their number: see answer.js."""
    numbered = answer.used is not None
    dense, converted = answer.changes
    return (
        pane(answer.tint.spans(dense)),
        pane(
            answer.tint.spans(converted, lambda n: f' data-token="{n}"' if numbered else "")
        ),
    )  # fmt: skip


def pane(inner: str) -> str:
    """A text as HTML, which `inner` is already."""
    # with a place in the order of the keyboard, from which a long text is scrolled
    return f'<p class="loss" tabindex="0">{inner.strip() or "…"}</p>'


def report(loaded: LoadedModel, answer: Answer) -> str:
    """The scale, and the first token in which the texts part."""
    dense, converted = (writing.tokens for writing in answer.writings)
    at = parted_at(dense, converted)
    if at is None:
        parting = "Both wrote the same, token for token."
    else:
        first, second = (
            escape(repr(loaded.tokenizer.decode([tokens[at]]))) for tokens in (dense, converted)
        )
        parting = (
            f"They part at token {at + 1}: dense writes <code>{first}</code>, converted "
            f"<code>{second}</code>."
        )
    return f"{answer.tint.legend()}<p>{parting}</p>"


def prompts_for(loaded: LoadedModel) -> tuple[str, ...]:
    """What the model can go on from."""
    if loaded.key == DEMO_KEY:
        return STORIES
    return QUESTIONS if loaded.tokenizer.chat_template else BEGINNINGS


def check_writing(prompt: Any, tokens: Any, temperature: Any) -> None:
    """Raise UserError for what the components forbid, since the API can send anything."""
    if not isinstance(prompt, str) or len(prompt) > MAX_PROMPT:
        raise UserError(f"the prompt must be a text of at most {MAX_PROMPT:,} characters.")
    check_characters(prompt, "the prompt")
    if not _is(Integral, tokens) or not 1 <= tokens <= MAX_NEW_TOKENS:
        raise UserError(f"tokens must be a whole number between 1 and {MAX_NEW_TOKENS}.")
    if not _is(Real, temperature) or not 0 <= temperature <= 2:
        raise UserError("temperature must be a number between 0 and 2.")


def _is(kind: type, value: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
