"""A transformers model in this process: for trying a transform out, and where the trunk is near anyway."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from sgt_titan.client.answer import Answer, Delta, Options, UpstreamError, check_embeddings, gather
from sgt_titan.client.stops import StopScanner
from sgt_titan.errors import UserError
from sgt_titan.transform.tokenizer import decode, load_tokenizer, tokenizer_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_OF_THE_HUB = ("revision", "cache_dir", "token", "local_files_only")
_UNSUPPORTED = ("logprobs", "presence_penalty", "frequency_penalty", "ignore_eos", "stop_token_ids", "json_object")


class Transformers:
    """``model.generate(inputs_embeds=...)`` behind the interface of a server.

    ``seed`` seeds torch's global generator, from which transformers draws: two generations at a time would mix.
    Without a temperature one answer is greedy, where a server would sample.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self._model, self._tokenizer = model.eval(), tokenizer

    @property
    def model(self) -> PreTrainedModel:
        return self._model

    @classmethod
    def from_pretrained(cls, path: str, **kwargs: Any) -> Transformers:
        """A checkpoint directory or hub name. Raises UserError if it cannot be loaded."""
        from transformers import AutoModelForCausalLM

        try:
            model = AutoModelForCausalLM.from_pretrained(path, **kwargs)
            folder = tokenizer_folder(path, **{key: kwargs[key] for key in _OF_THE_HUB if key in kwargs})
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be loaded as a causal language model ({type(error).__name__})") from error
        # Its ids become text as tokenizer.json says, whatever class transformers would take for the model.
        return cls(model, load_tokenizer(folder))

    def generate(self, embeds_TD: torch.Tensor, options: Options | None = None, **changes: Any) -> Answer:
        """As ``Remote.generate``."""
        options = options or Options(**changes)
        return gather(self.stream(embeds_TD, options), options, embeds_TD.shape[0])

    def stream(self, embeds_TD: torch.Tensor, options: Options | None = None, **changes: Any) -> Iterator[Delta]:
        """As ``Remote.stream``; generation runs in a thread and stops when the loop is left.

        Raises UserError for options that transformers has no equal of, and for embeddings of another width.
        """
        options = options or Options(**changes)
        check_embeddings(embeds_TD)
        for name in _UNSUPPORTED:
            if getattr(options, name) not in (None, False):
                raise UserError(f"{name}: the transformers backend has no such option")
        width = self._model.get_input_embeddings().weight.shape[1]
        if embeds_TD.shape[1] != width:
            raise UserError(f"embeddings: width {embeds_TD.shape[1]}, this model's is {width}; another trunk?")
        sampling, feed = _sampling(options), _Feed(options.n)
        thread = threading.Thread(target=self._run, args=(embeds_TD, options.seed, sampling, feed), daemon=True)
        thread.start()
        try:
            yield from self._deltas(feed, options)
        finally:
            feed.cancelled.set()
            thread.join()

    def _run(self, embeds_TD: torch.Tensor, seed: int | None, sampling: dict[str, Any], feed: _Feed) -> None:
        try:
            if seed is not None:
                torch.manual_seed(seed)
            embeds_BTD = embeds_TD[None].to(self._model.device, self._model.dtype)
            with torch.inference_mode():
                self._model.generate(
                    inputs_embeds=embeds_BTD,
                    attention_mask=torch.ones(embeds_BTD.shape[:2], dtype=torch.int64, device=embeds_BTD.device),
                    streamer=feed,
                    stopping_criteria=[feed.should_stop],
                    **sampling,
                )
            feed.tokens.put(None)
        except BaseException as error:  # handed to the reader, whose loop it must end
            feed.tokens.put(error)

    def _deltas(self, feed: _Feed, options: Options) -> Iterator[Delta]:
        scanners = [StopScanner(options.stop) for _ in range(options.n)]
        ids: list[list[int]] = [[] for _ in range(options.n)]
        shown = [0] * options.n
        skip = options.skip_special_tokens is not False
        ends = set(_as_list(self._model.generation_config.eos_token_id))
        while not all(scanner.stopped for scanner in scanners):
            step = feed.tokens.get()
            if isinstance(step, BaseException):
                raise UpstreamError(f"generation failed ({type(step).__name__})") from step
            if step is None:
                break
            for row, token in enumerate(step):
                if scanners[row].stopped:
                    continue
                ended = token in ends
                ids[row].append(token)
                reason = "stop" if ended else "length" if len(ids[row]) == options.max_tokens else None
                text = decode(self._tokenizer, ids[row][:-1] if ended else ids[row], skip_special_tokens=skip)
                # Bytes of a character that is not complete yet decode to U+FFFD.
                ready = len(text) if reason or not text.endswith("\ufffd") else shown[row]
                new, shown[row] = text[shown[row] : ready], max(ready, shown[row])
                delta = scanners[row].feed(Delta(row, new, (), reason, len(ids[row])))
                if delta is not None:
                    yield delta


class _Feed:
    """A transformers streamer, and the criterion that ends generation when nobody listens."""

    def __init__(self, rows: int):
        self.tokens: queue.SimpleQueue[list[int] | BaseException | None] = queue.SimpleQueue()
        self.cancelled = threading.Event()
        self._rows, self._started = rows, False

    def put(self, value: torch.Tensor) -> None:
        # The first call hands over the prompt, of which embeddings have no ids.
        if not self._started:
            self._started = True
            if value.numel() != self._rows or value.ndim == 2:
                return
        self.tokens.put(value.reshape(-1).tolist())

    def end(self) -> None:
        pass

    def should_stop(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.cancelled.is_set(), dtype=torch.bool, device=input_ids.device)


def _sampling(options: Options) -> dict[str, Any]:
    sample = options.temperature != 0 and (options.temperature is not None or options.n > 1)
    chosen: dict[str, Any] = {
        "max_new_tokens": options.max_tokens,
        "do_sample": sample,
        "num_return_sequences": options.n if sample else 1,
    }
    if not sample and options.n > 1:
        raise UserError("n: more than one greedy answer would be the same answer; set a temperature")
    for name in ("temperature", "top_p", "top_k", "min_p"):
        value = getattr(options, name)
        if sample and value is not None:
            chosen[name] = max(value, 0) if name == "top_k" else value
    if options.min_tokens is not None:
        chosen["min_new_tokens"] = options.min_tokens
    if options.repetition_penalty is not None:
        chosen["repetition_penalty"] = options.repetition_penalty
    return chosen


def _as_list(value: Any) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)
