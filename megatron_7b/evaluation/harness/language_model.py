"""A checkpoint as lm-evaluation-harness sees a model; the harness runs on the main rank alone, the others follow.

The tokens of requests are those that the harness's own `hf` model gives an export of the same checkpoint.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_7b.errors import ConfigError
from megatron_7b.generation.copies import Copies
from megatron_7b.generation.options import GenerationOptions
from megatron_7b.generation.prompts import Prompt
from megatron_7b.generation.score import ScoreRequest
from megatron_7b.tokenizer.chat_template import ChatTemplate, Conversation, has_chat_template

logger = logging.getLogger(__name__)

type Ids = list[int]

DEFAULT_NEW_TOKENS = 256
"""Of a task that does not say how long its answers are, as the harness has it."""

_AT_ONCE = 128
"""Requests between two reports of progress, unless fewer are wanted."""


class MegatronLM(TemplateLM):
    """A model for `lm_eval.simple_evaluate`.

    Args:
        copies: The model, of which this is the leading rank.
        report: Takes what is being done, requests done and requests in all.
        at_once: Requests between two reports.
    """

    def __init__(self, copies: Copies, report: Callable[[str, int, int], None], *, at_once: int | None = None) -> None:
        super().__init__()
        self._at_once = at_once or _AT_ONCE
        self._copies, self._report = copies, report
        self._setup = copies.session.setup
        self._template: ChatTemplate | None = None

    @property
    def eot_token_id(self) -> int:
        """Token that ends a text.

        Raises:
            ConfigError: The tokenizer has none.
        """
        found = self._setup.tokenizer.eod_id
        if found is None:
            raise ConfigError("the tokenizer has no token that ends a text, which tasks need")
        return found

    @property
    def prefix_token_id(self) -> int:
        """Token that a text is scored after which has nothing before it."""
        bos = self._setup.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        """Tokens of the longest text."""
        return self._setup.config.model.max_position_embeddings

    @property
    def tokenizer_name(self) -> str:
        """What the harness tells cached requests apart by."""
        return self._setup.tokenizer.identity

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return what the harness records of the template.

        Raises:
            ConfigError: The tokenizer has no template.
        """
        return self._chat_template().identity if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Spell a conversation out."""
        template, conversation = self._chat_template(), Conversation(chat_history)
        text = template.render(conversation, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt or not chat_history:
            return text
        # The last message is to be continued: what the template writes after it is left out.
        last = chat_history[-1]["content"].rstrip()
        return text[: text.rindex(last) + len(last)]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_unused: Any) -> Ids:
        """Return the tokens of a text, by default with those that transformers puts before it."""
        tokenizer = self._setup.tokenizer
        if self._template is not None:
            return self._template.encode(string)
        if add_special_tokens is False or not string:
            return tokenizer.encode(string)
        return list(self._setup.encode(string).ids)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, Ids, Ids]], disable_tqdm: bool = False, **_unused: Any
    ) -> list[tuple[float, bool]]:
        """Score continuations, each (key, tokens before it, its tokens)."""
        asked = [
            ScoreRequest(tuple(context[-self.max_length :]), tuple(continuation[-self.max_length :]))
            for _, context, continuation in requests
        ]
        self._tell_cut(
            sum(len(context) + len(continuation) > self.max_length + 1 for _, context, continuation in requests),
            len(requests),
        )
        # In alphabetical order, so that what begins alike is in one portion.
        order = sorted(range(len(asked)), key=lambda number: asked[number].context_ids)
        found: dict[int, tuple[float, bool]] = {}
        for first in range(0, len(order), self._at_once):
            some = order[first : first + self._at_once]
            scores = self._copies.score([asked[number] for number in some])
            found |= {
                number: (score.log_likelihood, score.is_greedy) for number, score in zip(some, scores, strict=True)
            }
            if not disable_tqdm:
                self._report("scored", len(found), len(asked))
        return [found[number] for number in range(len(asked))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log likelihood of whole texts, in windows that do not overlap in what they predict."""
        windows = [
            (number, make_disjoint_window(window))
            for number, request in enumerate(requests)
            for window in get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
        ]
        scores = self._loglikelihood_tokens([(None, *window) for _, window in windows], disable_tqdm)
        totals = [0.0] * len(requests)
        for (number, _), (log_likelihood, _) in zip(windows, scores, strict=True):
            totals[number] += log_likelihood
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue texts up to the texts that end them."""
        asked = [self._generation(*request.args) for request in requests]
        self._tell_cut(sum(is_cut for _, _, is_cut in asked), len(asked))
        texts: list[str] = []
        for first in range(0, len(asked), self._at_once):
            prompts, options, _ = zip(*asked[first : first + self._at_once], strict=True)
            texts += [one.text for one in self._copies.generate(prompts, options)]
            if not disable_tqdm:
                self._report("generated", len(texts), len(asked))
        return texts

    def _generation(self, context: str, gen_kwargs: dict[str, Any]) -> tuple[Prompt, GenerationOptions, bool]:
        """Return the prompt, how it is continued, and whether it lost its beginning."""
        kwargs = normalize_gen_kwargs(dict(gen_kwargs), DEFAULT_NEW_TOKENS)
        until = handle_stop_sequences(kwargs.get("until"), eos=self._setup.tokenizer.spell(self.eot_token_id))
        max_new_tokens = int(kwargs["max_gen_toks"])
        if max_new_tokens >= self.max_length:
            raise ConfigError(
                f"a task asks for texts of {max_new_tokens} tokens, but the model's context is {self.max_length}",
                hint="--gen-kwargs max_gen_toks=N asks for fewer",
            )
        whole = self.tok_encode(context)
        ids = whole[-(self.max_length - max_new_tokens) :]
        options = GenerationOptions(
            max_new_tokens=max_new_tokens,
            temperature=float(kwargs.get("temperature", 1.0)) if kwargs.get("do_sample") else 0.0,
            top_k=kwargs.get("top_k"),
            top_p=kwargs.get("top_p"),
            stop=tuple(text for text in until if text),
        )
        return Prompt(context, tuple(ids)), options, len(ids) < len(whole)

    def _tell_cut(self, num_cut: int, total: int) -> None:
        """Warn of questions that are not asked as the task has them."""
        if num_cut:
            logger.warning(
                "%s of %s requests are longer than the model's context of %s tokens, and lose their beginning: fewer "
                "examples (--num-fewshot) leave more of it",
                f"{num_cut:,}", f"{total:,}", f"{self.max_length:,}",
            )  # fmt: skip

    def _chat_template(self) -> ChatTemplate:
        if self._template is None:
            if not has_chat_template(self._setup.tokenizer):
                raise ConfigError(
                    "the tokenizer of the checkpoint has no chat template", hint="leave out --apply-chat-template"
                )
            self._template = ChatTemplate(self._setup.tokenizer)
        return self._template
