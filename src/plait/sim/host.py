"""A machine of the simulation: it can crash, hang, and have a wrong clock.

What a crash loses is what ``on_crash`` forgets; what a host keeps elsewhere is its disk.
While it hangs, everything that would reach it waits, as in a stopped process.
"""

from collections import deque
from collections.abc import Callable

from plait.sim.engine import MS, Engine, Timer

START_MS = 1_790_000_000_000
"""Wall time at the start of every run, milliseconds."""

Reply = Callable[[object], None]
"""Takes the answer to a call: a message or a frozen value, or a ``PlaitError``."""


class Host:
    """Base of nodes, clients, ledgers and witnesses; ``name`` is also its address."""

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine = engine
        self.name = name
        self.up = False
        self.hung = False
        self.life = 0
        """Counts its starts, so that nothing of an earlier life happens in a later one."""
        self.skew_ms = 0
        self._waiting: deque[tuple[int, str, Callable[[], None]]] = deque()

    @property
    def running(self) -> bool:
        """Whether it is up and not stopped."""
        return self.up and not self.hung

    def now_ms(self) -> int:
        """Its own wall clock."""
        return START_MS + self.engine.now_us // MS + self.skew_ms

    def start(self) -> None:
        """Begin a life."""
        if not self.up:
            self.up, self.hung = True, False
            self.life += 1
            self._waiting.clear()
            self.on_start()

    def crash(self) -> None:
        """Lose everything but the disk, at once."""
        if self.up:
            self.up = self.hung = False
            self._waiting.clear()
            self.on_crash()

    def hang(self) -> None:
        """Stop as by SIGSTOP."""
        self.hung = self.up

    def resume(self) -> None:
        """Go on, with what has come meanwhile first."""
        self.hung = False
        while self.running and self._waiting:
            life, what, action = self._waiting.popleft()
            if life == self.life:
                if what:
                    self.engine.note(f"{what} (late)")
                action()

    def take(self, what: str, action: Callable[[], None]) -> None:
        """Do something in this host: now, when it goes on, or never if it is down."""
        if self.running:
            if what:
                self.engine.note(what)
            action()
        elif self.up:
            self._waiting.append((self.life, what, action))

    def after(self, delay_us: int, what: str, action: Callable[[], None]) -> Timer:
        """Set a timer of this life."""
        life = self.life

        def ring() -> None:
            if life == self.life and timer.action is not None:
                self.take(what, action)

        timer = self.engine.after(delay_us, "", ring)
        return timer

    def every(self, period_us: int, what: str, action: Callable[[], None]) -> None:
        """Do something each period from a random phase on, as long as this life lasts."""

        def ring() -> None:
            action()
            self.after(period_us, what, ring)

        self.after(self.engine.random.randrange(period_us), what, ring)

    # What a kind of host does.

    def on_start(self) -> None:
        """A life begins: build everything from the disk."""

    def on_crash(self) -> None:
        """A life ended: forget everything but the disk."""

    def on_call(self, caller: str, method: str, request: object, reply: Reply) -> None:
        """Answer a call, now or later, once."""
        raise NotImplementedError(f"{self.name} answers no {method}")
