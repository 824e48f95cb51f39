"""Stop strings, looked for on this side: what a user wants to stop at may say as much as his prompt."""

from __future__ import annotations

from dataclasses import replace

from sgt_titan.client.answer import Delta, TokenLogprob


class StopScanner:
    """Cuts one choice's text at the first stop string, holding back what could still become one."""

    def __init__(self, stops: tuple[str, ...]):
        self._stops = stops
        self._text = ""
        self._tokens: list[TokenLogprob] = []
        self._surplus = 0  # characters let go whose token is still held
        self.stopped = False

    def feed(self, delta: Delta) -> Delta | None:
        """What may be shown of ``delta`` and what was held back before; None if that is nothing.

        A stop found ends the choice: ``stopped`` becomes true and later deltas give None.
        """
        if self.stopped:
            return None
        if not self._stops:
            self.stopped = delta.finish_reason is not None
            return delta
        self._text += delta.text
        self._tokens += delta.logprobs
        found = [at for stop in self._stops if (at := self._text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._let_go(replace(delta, finish_reason="stop"), min(found), last=False)
        self.stopped = delta.finish_reason is not None
        keep = 0 if self.stopped else self._could_become_stop()
        shown = self._let_go(delta, len(self._text) - keep, last=self.stopped)
        return shown if shown.text or shown.logprobs or shown.finish_reason or shown.tokens else None

    def _could_become_stop(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = min(max(map(len, self._stops)) - 1, len(self._text))
        return next(
            (k for k in range(longest, 0, -1) if any(s.startswith(self._text[-k:]) for s in self._stops)), 0
        )  # fmt: skip

    def _let_go(self, delta: Delta, characters: int, *, last: bool) -> Delta:
        text, self._text = self._text[:characters], self._text[characters:]
        self._surplus += len(text)
        count = 0
        while count < len(self._tokens) and (last or len(self._tokens[count].token) <= self._surplus):
            self._surplus -= len(self._tokens[count].token)
            count += 1
        tokens, self._tokens = self._tokens[:count], self._tokens[count:]
        return replace(delta, text=text, logprobs=tuple(tokens))
