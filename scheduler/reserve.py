"""What is kept free for tenants that do not wait: they may ask at any moment, and should not wait then."""

from ktransformers.scheduler.accounts import Account
from ktransformers.scheduler.request import Request

_OTHERS_SECONDS = 3600.0
"""So long after another tenant asked than the one before, others are expected."""


class Reserve:
    """Of light tenants that are about and have nothing waiting: as much as they had of late, and one request
    more. (One that has clients enough for all of its share has nothing waiting now and then, too.)"""

    def __init__(self) -> None:
        self.slots = 0
        self.tokens = 0
        self.light = 0
        """Tenants that it is for."""
        self._last: Account | None = None
        self._others_until = 0.0

    def asks(self, account: Account, now: float) -> None:
        """A request of this tenant has come."""
        if account is not self._last:
            if self._last is not None:
                self._others_until = now + _OTHERS_SECONDS
            self._last = account

    def expects_others(self, now: float) -> bool:
        """More than one tenant asks here: another may come at any time, however long it was away."""
        return now < self._others_until

    def entered(self, account: Account, request: Request, outputs: int) -> None:
        """A request, which may draw so many tokens, is let in: what its tenant has at once, the past counting
        less each time."""
        size = request.n_prompt + min(outputs, request.sampling.max_tokens)
        tokens = size + sum(len(r.tokens) for r in account.running if r is not request)
        account.most_running = max(len(account.running), account.most_running * 15 // 16)
        account.most_tokens = max(tokens, account.most_tokens * 15 // 16)
        account.largest = max(size, account.largest * 15 // 16)

    def forget(self, account: Account) -> None:
        """It was not here for so long that it is not expected back."""
        account.most_running = account.most_tokens = account.largest = 0
        self.keep(account, light=False)

    def keep(self, account: Account, light: bool) -> None:
        """Something about it has changed. `light`: it has nothing waiting, and had no more than its share."""
        slots = tokens = 0
        light = light and account.largest > 0
        self.light += light - account.light
        account.light = light
        if light:
            slots = max(0, account.most_running + 1 - len(account.running))
            held = sum(len(r.tokens) for r in account.running) if account.running else 0
            tokens = max(0, account.most_tokens + account.largest - held)
        self.slots += slots - account.kept[0]
        self.tokens += tokens - account.kept[1]
        account.kept = (slots, tokens)
